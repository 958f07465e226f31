"""VDVAE restated in plain functions, independently of `pipeline`, for comparison with the model.

Weights are a dict of tensors under the names of VDVAE's reference release, settings a dict under its option names, and
images are bytes. The code follows the published description in the order of a forward pass, with tensor arithmetic and
`torch.nn.functional` only. It is written to be obvious rather than fast. No module of `pipeline` is imported.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Net = tuple[dict, dict[str, Tensor]]
"""Options and weights."""


# ---- the architecture that the options describe


def blocks_of(text: str) -> list[tuple[int, int]]:
    """(resolution, pooling factor or mixed-in resolution, 0 for neither) of every block."""
    found = []
    for token in text.split(","):
        for letter in "xmd":
            if letter in token:
                first, second = map(int, token.split(letter))
                found += [(first, 0)] * second if letter == "x" else [(first, second)]
                break
        else:
            found.append((int(token), 0))
    return found


def width_of(args: dict, r: int) -> int:
    special = dict(pair.split(":") for pair in args["custom_width_str"].split(",") if pair)
    return int(special.get(str(r), args["width"]))


def shapes_of(args: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, in the order of the release."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, c_in: int, c_out: int, kernel: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (c_out, c_in, kernel, kernel), (c_out,)

    def block(name: str, r: int, c_in: int, c_out: int) -> None:
        mid, kernel = int(width_of(args, r) * args["bottleneck_multiple"]), 3 if r > 2 else 1
        conv(f"{name}.c1", c_in, mid, 1)
        conv(f"{name}.c2", mid, mid, kernel)
        conv(f"{name}.c3", mid, mid, kernel)
        conv(f"{name}.c4", mid, c_out, 1)

    conv("encoder.in_conv", 3, args["width"], 3)
    for n, (r, _) in enumerate(blocks_of(args["enc_blocks"])):
        block(f"encoder.enc_blocks.{n}", r, width_of(args, r), width_of(args, r))
    found["decoder.gain"] = found["decoder.bias"] = (1, args["width"], 1, 1)
    decoder, z = blocks_of(args["dec_blocks"]), args["zdim"]
    for n, (r, _) in enumerate(decoder):
        w, name = width_of(args, r), f"decoder.dec_blocks.{n}"
        block(f"{name}.enc", r, 2 * w, 2 * z)
        block(f"{name}.prior", r, w, 2 * z + w)
        conv(f"{name}.z_proj", z, w, 1)
        block(f"{name}.resnet", r, w, w)
    for j, r in enumerate(start_resolutions(args)):
        found[f"decoder.bias_xs.{j}"] = (1, width_of(args, r), r, r)
    conv("decoder.out_net.out_conv", args["width"], 10 * args["num_mixtures"], 1)
    return found


def start_resolutions(args: dict) -> list[int]:
    return sorted({r for r, _ in blocks_of(args["dec_blocks"]) if r <= args["no_bias_above"]})


def group_shapes(args: dict) -> list[tuple[int, int, int]]:
    return [(args["zdim"], r, r) for r, _ in blocks_of(args["dec_blocks"])]


def initial_bounds(args: dict) -> dict[str, float]:
    """Each parameter is uniform between minus and plus this number at the beginning; those of gain are 1."""
    num_encoder, num_decoder = len(blocks_of(args["enc_blocks"])), len(blocks_of(args["dec_blocks"]))
    bounds = {}
    for name, shape in shapes_of(args).items():
        bounds[name] = 0.0
        if name == "decoder.gain":
            bounds[name] = 1.0
        elif name.endswith("weight") and not name.endswith("prior.c4.weight"):
            bounds[name] = 1 / math.sqrt(shape[1] * shape[2] * shape[3])
            if name.startswith("encoder.enc") and name.endswith("c4.weight"):
                bounds[name] *= math.sqrt(1 / num_encoder)
            if name.endswith(("resnet.c4.weight", "z_proj.weight")):
                bounds[name] *= math.sqrt(1 / num_decoder)
    return bounds


# ---- images to what the network and the likelihood see

SCALES = {
    "cifar10": (-120.63838, 1 / 64.16736),
    "imagenet32": (-116.2373, 1 / 69.37404),
    "imagenet64": (-115.92961967, 1 / 69.37404),
    "ffhq_256": (-112.8666757481, 1 / 69.84780273),
}


def network_input(args: dict, pixels: Tensor) -> Tensor:
    u = pixels.double()
    if args["dataset"] == "ffhq_1024":
        return (u / 255 - 0.4387) * (1 / 0.2743)
    shift, scale = SCALES[args["dataset"]]
    return (u + shift) * scale


def target(args: dict, pixels: Tensor) -> Tensor:
    u = pixels.double()
    if args["dataset"] == "ffhq_256":
        u = 8 * torch.floor(u / 8)
    return (u - 127.5) / 127.5


# ---- the network


def conv(net: Net, name: str, x: Tensor) -> Tensor:
    weight = net[1][f"{name}.weight"]
    return F.conv2d(x, weight, net[1][f"{name}.bias"], padding=1 if weight.shape[-1] == 3 else 0)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def bottleneck(net: Net, name: str, x: Tensor) -> Tensor:
    for part in ("c1", "c2", "c3", "c4"):
        x = conv(net, f"{name}.{part}", gelu(x))
    return x


def encode(net: Net, x: Tensor) -> dict[int, Tensor]:
    """The last feature of every resolution."""
    args = net[0]
    h = conv(net, "encoder.in_conv", x)
    kept = {h.shape[-1]: h}
    for n, (_, factor) in enumerate(blocks_of(args["enc_blocks"])):
        h = h + bottleneck(net, f"encoder.enc_blocks.{n}", h)
        if factor:
            b, c, r, _ = h.shape
            h = h.reshape(b, c, r // factor, factor, r // factor, factor).mean((3, 5))
        missing = width_of(args, h.shape[-1]) - h.shape[1]
        h = torch.cat([h, h.new_zeros(len(h), missing, *h.shape[2:])], dim=1)
        kept[h.shape[-1]] = h
    return kept


def walk(net: Net, kept: dict[int, Tensor] | None, latent, batch_size: int) -> tuple[Tensor, list[dict]]:
    """px_z and what each block computes. `latent(k, group)` gives z from its posterior and prior."""
    args, weights = net
    z_dim, dtype, states, groups = args["zdim"], weights["decoder.gain"].dtype, {}, []
    for j, r in enumerate(start_resolutions(args)):
        states[r] = weights[f"decoder.bias_xs.{j}"].repeat(batch_size, 1, 1, 1)
    for k, (r, mixed) in enumerate(blocks_of(args["dec_blocks"])):
        name, w, group = f"decoder.dec_blocks.{k}", width_of(args, r), {}
        h = states.get(r, torch.zeros(batch_size, w, r, r, dtype=dtype))
        if mixed:
            lower = states[mixed][:, :w]
            h = h + lower.repeat_interleave(r // mixed, dim=2).repeat_interleave(r // mixed, dim=3)
        f = bottleneck(net, f"{name}.prior", h)
        group["p_mean"], group["p_logsigma"], extra = f[:, :z_dim], f[:, z_dim : 2 * z_dim], f[:, 2 * z_dim :]
        if kept is not None:
            q = bottleneck(net, f"{name}.enc", torch.cat([h, kept[r]], dim=1))
            group["q_mean"], group["q_logsigma"] = q[:, :z_dim], q[:, z_dim:]
        group["z"] = latent(k, group)
        h = h + extra + conv(net, f"{name}.z_proj", group["z"])
        states[r] = h + bottleneck(net, f"{name}.resnet", h)
        groups.append(group)
    last = states[max(states)]
    return last * weights["decoder.gain"] + weights["decoder.bias"], groups


def output(net: Net, px_z: Tensor) -> Tensor:
    return conv(net, "decoder.out_net.out_conv", px_z)


# ---- likelihood


def mixture(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, K, H, W) mixture logits, and (B, 3, K, H, W) means, log-scales and coefficients."""
    b, channels, h, w = logits.shape
    k = channels // 10
    rest = logits[:, k:].reshape(b, 3, 3, k, h, w)  # image channel, kind of parameter
    return logits[:, :k], rest[:, :, 0], rest[:, :, 1].clamp(min=-7), torch.tanh(rest[:, :, 2])


