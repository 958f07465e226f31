"""The layout of the NVAE reference release: towers, names, shapes and registration order, from its options.

Part of the restatement of NVAE (nvae_restatement.py); no module of `pipeline` is imported.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BINARY = ("mnist", "omniglot")
CONV = ("conv", "bnswish", (1, 1))  # a cell's branch: two (activation, 3x3 convolution) with these dilations ...
MB6, MB3 = (
    ("mb", 6, 5, None),
    ("mb", 3, 5, None),
)  # ... or an inverted residual: expansion, kernel, groups (None: depthwise)
BRANCHES = {
    "res_mbconv": {"pre": CONV, "enc": CONV, "dec": MB6, "post": MB3},
    "res_bnswish": dict.fromkeys(("pre", "enc", "dec", "post"), CONV),
    "res_bnelu": dict.fromkeys(("pre", "enc", "dec", "post"), ("conv", "bnelu", (1, 1))),
    "mbconv_sep": {"pre": MB3, "enc": MB6, "dec": MB6, "post": MB3},
    "mbconv_sep11": {"pre": MB3, "enc": ("mb", 6, 11, None), "dec": ("mb", 6, 11, None), "post": MB3},
    "res53_mbconv": dict.fromkeys(("pre", "enc"), ("conv", "bnswish", (2, 1))) | {"dec": MB6, "post": MB3},
    "res35_mbconv": dict.fromkeys(("pre", "enc"), ("conv", "bnswish", (1, 2))) | {"dec": MB6, "post": MB3},
    "res55_mbconv": dict.fromkeys(("pre", "enc"), ("conv", "bnswish", (2, 2))) | {"dec": MB6, "post": MB3},
    "mbconv_res": {"pre": MB3, "enc": MB6, "dec": CONV, "post": CONV},
    "mbconv_den": {"pre": ("mb", 3, 5, 8), "enc": MB6, "dec": MB6, "post": ("mb", 3, 5, 8)},
}


# ---- structure


def image_shape(args: dict) -> tuple[int, int, int]:
    name = args["dataset"]
    size = {"mnist": 32, "omniglot": 32, "cifar10": 32, "ffhq": 256}.get(name) or int(name.rsplit("_", 1)[1])
    return (1 if name in BINARY else 3), size, size


def groups_per_scale(args: dict) -> list[int]:
    """Latent groups of each scale, from the highest resolution to the lowest."""
    count, counts = args["num_groups_per_scale"], []
    for _ in range(args["num_latent_scales"]):
        counts.append(count)
        if args["ada_groups"]:
            count = max(args["min_groups_per_scale"], count // 2)
    return counts


def is_vanilla(args: dict) -> bool:
    return args["num_latent_scales"] == 1 and args["num_groups_per_scale"] == 1


def top_multiplier(args: dict) -> int:
    return 2 ** (args["num_preprocess_blocks"] + args["num_latent_scales"] - 1)


def latent_scales(args: dict) -> list[int]:
    """Channel multiplier of every latent group, in the order of sampling (lowest resolution first)."""
    top = top_multiplier(args)
    return [top // 2**i for i, count in enumerate(reversed(groups_per_scale(args))) for _ in range(count)]


def latent_shapes(args: dict) -> list[tuple[int, int, int]]:
    size = image_shape(args)[1]
    return [(args["num_latent_per_group"], size // m, size // m) for m in latent_scales(args)]


def pre_process(args: dict) -> Iterator[tuple[str, int]]:
    """(kind of cell, channel multiplier of its input), in order."""
    for block in range(args["num_preprocess_blocks"]):
        yield from [("normal", 2**block)] * (args["num_preprocess_cells"] - 1)
        yield "down", 2**block


def enc_tower(args: dict) -> Iterator[tuple[str, int]]:
    counts = groups_per_scale(args)
    for scale, count in enumerate([] if is_vanilla(args) else counts):
        m, last_scale = 2 ** (args["num_preprocess_blocks"] + scale), scale == len(counts) - 1
        for group in range(count):
            yield from [("normal", m)] * args["num_cell_per_cond_enc"]
            if not (last_scale and group == count - 1):
                yield "combiner", m
        if not last_scale:
            yield "down", m


def dec_tower(args: dict) -> Iterator[tuple[str, int]]:
    counts = [] if is_vanilla(args) else groups_per_scale(args)[::-1]
    for scale, count in enumerate(counts):
        m = top_multiplier(args) // 2**scale
        for group in range(count):
            if (scale, group) != (0, 0):
                yield from [("normal", m)] * args["num_cell_per_cond_dec"]
            yield "combiner", m
        if scale < len(counts) - 1:
            yield "up", m


def post_process(args: dict) -> Iterator[tuple[str, int]]:
    for block in range(args["num_postprocess_blocks"]):
        m = 2 ** (args["num_preprocess_blocks"] - block)
        yield "up", m
        yield from [("normal", m // 2)] * (args["num_postprocess_cells"] - 1)


# ---- names and shapes


def parameter_shapes(args: dict) -> dict[str, tuple[int, ...]]:
    """Every entry of the reference's state dict and its shape, in registration order, `weight_normalized` included."""
    shapes: dict[str, tuple[int, ...]] = {}
    ce, cd, nz, top = (
        args["num_channels_enc"],
        args["num_channels_dec"],
        args["num_latent_per_group"],
        top_multiplier(args),
    )
    channels, size, _ = image_shape(args)
    shapes["prior_ftr0"] = (top * cd, size // top, size // top)
    _wn(shapes, "stem", channels, ce, 3)
    for n, (kind, m) in enumerate(pre_process(args)):
        _cell_shapes(shapes, f"pre_process.{n}", args, kind, "pre", ce * m)
    for n, (kind, m) in enumerate(enc_tower(args)):
        if kind == "combiner":
            _wn(shapes, f"enc_tower.{n}.conv", cd * m, ce * m, 1)
        else:
            _cell_shapes(shapes, f"enc_tower.{n}", args, kind, "enc", ce * m)
    _wn(shapes, "enc0.1", ce * top, ce * top, 1)
    for k, m in enumerate(latent_scales(args)):
        _wn(shapes, f"enc_sampler.{k}", ce * m, 2 * nz, 3)
    for k, m in enumerate(latent_scales(args)[1:]):
        _wn(shapes, f"dec_sampler.{k}.1", cd * m, 2 * nz, 1)
    for flow in range(args["num_nf"] * len(latent_scales(args))):
        for cell in (f"nf_cells.{flow}.cell1", f"nf_cells.{flow}.cell2"):
            _wn(shapes, f"{cell}.conv.convz.0", nz, 6 * nz, 3, bias=False)
            _wn(shapes, f"{cell}.conv.convz.2", 1, 6 * nz, 5, bias=False)
            _wn(shapes, f"{cell}.mu.conv_0", 6 * nz, nz, 1)
    if is_vanilla(args):
        _wn(shapes, "stem_decoder", nz, top * ce, 1)
    for n, (kind, m) in enumerate(dec_tower(args)):
        if kind == "combiner":
            _wn(shapes, f"dec_tower.{n}.conv", cd * m + nz, cd * m, 1)
        else:
            _cell_shapes(shapes, f"dec_tower.{n}", args, kind, "dec", cd * m)
    for n, (kind, m) in enumerate(post_process(args)):
        _cell_shapes(shapes, f"post_process.{n}", args, kind, "post", cd * m)
    outputs = 1 if args["dataset"] in BINARY else 6 if args["num_mixture_dec"] == 1 else 10 * args["num_mixture_dec"]
    _wn(shapes, "image_conditional.1", cd, outputs, 3)
    return shapes


def _wn(shapes: dict, name: str, c_in: int, c_out: int, kernel: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (c_out, c_in, kernel, kernel)
    if bias:
        shapes[f"{name}.bias"] = (c_out,)
    shapes[f"{name}.log_weight_norm"] = (c_out, 1, 1, 1)


def _plain(shapes: dict, name: str, c_in: int, c_out: int, kernel: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.weight_normalized"] = (c_out, c_in, kernel, kernel)


def _bn(shapes: dict, name: str, channels: int) -> None:
    for entry in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.{entry}"] = (channels,)
    shapes[f"{name}.num_batches_tracked"] = ()


def _cell_shapes(shapes: dict, name: str, args: dict, kind: str, role: str, c_in: int) -> None:
    c_out = {"normal": c_in, "down": 2 * c_in, "up": c_in // 2}[kind]
    if kind == "down":
        for i, part in enumerate([c_out // 4] * 3 + [c_out - 3 * (c_out // 4)], start=1):
            _wn(shapes, f"{name}.skip.conv_{i}", c_in, part, 1)
    if kind == "up":
        _wn(shapes, f"{name}.skip.1", c_in, c_out, 1, bias=False)
    branch = BRANCHES[args["arch_instance"]][role]
    if branch[0] == "conv":
        for i, width in enumerate((c_in, c_out)):
            _bn(shapes, f"{name}._ops.{i}." + {"bnswish": "bn_act", "bnelu": "bn.bn"}[branch[1]], width)
            _wn(shapes, f"{name}._ops.{i}.conv_0", width, c_out, 3)
    else:
        _, expansion, kernel, groups = branch
        hidden, j = round(c_in * expansion), 1 if kind == "up" else 0
        _bn(shapes, f"{name}._ops.0.conv.{j}.bn", c_in)
        _plain(shapes, f"{name}._ops.0.conv.{j + 1}.conv.0", c_in, hidden, 1)
        _bn(shapes, f"{name}._ops.0.conv.{j + 1}.conv.1", hidden)
        _plain(shapes, f"{name}._ops.0.conv.{j + 2}.conv.0", hidden // (groups or hidden), hidden, kernel)
        _bn(shapes, f"{name}._ops.0.conv.{j + 2}.conv.1", hidden)
        _plain(shapes, f"{name}._ops.0.conv.{j + 3}", hidden, c_out, 1)
        _bn(shapes, f"{name}._ops.0.conv.{j + 4}.bn", c_out)
    if args["use_se"]:
        squeezed = max(c_out // 16, 4)
        for layer, shape in (("0", (squeezed, c_out)), ("2", (c_out, squeezed))):
            shapes[f"{name}.se.se.{layer}.weight"], shapes[f"{name}.se.se.{layer}.bias"] = shape, shape[:1]


def random_state(args: dict, seed: int) -> dict[str, Tensor]:
    """Random float64 weights that keep activations moderate; every entry differs from what an initializer gives."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(args).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("weight_normalized"):
            state[name] = state[name.removesuffix("_normalized")]
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(17)
        elif name.endswith("running_var"):
            state[name] = noise.exp()
        elif name.endswith("log_weight_norm"):
            state[name] = 0.2 * noise - 0.3
        elif len(shape) in (2, 4):
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = 0.5 * noise + (1.0 if ".bn" in name or "conv.1.weight" in name else 0.0)
    return state


def parameter_order(args: dict) -> list[str]:
    """Names of the parameters, each once, in the order of the optimizer's state."""
    others = ("running_mean", "running_var", "num_batches_tracked", "weight_normalized")
    return [name for name in parameter_shapes(args) if not name.endswith(others)]
