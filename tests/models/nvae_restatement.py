"""NVAE restated in plain functions, independently of `pipeline`, for comparison with the model.

Weights are a dict of tensors under the names of the NVAE reference release, settings a dict under its option names.
The code follows the published description in the order of a forward pass, with tensor arithmetic and
`torch.nn.functional` only. It is written to be obvious rather than fast. No module of `pipeline` is imported.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.nvae_restatement_layout import (
    BINARY,
    BRANCHES,
    dec_tower,
    enc_tower,
    is_vanilla,
    post_process,
    pre_process,
)


@dataclass
class Net:
    """Settings, weights, mode, and batch-norm statistics. In training mode, a forward pass updates `running`."""

    args: dict
    state: dict[str, Tensor]
    training: bool = False
    running: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        self.running = {k: v.clone() for k, v in self.state.items() if k.endswith(buffers)} | self.running


# ---- building blocks


def ar_mask(kernel: int, c_in: int, groups: int, c_out: int, strict: bool, mirror: bool) -> Tensor:
    """Raster-order mask (c_out, c_in / groups, kernel, kernel) of an autoregressive convolution."""
    c = (kernel - 1) // 2
    mask = torch.zeros(c_out, c_in // groups, kernel, kernel)
    mask[:, :, :c] = 1
    mask[:, :, c, :c] = 1
    for o in range(c_out):
        for i in range(c_in // groups):
            if groups > 1:
                seen = not strict
            else:
                out_block, in_block = (o // (c_out // c_in), i) if c_out >= c_in else (o, i // (c_in // c_out))
                seen = in_block < out_block or (in_block == out_block and not strict)
            mask[o, i, c, c] = float(seen)
    return mask.flip(2, 3) if mirror else mask


def effective_weight(state: dict[str, Tensor], name: str) -> Tensor:
    """The kernel that convolution `name` applies: masked if it belongs to a flow, normalized if it has a norm."""
    weight = state[f"{name}.weight"]
    if name.startswith("nf_cells") or ".convz." in name or ".mu." in name:
        depthwise = name.endswith("convz.2")
        c_out, c_in, kernel = weight.shape[0], weight.shape[0] if depthwise else weight.shape[1], weight.shape[2]
        strict, mirror = name.endswith("convz.0"), "cell2" in name
        weight = weight * ar_mask(kernel, c_in, c_out if depthwise else 1, c_out, strict, mirror).to(weight)
    if f"{name}.log_weight_norm" not in state:
        return weight
    norm = weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return state[f"{name}.log_weight_norm"].exp() * weight / (norm + 1e-5)


def conv(net: Net, name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    weight = effective_weight(net.state, name)
    bias, padding, groups = (
        net.state.get(f"{name}.bias"),
        dilation * (weight.shape[2] // 2),
        x.shape[1] // weight.shape[1],
    )
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def batch_norm(net: Net, name: str, x: Tensor) -> Tensor:
    mean, var = net.running[f"{name}.running_mean"], net.running[f"{name}.running_var"]
    if net.training:
        var_batch, mean_batch = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        count = x.numel() / x.shape[1]
        net.running[f"{name}.running_mean"] = 0.95 * mean + 0.05 * mean_batch.detach()
        net.running[f"{name}.running_var"] = 0.95 * var + 0.05 * var_batch.detach() * count / (count - 1)
        net.running[f"{name}.num_batches_tracked"] = net.running[f"{name}.num_batches_tracked"] + 1
        mean, var = mean_batch, var_batch
    mean, var, gamma, beta = (
        t.view(-1, 1, 1) for t in (mean, var, net.state[f"{name}.weight"], net.state[f"{name}.bias"])
    )
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def squeeze_excite(net: Net, name: str, x: Tensor) -> Tensor:
    h = F.linear(x.mean(dim=(2, 3)), net.state[f"{name}.0.weight"], net.state[f"{name}.0.bias"]).relu()
    gate = F.linear(h, net.state[f"{name}.2.weight"], net.state[f"{name}.2.bias"]).sigmoid()
    return x * gate[:, :, None, None]


def factorized_reduce(net: Net, name: str, x: Tensor) -> Tensor:
    u = swish(x)
    shifted = [u, u[:, :, 1:, 1:], u[:, :, :, 1:], u[:, :, 1:, :]]
    return torch.cat([conv(net, f"{name}.conv_{i}", part, stride=2) for i, part in enumerate(shifted, start=1)], dim=1)


def conv_op(net: Net, name: str, x: Tensor, kind: str, activation: str, dilation: int = 1) -> Tensor:
    """Batch norm and activation, then (only for "up") nearest upsampling, then a 3x3 convolution."""
    if activation == "bnswish":
        x = swish(batch_norm(net, f"{name}.bn_act", x))
    else:
        x = F.elu(batch_norm(net, f"{name}.bn.bn", x))
    if kind == "up":
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return conv(net, f"{name}.conv_0", x, stride=2 if kind == "down" else 1, dilation=dilation)


def inverted_residual(net: Net, name: str, x: Tensor, kind: str) -> Tensor:
    j = 1 if kind == "up" else 0
    if kind == "up":
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    x = batch_norm(net, f"{name}.{j}.bn", x)
    x = swish(batch_norm(net, f"{name}.{j + 1}.conv.1", conv(net, f"{name}.{j + 1}.conv.0", x)))
    x = conv(net, f"{name}.{j + 2}.conv.0", x, stride=2 if kind == "down" else 1)
    x = swish(batch_norm(net, f"{name}.{j + 2}.conv.1", x))
    return batch_norm(net, f"{name}.{j + 4}.bn", conv(net, f"{name}.{j + 3}", x))


def cell(net: Net, name: str, x: Tensor, kind: str, role: str) -> Tensor:
    """A residual cell; `kind` is normal, down or up, `role` names the part of the network."""
    skip = x
    if kind == "down":
        skip = factorized_reduce(net, f"{name}.skip", x)
    if kind == "up":
        skip = conv(net, f"{name}.skip.1", F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
    branch = BRANCHES[net.args["arch_instance"]][role]
    if branch[0] == "conv":
        y = conv_op(net, f"{name}._ops.0", x, kind, branch[1], branch[2][0])
        y = conv_op(net, f"{name}._ops.1", y, "normal", branch[1], branch[2][1])
    else:
        y = inverted_residual(net, f"{name}._ops.0.conv", x, kind)
    if net.args["use_se"]:
        y = squeeze_excite(net, f"{name}.se.se", y)
    return skip + 0.1 * y


def flow(net: Net, name: str, z: Tensor) -> Tensor:
    """A pair of autoregressive shifts, the second in mirrored order. Volume preserving."""
    for layer in (f"{name}.cell1", f"{name}.cell2"):
        h = F.elu(conv(net, f"{layer}.conv.convz.0", z))
        h = F.elu(F.elu(conv(net, f"{layer}.conv.convz.2", h)))
        z = z - conv(net, f"{layer}.mu.conv_0", h)
    return z


# ---- distributions


def normal(raw_mu: Tensor, raw_log_sigma: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return 5 * torch.tanh(raw_mu / 5), temperature * ((5 * torch.tanh(raw_log_sigma / 5)).exp() + 0.01)


def normal_log_prob(z: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    return -0.5 * ((z - mu) / sigma) ** 2 - 0.5 * math.log(2 * math.pi) - sigma.log()


def normal_kl(mu_q: Tensor, sigma_q: Tensor, mu_p: Tensor, sigma_p: Tensor) -> Tensor:
    ratio = sigma_q / sigma_p
    return (((mu_q - mu_p) / sigma_p) ** 2 + ratio**2) / 2 - 0.5 - ratio.log()


def split_mixture(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, 10K, H, W) -> mixture logits (B, K, H, W); means, log-scales and coefficients (B, 3, K, H, W)."""
    k = logits.shape[1] // 10
    b, _, h, w = logits.shape
    means, log_scales, coefficients = logits[:, k:].view(b, 3, 3 * k, h, w).split(k, dim=2)
    return logits[:, :k], means, log_scales.clamp(min=-7), torch.tanh(coefficients)


