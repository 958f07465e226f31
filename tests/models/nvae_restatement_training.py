"""The training of NVAE restated in plain functions: the rest of nvae_restatement.py.

KL warm-up and balancing, both regularizers, loss, gradients, Adamax. No module of `pipeline` is imported.
"""

import math

import torch
from torch import Tensor

from tests.models.nvae_restatement import Net, effective_weight, forward
from tests.models.nvae_restatement_layout import groups_per_scale, parameter_order


def kl_coefficient(args: dict, step: int, total: int) -> float:
    rise = (step - args["kl_const_portion"] * total) / (args["kl_anneal_portion"] * total)
    return max(min(rise, 1.0), args["kl_const_coeff"])


def kl_alpha(args: dict, rule: str = "square") -> Tensor:
    counts = groups_per_scale(args)[::-1]
    formulas = {
        "equal": lambda i, n: 1,
        "linear": lambda i, n: 2**i,
        "sqrt": lambda i, n: 2 ** (i / 2),
        "square": lambda i, n: 4**i / n,
    }
    alpha = torch.tensor([formulas[rule](i, n) for i, n in enumerate(counts) for _ in range(n)], dtype=torch.float64)
    return alpha / alpha.min()


def balanced_kl(kl_all: Tensor, beta: float, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) KL already times beta, and the (G,) weights, from (G, B)."""
    if beta >= 1:
        return beta * kl_all.sum(dim=0), torch.ones(len(kl_all), dtype=kl_all.dtype)
    a = kl_all.detach().abs().mean(dim=1) + 0.01
    w = a / alpha * a.sum()
    w = w / w.mean()
    return beta * (w[:, None] * kl_all).sum(dim=0), w


def conv_matrices(state: dict[str, Tensor]) -> dict[tuple[int, int], list[str]]:
    """Names of the convolutions by shape (rows, columns) of their matrix, in registration order."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.dim() == 4:
            by_shape.setdefault((len(tensor), tensor[0].numel()), []).append(name.removesuffix(".weight"))
    return by_shape


def _unit(vector: Tensor) -> Tensor:
    return vector / max(vector.norm().item(), 1e-3)


def spectral_loss(state: dict[str, Tensor], u: dict[str, Tensor], iterations: int) -> tuple[Tensor, dict, dict]:
    """Sum of u W v over convolutions, and the new u and v by name. The vectors are constants for the gradient."""
    total, new_u, new_v = torch.zeros((), dtype=torch.float64), {}, {}
    for name in (name for names in conv_matrices(state).values() for name in names):
        matrix = effective_weight(state, name).flatten(1)
        left = u[name]
        for _ in range(iterations):
            right = _unit(left @ matrix.detach())
            left = _unit(matrix.detach() @ right)
        total = total + left @ matrix @ right
        new_u[name], new_v[name] = left, right
    return total, new_u, new_v


def bn_loss(state: dict[str, Tensor]) -> Tensor:
    """Sum over batch-norm layers of the largest |gamma|; ties share its gradient."""
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    return torch.stack([state[f"{name}.weight"].abs().max() for name in norms]).sum()


def regularizer_coefficient(args: dict, beta: float) -> float:
    strength = args["weight_decay_norm"]
    if not args["weight_decay_norm_anneal"]:
        return strength
    return math.exp((1 - beta) * math.log(args["weight_decay_norm_init"]) + beta * math.log(strength))


def training_loss(net: Net, x: Tensor, noise: list[Tensor], step: int, total: int, u: dict[str, Tensor]) -> dict:
    """The scalar `total` that training minimizes, its parts, and the new u (4 power iterations)."""
    out, beta = forward(net, x, noise), kl_coefficient(net.args, step, total)
    kl, weights = balanced_kl(out["kl_all"], beta, kl_alpha(net.args))
    norm_loss, new_u, _ = spectral_loss(net.state, u, 4)
    scale_loss, strength = bn_loss(net.state), regularizer_coefficient(net.args, beta)
    return {
        "kl_coeff": beta, "wdn_coeff": strength, "recon": out["recon"], "balanced_kl": kl, "kl_group_coeffs": weights,
        "kl_group_means": out["kl_all"].mean(dim=1), "norm_loss": norm_loss, "bn_loss": scale_loss, "u": new_u,
        "total": (out["recon"] + kl).mean() + strength * (norm_loss + scale_loss),
    }  # fmt: skip


def gradients(net: Net, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter by name, zero for a parameter that the loss does not depend on."""
    names = [
        name for name, tensor in net.state.items() if tensor.requires_grad and not name.endswith("weight_normalized")
    ]
    found = torch.autograd.grad(loss, [net.state[name] for name in names], allow_unused=True)
    return {n: torch.zeros_like(net.state[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def with_gradient(args: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy whose parameters require a gradient; aliases share the parameter's tensor."""
    names = set(parameter_order(args))
    copy = {k: v.detach().clone().requires_grad_(k in names) for k, v in state.items() if not k.endswith("_normalized")}
    return {k: copy[k.removesuffix("_normalized")] if k.endswith("weight_normalized") else copy[k] for k in state}


def adamax_step(p: Tensor, g: Tensor, m: Tensor, n: Tensor, t: int, lr: float, wd: float, eps: float = 1e-3):
    """(p, m, n) after update number t = 1, 2, ... with coupled weight decay."""
    g = g + wd * p
    m, n = 0.9 * m + 0.1 * g, torch.maximum(0.999 * n, g.abs() + eps)
    return p - lr / (1 - 0.9**t) * m / n, m, n
