"""Efficient-VDVAE restated in plain functions, independently of `pipeline`, for comparison with the model.

Weights are a dict of tensors under the names of its reference release, settings a dict under its option names, and
images are bytes. What is as in VDVAE comes from its restatement. No module of `pipeline` is imported.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.vdvae_restatement import Net, normal_log_density

# ---- names and shapes


def shapes_of(args: dict) -> dict[str, tuple[int, ...]]:
    """Of all parameters, in no particular order."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, c_in: int, c_out: int, kernel: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (c_out, c_in, kernel, kernel), (c_out,)

    def cell(name: str, c_in: int, mid: int, c_out: int, kernel: int) -> None:
        outer = 1 if args["use_1x1_conv"] else kernel
        conv(f"{name}.convs.1", c_in, mid, outer)
        conv(f"{name}.convs.3", mid, mid, kernel)
        conv(f"{name}.convs.5", mid, mid, kernel)
        conv(f"{name}.convs.7", mid, c_out, outer)

    def residual(name: str, count: int, c: int, ratio: float, kernel: int) -> None:
        for m in range(count):
            cell(f"{name}.residual_block.{m}", c, int(c * ratio), c, kernel)

    c = args["input_conv_filters"]
    conv("bottom_up.input_conv", 3, c, 1)
    for i, q in enumerate(args["up_strides"]):
        common = args["up_n_blocks"][i], c, args["up_mid_filters_ratio"][i], args["up_kernel_size"][i]
        for j in range(args["up_n_blocks_per_res"][i]):
            residual(f"bottom_up.levels_up.{i}.{j}", *common)
        name = f"bottom_up.levels_up_downsample.{i}"
        residual(name, *common)
        conv(f"{name}.skip_projection", c, args["up_skip_filters"][i], 1)
        if q > 1:
            conv(f"{name}.pool.ops.0", c, args["up_filters"][i], q)
        c = args["up_filters"][i]
    r = args["target_res"] // math.prod(args["up_strides"])
    before = args["down_filters"][0]
    found["top_down.trainable_h"] = (1, before, r, r)
    for i, q in enumerate(args["down_strides"]):
        w, z, r = args["down_filters"][i], args["down_latent_variates"][i], r * q
        skip, kernel = args["up_skip_filters"][::-1][i], args["down_kernel_size"][i]
        ratio = args["down_mid_filters_ratio"][i]
        for j, name in enumerate(block_names(args, i)):
            if j == 0 and q > 1:
                found[f"{name}.unpool.scale_bias"] = (1, w, r, r)
                conv(f"{name}.unpool.ops.0", before, w, 1)
            residual(name, args["down_n_blocks"][i], w, ratio, kernel)
            cell(f"{name}.posterior_net.0", w + skip, int((w + skip) * ratio / 2), (w + skip) // 2, kernel)
            cell(f"{name}.prior_net.0", w, int(w * ratio), 2 * w, kernel)
            conv(f"{name}.prior_layer.projection", w, 2 * z, 1)
            conv(f"{name}.posterior_layer.projection", (w + skip) // 2, 2 * z, 1)
            conv(f"{name}.z_projection", z, w, 1)
        before = w
    conv("top_down.output_conv", before, 10 * args["num_output_mixtures"], 1)
    return found


def block_names(args: dict, level: int) -> list[str]:
    others = [f"top_down.levels_down.{level}.{j}" for j in range(args["down_n_blocks_per_res"][level])]
    return [f"top_down.levels_down_upsample.{level}", *others]


def latent_shapes(args: dict) -> list[tuple[int, int, int]]:
    r, found = args["target_res"] // math.prod(args["up_strides"]), []
    for i, q in enumerate(args["down_strides"]):
        r *= q
        found += [(args["down_latent_variates"][i], r, r)] * len(block_names(args, i))
    return found


# ---- the network


def pixels_to_values(args: dict, pixels: Tensor) -> Tensor:
    u = pixels.double()
    return (u if args["num_bits"] == 8 else 8 * torch.floor(u / 8)) / 127.5 - 1


def conv(net: Net, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = net[1][f"{name}.weight"]
    return F.conv2d(x, weight, net[1][f"{name}.bias"], stride, padding=weight.shape[-1] // 2 if stride == 1 else 0)


def cell(net: Net, name: str, x: Tensor) -> Tensor:
    for number in (1, 3, 5, 7):
        x = conv(net, f"{name}.convs.{number}", x * torch.sigmoid(x))
    return x


def residual_blocks(net: Net, name: str, x: Tensor, count: int) -> Tensor:
    for m in range(count):
        x = x + cell(net, f"{name}.residual_block.{m}", x)
    return x


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def encode(net: Net, x: Tensor) -> list[Tensor]:
    """The skips from the highest level down."""
    args, h, skips = net[0], conv(net, "bottom_up.input_conv", x), []
    for i, q in enumerate(args["up_strides"]):
        for j in range(args["up_n_blocks_per_res"][i]):
            h = residual_blocks(net, f"bottom_up.levels_up.{i}.{j}", h, args["up_n_blocks"][i])
        name = f"bottom_up.levels_up_downsample.{i}"
        h = residual_blocks(net, name, h, args["up_n_blocks"][i])
        skips.append(conv(net, f"{name}.skip_projection", h))
        if q > 1:
            h = leaky(conv(net, f"{name}.pool.ops.0", h, stride=q))
    return skips


def sigma_of(kind: str, beta: float, raw: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(beta * raw)) / beta if kind == "std" else torch.exp(beta * raw)


def distributions(args: dict, raw_q: Tensor | None, raw_p: Tensor) -> dict[str, Tensor]:
    kind, beta = args["distribution_base"], args["gradient_smoothing_beta"]
    p_mean, p_raw = raw_p.chunk(2, dim=1)
    found = {"p_mean": p_mean, "p_sigma": sigma_of(kind, beta, p_raw)}
    if raw_q is not None:
        q_mean, q_raw = raw_q.chunk(2, dim=1)
        found |= {"q_mean": q_mean, "q_sigma": sigma_of(kind, beta, q_raw)}
        if args["use_residual_distribution"]:
            found["q_mean"] = p_mean + q_mean
            both = sigma_of(kind, beta, p_raw + q_raw)
            found["q_sigma"] = both if kind == "logstd" else found["p_sigma"] * found["q_sigma"]
    return found


def walk(net: Net, skips: list[Tensor] | None, latent, batch_size: int) -> tuple[Tensor, list[dict]]:
    """Logits and what each block computes. `latent(k, group)` gives z from its posterior and prior."""
    args, groups = net[0], []
    h = net[1]["top_down.trainable_h"].repeat(batch_size, 1, 1, 1)
    for i, q in enumerate(args["down_strides"]):
        for j, name in enumerate(block_names(args, i)):
            if j == 0 and q > 1:
                h = leaky(conv(net, f"{name}.unpool.ops.0", h))
                h = h.repeat_interleave(q, dim=2).repeat_interleave(q, dim=3) + net[1][f"{name}.unpool.scale_bias"]
            extra, rest = cell(net, f"{name}.prior_net.0", h).chunk(2, dim=1)
            raw_p, raw_q = conv(net, f"{name}.prior_layer.projection", rest), None
            if skips is not None:
                inner = cell(net, f"{name}.posterior_net.0", torch.cat([h, skips[-1 - i]], dim=1))
                raw_q = conv(net, f"{name}.posterior_layer.projection", inner)
            group = distributions(args, raw_q, raw_p)
            group["z"] = latent(len(groups), group)
            groups.append(group)
            h = h + extra + conv(net, f"{name}.z_projection", group["z"])
            h = residual_blocks(net, name, h, args["down_n_blocks"][i])
    return conv(net, "top_down.output_conv", h), groups


# ---- likelihood and the whole model


def mixture(args: dict, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, K, H, W) mixture logits, and (B, 3, K, H, W) means, scales and coefficients."""
    b, channels, h, w = logits.shape
    k, beta, least = channels // 10, args["output_gradient_smoothing_beta"], args["min_mol_logscale"]
    rest = logits[:, k:].reshape(b, 3, 3, k, h, w)
    if args["output_distribution_base"] == "std":
        scale = sigma_of("std", beta, rest[:, :, 1]).clamp(min=math.exp(least))
    else:
        scale = torch.exp(beta * rest[:, :, 1].clamp(min=least))
    return logits[:, :k], rest[:, :, 0], scale, torch.tanh(rest[:, :, 2])


def log_likelihood(args: dict, logits: Tensor, y: Tensor) -> Tensor:
    """(B,) log p(x | z), nats. The density of a bin below 1e-5 has the scale itself, where the release forgets beta."""
    half, top = (1 / 255, 1.0) if args["num_bits"] == 8 else (1 / 31, 248 / 127.5 - 1)
    mixing, means, scale, c = mixture(args, logits)
    y = y.unsqueeze(2)
    red, green = y[:, 0], y[:, 1]
    shifts = torch.stack([0 * c[:, 0], c[:, 0] * red, c[:, 1] * red + c[:, 2] * green], dim=1)
    plus, minus = (y - means - shifts + half) / scale, (y - means - shifts - half) / scale
    middle, mass = (y - means - shifts) / scale, torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - scale.log() - 2 * F.softplus(middle) + math.log(2 * half)
    inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    log_prob = torch.where(
        y <= -1 + 1e-6, F.logsigmoid(plus), torch.where(y >= top - 1e-6, F.logsigmoid(-minus), inside)
    )
    return torch.logsumexp(log_prob.sum(1) + torch.log_softmax(mixing, dim=1), dim=1).sum((1, 2))


def sample_image(args: dict, logits: Tensor, u_mix: Tensor, u_logistic: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, 3, H, W) between the smallest and the largest level."""
    top = 1.0 if args["num_bits"] == 8 else 248 / 127.5 - 1
    mixing, *parameters = mixture(args, logits)
    chosen = torch.argmax(mixing / temperature - torch.log(-torch.log(u_mix)), dim=1)
    index = chosen[:, None, None].expand(-1, 3, -1, -1, -1)
    mean, scale, c = (values.gather(2, index).squeeze(2) for values in parameters)
    v = mean + temperature * scale * (torch.log(u_logistic) - torch.log(1 - u_logistic))
    red = v[:, 0].clamp(-1, top)
    green = (v[:, 1] + c[:, 0] * red).clamp(-1, top)
    blue = (v[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, top)
    return torch.stack([red, green, blue], dim=1)


def kl_of(group: dict) -> Tensor:
    distance = (group["q_mean"] - group["p_mean"]) ** 2
    ratio = (group["q_sigma"] ** 2 + distance) / (2 * group["p_sigma"] ** 2)
    return torch.log(group["p_sigma"]) - torch.log(group["q_sigma"]) - 0.5 + ratio


def forward(net: Net, pixels: Tensor, eps: list[Tensor]) -> dict:
    """All terms of the bound, in nats per image, for bytes (B, 3, S, S)."""
    y = pixels_to_values(net[0], pixels)
    logits, groups = walk(net, encode(net, y), lambda k, g: g["q_mean"] + g["q_sigma"] * eps[k], len(pixels))
    out = {"logits": logits, "groups": groups, "recon": -log_likelihood(net[0], logits, y)}
    out["kl_all"] = torch.stack([kl_of(group).sum((1, 2, 3)) for group in groups])
    for kind in "qp":
        densities = [normal_log_density(g["z"], g[f"{kind}_mean"], g[f"{kind}_sigma"].log()) for g in groups]
        out[f"log_{kind}"] = sum(density.sum((1, 2, 3)) for density in densities)
    out["nelbo"] = out["recon"] + out["kl_all"].sum(0)
    return out


def sample_prior(net: Net, eps: list[Tensor], temperatures: list[float]) -> Tensor:
    """Logits, with one temperature for each block."""
    logits, _ = walk(net, None, lambda k, g: g["p_mean"] + temperatures[k] * g["p_sigma"] * eps[k], len(eps[0]))
    return logits
