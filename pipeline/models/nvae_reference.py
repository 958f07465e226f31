"""The options and state_dict keys of NVAE's reference release, and ours. Nothing else in the project knows them.

Both state dicts list their entries in the same order. The reference release keeps cells and combiners of a tower in
one flat list, and stores the three plain convolutions of an inverted residual cell twice, as `weight` and
`weight_normalized`.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.models.likelihoods import BernoulliLikelihood, Likelihood, LogisticMixtureLikelihood, NormalLikelihood
from pipeline.models.nvae import NVAE, NVAEConfig

# ---- options --------------------------------------------------------------------------------------------------------

BINARY_DATASETS = ("mnist", "omniglot")
BINARY_BORDER = 2


def config_from_reference(args: Mapping) -> tuple[NVAEConfig, tuple[int, int, int], int, int]:
    """(config, image_shape, border, bits) of the model that the reference release builds from these options.

    Options that old releases lack take the values they had then. Raises ValueError for a data set or combination
    unknown to us.
    """
    if args["num_preprocess_blocks"] != args["num_postprocess_blocks"]:
        raise ValueError(
            "num_preprocess_blocks and num_postprocess_blocks differ: the output would not have the input's size"
        )
    config = NVAEConfig(
        groups_per_scale=_groups_per_scale(args)[::-1],
        encoder_channels=args["num_channels_enc"],
        decoder_channels=args["num_channels_dec"],
        latent_channels=args["num_latent_per_group"],
        num_blocks=args["num_preprocess_blocks"],
        num_preprocess_cells=args["num_preprocess_cells"],
        num_postprocess_cells=args["num_postprocess_cells"],
        num_encoder_cells=args["num_cell_per_cond_enc"],
        num_decoder_cells=args["num_cell_per_cond_dec"],
        num_flows=args["num_nf"],
        squeeze_excitation=args["use_se"],
        residual_posterior=args["res_dist"],
        cells=args["arch_instance"],
        likelihood=_likelihood(args),
    )
    channels = 1 if args["dataset"] in BINARY_DATASETS else 3
    size = _image_size(args["dataset"])
    border = BINARY_BORDER if args["dataset"] in BINARY_DATASETS else 0
    return config, (channels, size, size), border, args.get("num_x_bits", 8)


def _groups_per_scale(args: Mapping) -> tuple[int, ...]:
    """Highest resolution first, as the reference counts. The minimum does not apply to the first entry."""
    groups = [args["num_groups_per_scale"]]
    for _ in range(args["num_latent_scales"] - 1):
        halved = max(args.get("min_groups_per_scale", 1), groups[-1] // 2)
        groups.append(halved if args.get("ada_groups", False) else groups[-1])
    return tuple(groups)


def _likelihood(args: Mapping) -> Likelihood:
    if args["dataset"] in BINARY_DATASETS:
        return BernoulliLikelihood()
    num_components = args.get("num_mixture_dec", 10)
    return NormalLikelihood() if num_components == 1 else LogisticMixtureLikelihood(num_components=num_components)


def _image_size(dataset: str) -> int:
    if dataset in (*BINARY_DATASETS, "cifar10"):
        return 32
    if dataset == "ffhq":
        return 256
    named = re.fullmatch(r"(?:celeba|imagenet|lsun_\w+)_(\d+)", dataset)
    if named is None:
        raise ValueError(f"unknown reference dataset {dataset!r}")
    return int(named[1])


# ---- state dict -----------------------------------------------------------------------------------------------------

# (reference, ours): beginnings of keys, where {} stands for a number
TOP_LEVEL = [
    ("prior_ftr0", "start"),
    ("stem.", "stem."),
    ("pre_process.{}.", "preprocess.{}."),
    ("enc_tower.{}.", "encoder.{}."),
    ("enc0.1.", "encoder_top."),
    ("enc_sampler.{}.", "posteriors.{}."),
    ("dec_sampler.{}.1.", "priors.{}."),
    ("nf_cells.{}.", "flows.{}."),
    ("stem_decoder.", "decoder_start."),
    ("dec_tower.{}.", "decoder.{}."),
    ("post_process.{}.", "postprocess.{}."),
    ("image_conditional.1.", "output."),
]
INSIDE = [
    ("conv.weight", "combine.weight"),
    ("conv.bias", "combine.bias"),
    ("conv.log_weight_norm", "combine.log_norm"),
    *((f"skip.conv_{i + 1}.", f"skip.convs.{i}.") for i in range(4)),
    ("skip.1.", "skip.conv."),
    ("se.se.0.", "se.squeeze."),
    ("se.se.2.", "se.excite."),
    ("_ops.{}.bn_act.", "branch.{}.bn_swish."),
    ("_ops.{}.bn.bn.", "branch.{}.bn_elu."),
    ("_ops.{}.conv_0.", "branch.{}.conv."),
    ("cell1.conv.convz.0.", "raster.expand."),
    ("cell1.conv.convz.2.", "raster.depthwise."),
    ("cell1.mu.conv_0.", "raster.shift."),
    ("cell2.conv.convz.0.", "mirrored.expand."),
    ("cell2.conv.convz.2.", "mirrored.depthwise."),
    ("cell2.mu.conv_0.", "mirrored.shift."),
]
TENSORS = [("log_weight_norm", "log_norm")]
ALIASED = re.compile(r"branch\.\d+\.(?:expand|depthwise|project)\.weight$")


def _inverted_residual(first: int) -> list[tuple[str, str]]:
    """Rules inside an inverted residual: its modules are numbered from 1 where an upsampling takes the number 0."""
    numbered = [
        (0, "bn", "bn_in"),
        (1, "conv.0", "expand"),
        (1, "conv.1", "bn_expand"),
        (2, "conv.0", "depthwise"),
        (2, "conv.1", "bn_depthwise"),
        (4, "bn", "bn_out"),
        (3, None, "project"),
    ]
    return [
        (f"_ops.{{}}.conv.{first + i}." + (f"{inner}." if inner else ""), f"branch.{{}}.{ours}.")
        for i, inner, ours in numbered
    ]


def import_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict from the reference release's.

    Raises ValueError for an unknown key, or an alias that differs from its weight.
    """
    for key in state:
        if key.endswith(".weight_normalized") and not torch.equal(state[key], state[key.removesuffix("_normalized")]):
            raise ValueError(f"{key} differs from the weight that it repeats: not a reference NVAE checkpoint")
    names = our_names(key for key in state if not key.endswith(".weight_normalized"))
    return {ours: state[reference] for reference, ours in names.items() if ours is not None}