def log_likelihood(args: dict, logits: Tensor, y: Tensor) -> Tensor:
    """(B,) log p(x | z), nats."""
    half, levels = (1 / 31, 15.5) if args["dataset"] == "ffhq_256" else (1 / 255, 127.5)
    mixing, means, s, c = mixture(logits)
    y = y.unsqueeze(2)  # (B, 3, 1, H, W)
    red, green = y[:, 0], y[:, 1]
    means = torch.stack(
        [means[:, 0], means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green], dim=1
    )
    v = torch.exp(-s)
    plus, minus, middle = v * (y - means + half), v * (y - means - half), v * (y - means)
    mass = torch.sigmoid(plus) - torch.sigmoid(minus)
    inside = torch.where(
        mass > 1e-5, torch.log(mass.clamp(min=1e-12)), middle - s - 2 * F.softplus(middle) - math.log(levels)
    )
    log_prob = torch.where(y < -0.999, plus - F.softplus(plus), torch.where(y > 0.999, -F.softplus(minus), inside))
    return torch.logsumexp(log_prob.sum(1) + torch.log_softmax(mixing, dim=1), dim=1).sum((1, 2))


def sample_image(logits: Tensor, u_mix: Tensor, u_logistic: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], from uniforms (B, K, H, W) and (B, 3, H, W)."""
    mixing, *parameters = mixture(logits)
    chosen = torch.argmax(mixing - torch.log(-torch.log(u_mix)), dim=1)  # (B, H, W)
    index = chosen[:, None, None].expand(-1, 3, -1, -1, -1)
    mean, s, c = (values.gather(2, index).squeeze(2) for values in parameters)
    v = mean + torch.exp(s) * (torch.log(u_logistic) - torch.log(1 - u_logistic))
    red = v[:, 0].clamp(-1, 1)
    green = (v[:, 1] + c[:, 0] * red).clamp(-1, 1)
    blue = (v[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
    return torch.stack([red, green, blue], dim=1)


def to_bytes(image: Tensor) -> Tensor:
    return ((image + 1) * 127.5).to(torch.uint8)


# ---- the whole model


def normal_log_density(z: Tensor, mean: Tensor, logsigma: Tensor) -> Tensor:
    return -0.5 * ((z - mean) / torch.exp(logsigma)) ** 2 - logsigma - 0.5 * math.log(2 * math.pi)


def kl_of(group: dict) -> Tensor:
    ratio = torch.exp(group["q_logsigma"]) ** 2 + (group["q_mean"] - group["p_mean"]) ** 2
    return group["p_logsigma"] - group["q_logsigma"] - 0.5 + ratio / (2 * torch.exp(group["p_logsigma"]) ** 2)


def forward(net: Net, pixels: Tensor, eps: list[Tensor]) -> dict:
    """All terms of the bound for bytes (B, 3, S, S)."""
    args, kept = net[0], encode(net, network_input(net[0], pixels).to(net[1]["decoder.gain"].dtype))
    px_z, groups = walk(net, kept, lambda k, g: g["q_mean"] + torch.exp(g["q_logsigma"]) * eps[k], len(pixels))
    logits = output(net, px_z)
    recon = -log_likelihood(args, logits, target(args, pixels))
    kl = [kl_of(group) for group in groups]  # each (B, Z, r, r)
    dimensions = pixels[0].numel()
    out = {
        "activations": kept,
        "groups": groups,
        "px_z": px_z,
        "logits": logits,
        "recon": recon,
        "distortion": recon / dimensions,
        "kl_all": torch.stack([each.sum((1, 2, 3)) for each in kl]),
        "kl_diag": torch.stack([each.sum((2, 3)).mean(0) for each in kl]),
    }
    out["rate"] = out["kl_all"].sum(0) / dimensions
    for kind in "qp":
        densities = [normal_log_density(g["z"], g[f"{kind}_mean"], g[f"{kind}_logsigma"]) for g in groups]
        out[f"log_{kind}"] = sum(density.sum((1, 2, 3)) for density in densities)
    out["nelbo"] = recon + out["kl_all"].sum(0)
    out["log_iw"] = -recon - out["log_q"] + out["log_p"]
    out["elbo"] = (out["distortion"] + out["rate"]).mean()  # what training minimizes: nats per dimension
    return out


def sample_prior(
    net: Net, eps: list[Tensor], temperature: float | list[float] = 1.0, given: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """px_z and logits. The first blocks take the given latents."""

    def latent(k: int, group: dict) -> Tensor:
        if k < len(given or []):
            return given[k]
        t = temperature[k] if isinstance(temperature, list) else temperature
        return group["p_mean"] + torch.exp(group["p_logsigma"] + math.log(t)) * eps[k]

    px_z, _ = walk(net, None, latent, len(eps[0]))
    return px_z, output(net, px_z)