def mixture_log_prob(logits: Tensor, x: Tensor, bits: int = 8) -> Tensor:
    """log p (B, H, W) of x (B, 3, H, W) in [0, 1] under the discretized mixture of logistics, published bin rule."""
    mixture, means, s, c = split_mixture(logits)
    y, n = (2 * x - 1).unsqueeze(2), 2**bits - 1
    red, green = y[:, 0], y[:, 1]  # (B, 1, H, W)
    mean = torch.stack([means[:, 0], means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green], dim=1)
    v = torch.exp(-s)
    plus, minus, mid = v * (y - mean + 1 / n), v * (y - mean - 1 / n), v * (y - mean)
    inside = torch.sigmoid(plus) - torch.sigmoid(minus)
    middle = torch.where(inside > 1e-5, inside.clamp(min=1e-10).log(), mid - s - 2 * F.softplus(mid) - math.log(n / 2))
    edges = torch.where(y > 0.99, -F.softplus(minus), middle)
    log_prob = torch.where(y < -0.999, plus - F.softplus(plus), edges)
    return torch.logsumexp(log_prob.sum(dim=1) + F.log_softmax(mixture, dim=1), dim=1)


def _chain(values: Tensor, c: Tensor) -> Tensor:
    """Colors (B, 3, H, W) in [0, 1] from per-channel values and coefficients, each channel given the ones before."""
    red = values[:, 0].clamp(-1, 1)
    green = (values[:, 1] + c[:, 0] * red).clamp(-1, 1)
    blue = (values[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
    return torch.stack([red, green, blue], dim=1) / 2 + 0.5


def mixture_mean(logits: Tensor) -> Tensor:
    mixture, means, _, c = split_mixture(logits)
    weights = mixture.softmax(dim=1).unsqueeze(1)
    return _chain((weights * means).sum(dim=2), (weights * c).sum(dim=2))


def mixture_sample(logits: Tensor, u_mix: Tensor, u_logistic: Tensor, t: float = 1.0) -> Tensor:
    mixture, means, s, c = split_mixture(logits)
    chosen = (mixture / t - (-u_mix.log()).log()).argmax(dim=1, keepdim=True)
    means, s, c = (p.gather(2, chosen.unsqueeze(1).expand(-1, 3, -1, -1, -1)).squeeze(2) for p in (means, s, c))
    return _chain(means + s.exp() / t * (u_logistic.log() - (1 - u_logistic).log()), c)


def log_likelihood(args: dict, logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) per image, (B,)."""
    if args["dataset"] in BINARY:
        log_prob = x * F.logsigmoid(logits) + (1 - x) * F.logsigmoid(-logits)
        return log_prob[:, :, 2:30, 2:30].sum(dim=(1, 2, 3))
    if args["num_mixture_dec"] == 1:
        mu, sigma = normal(*logits.chunk(2, dim=1))
        return normal_log_prob(2 * x - 1, mu, sigma).sum(dim=(1, 2, 3))
    return mixture_log_prob(logits, x, args["num_x_bits"]).sum(dim=(1, 2))


def decoder_mean(args: dict, logits: Tensor) -> Tensor:
    if args["dataset"] in BINARY:
        return logits.sigmoid()
    if args["num_mixture_dec"] == 1:
        return normal(*logits.chunk(2, dim=1))[0].clamp(-1, 1) / 2 + 0.5
    return mixture_mean(logits)


# ---- the network


def encode(net: Net, x: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Feature of the topmost group, and (combiner, feature) of groups 1, 2, ... in the order of sampling."""
    s = conv(net, "stem", 2 * x - 1)
    for n, (kind, _) in enumerate(pre_process(net.args)):
        s = cell(net, f"pre_process.{n}", s, kind, "pre")
    features = []
    for n, (kind, _) in enumerate(enc_tower(net.args)):
        if kind == "combiner":
            features.append((f"enc_tower.{n}.conv", s))
        else:
            s = cell(net, f"enc_tower.{n}", s, kind, "enc")
    return F.elu(conv(net, "enc0.1", F.elu(s))), features[::-1]


def decode(net: Net, batch: int, latent) -> Tensor:
    """Logits, where `latent(k, decoder state or None)` returns the latent of group k."""
    if is_vanilla(net.args):
        s = conv(net, "stem_decoder", latent(0, None))
    else:
        s, k = net.state["prior_ftr0"].expand(batch, -1, -1, -1), 0
        for n, (kind, _) in enumerate(dec_tower(net.args)):
            if kind == "combiner":
                s, k = conv(net, f"dec_tower.{n}.conv", torch.cat([s, latent(k, s)], dim=1)), k + 1
            else:
                s = cell(net, f"dec_tower.{n}", s, kind, "dec")
    for n, (kind, _) in enumerate(post_process(net.args)):
        s = cell(net, f"post_process.{n}", s, kind, "post")
    return conv(net, "image_conditional.1", F.elu(s))


def raw_prior(net: Net, k: int, s: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if k == 0:
        return torch.zeros_like(like), torch.zeros_like(like)
    return conv(net, f"dec_sampler.{k - 1}.1", F.elu(s)).chunk(2, dim=1)


def forward(net: Net, x: Tensor, noise: list[Tensor]) -> dict:
    """Every term of the bound; the keys are those of the golden files."""
    top, features = encode(net, x)
    groups, kl, log_q, log_p = [], [], 0, 0

    def latent(k: int, s: Tensor | None) -> Tensor:
        nonlocal log_q, log_p
        if k == 0:
            feature = top
        else:
            combiner, encoder_feature = features[k - 1]
            feature = encoder_feature + conv(net, combiner, s)
        raw_p = raw_prior(net, k, s, noise[k])
        raw_q = conv(net, f"enc_sampler.{k}", feature).chunk(2, dim=1)
        if k > 0 and net.args["res_dist"]:
            raw_q = [q + p for q, p in zip(raw_q, raw_p, strict=True)]
        q, p = normal(*raw_q), normal(*raw_p)
        z = q[0] + q[1] * noise[k]
        element_log_q = normal_log_prob(z, *q)
        for n in range(net.args["num_nf"]):
            z = flow(net, f"nf_cells.{k * net.args['num_nf'] + n}", z)
        element_log_p = normal_log_prob(z, *p)
        kl.append(element_log_q - element_log_p if net.args["num_nf"] else normal_kl(*q, *p))
        log_q, log_p = log_q + element_log_q.sum(dim=(1, 2, 3)), log_p + element_log_p.sum(dim=(1, 2, 3))
        groups.append({"q_mu": q[0], "q_sigma": q[1], "p_mu": p[0], "p_sigma": p[1]})
        return z

    logits = decode(net, len(x), latent)
    recon = -log_likelihood(net.args, logits, x)
    kl_all = torch.stack([k.sum(dim=(1, 2, 3)) for k in kl])
    return {
        "logits": logits, "recon": recon, "kl_all": kl_all, "log_q": log_q, "log_p": log_p, "groups": groups,
        "kl_diag": torch.stack([k.mean(dim=0).sum(dim=(1, 2)) for k in kl]),
        "nelbo": recon + kl_all.sum(dim=0), "log_iw": -recon - log_q + log_p,
    }  # fmt: skip


def sample_logits(net: Net, noise: list[Tensor], temperature: float | list[float] = 1.0, given: list = ()) -> Tensor:
    """Logits of a sample from the prior, with one temperature or one for each group; flows are not used.

    `given`: latents of the first groups.
    """

    def latent(k: int, s: Tensor | None) -> Tensor:
        if k < len(given):
            return given[k]
        scale = temperature[k] if isinstance(temperature, list) else temperature
        mu, sigma = normal(*raw_prior(net, k, s, noise[k]), scale)
        return mu + sigma * noise[k]

    return decode(net, len(noise[0]), latent)