def export_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference release's state_dict from ours, aliases included.

    A model with a single latent group has no learned start; the reference release would want an (unused) `prior_ftr0`
    there.
    """
    exported = {}
    for ours, reference in reference_names(state).items():
        exported[reference] = state[ours]
        if ALIASED.search(ours):
            exported[f"{reference}_normalized"] = state[ours]
    return exported


def reference_parameter_order(model: NVAE) -> list[str]:
    """The reference names of `model.parameters()`, which is the reference's order of parameters and optimizer slots."""
    return list(reference_names(name for name, _ in model.named_parameters()).values())


def our_names(reference_keys: Iterable[str]) -> dict[str, str | None]:
    """{reference key: our key}; None for what we leave out, the start of a decoder without tower."""
    keys = list(reference_keys)
    ups = {key.removesuffix("skip.1.weight") for key in keys if key.endswith(".skip.1.weight")}
    flat = {key: _renamed(key, ups, reference_first=True) for key in keys}
    nested = dict(zip(keys, _nested(list(flat.values())), strict=True))
    if not any(key.startswith("decoder.") for key in nested.values()) and "prior_ftr0" in nested:
        nested["prior_ftr0"] = None
    return nested


def reference_names(our_keys: Iterable[str]) -> dict[str, str]:
    """{our key: reference key}, in the order given."""
    keys = list(our_keys)
    flat = _flattened(keys)
    ups = {key.removesuffix("skip.conv.weight") for key in flat if key.endswith(".skip.conv.weight")}
    return {key: _renamed(short, ups, reference_first=False) for key, short in zip(keys, flat, strict=True)}


def _renamed(key: str, ups: set[str], reference_first: bool) -> str:
    """One key translated, towers flat on both sides. `ups`: how the keys of upsampling cells begin."""
    top, rest = _replaced(key, TOP_LEVEL, reference_first)
    if top is None:
        raise ValueError(f"{key!r} is no key of an NVAE state_dict")
    first = 1 if key.removesuffix(rest) in ups else 0
    inside, rest = _replaced(rest, INSIDE + _inverted_residual(first), reference_first)
    tensor, rest = _replaced(rest, TENSORS, reference_first)
    return top + (inside or "") + (tensor or "") + rest


def _replaced(key: str, rules: list[tuple[str, str]], reference_first: bool) -> tuple[str | None, str]:
    """(replaced beginning of the key, or None if no rule has it; the rest of the key)."""
    for rule in rules:
        source, target = rule if reference_first else rule[::-1]
        match = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return target.format(*match.groups()), key[match.end() :]
    return None, key


# ---- towers: flat there, by step here -------------------------------------------------------------------------------

TOWER_KEY = re.compile(r"(encoder|decoder)\.(\d+)\.(?:cells\.(\d+)|(combine))\.(.*)")
FLAT_TOWER_KEY = re.compile(r"(encoder|decoder)\.(\d+)\.(.*)")


def _nested(keys: list[str]) -> list[str]:
    """encoder.7.* -> encoder.2.cells.1.* or encoder.2.combine.*, as a combiner ends a step; flows.5.* -> flows.2.1.*"""
    combiners = {
        tower: sorted(
            {int(m[2]) for m in map(FLAT_TOWER_KEY.match, keys) if m and m[1] == tower and m[3].startswith("combine.")}
        )
        for tower in ("encoder", "decoder")
    }
    num_groups = len({key.split(".")[1] for key in keys if key.startswith("posteriors.")})
    num_flows = len({key.split(".")[1] for key in keys if key.startswith("flows.")})
    return [_nested_key(key, combiners, num_flows // max(num_groups, 1)) for key in keys]


def _nested_key(key: str, combiners: dict[str, list[int]], flows_per_group: int) -> str:
    if key.startswith("flows."):
        _, index, rest = key.split(".", 2)
        return f"flows.{int(index) // flows_per_group}.{int(index) % flows_per_group}.{rest}"
    match = FLAT_TOWER_KEY.match(key)
    if match is None:
        return key
    tower, index, rest = match[1], int(match[2]), match[3]
    step = bisect_left(combiners[tower], index)
    if rest.startswith("combine."):
        return f"{tower}.{step}.{rest}"
    first = combiners[tower][step - 1] + 1 if step else 0
    return f"{tower}.{step}.cells.{index - first}.{rest}"


def _flattened(keys: list[str]) -> list[str]:
    """The inverse of `_nested`."""
    matches = [match for match in map(TOWER_KEY.match, keys) if match]
    num_cells: dict[tuple[str, int], int] = {}
    for match in matches:
        step = match[1], int(match[2])
        num_cells[step] = max(num_cells.get(step, 0), int(match[3]) + 1 if match[3] else 0)
    flows_per_group = len({key.split(".")[2] for key in keys if key.startswith("flows.")})
    return [_flattened_key(key, num_cells, flows_per_group) for key in keys]


def _flattened_key(key: str, num_cells: dict[tuple[str, int], int], flows_per_group: int) -> str:
    if key.startswith("flows."):
        _, group, index, rest = key.split(".", 3)
        return f"flows.{int(group) * flows_per_group + int(index)}.{rest}"
    match = TOWER_KEY.match(key)
    if match is None:
        return key
    tower, step, cell, combine, rest = match.groups()
    before = sum(num_cells[tower, earlier] + 1 for earlier in range(int(step)))
    if combine:
        return f"{tower}.{before + num_cells[tower, int(step)]}.combine.{rest}"
    return f"{tower}.{before + int(cell)}.{rest}"
