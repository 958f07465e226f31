"""Converts options and state dicts between NVAE's reference release and this project.

Both state dicts have their entries in the same order. They differ in names, and in two more points. The reference
release keeps the cells and combiners of a tower in one flat list, where this project has one step per latent group. And
it stores the three plain convolutions of an inverted residual twice, as `weight` and as `weight_normalized`.
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


def config_from_reference(options: Mapping) -> tuple[NVAEConfig, tuple[int, int, int], int, int]:
    """(config, image_shape, border, bits) of the model that the reference release builds from these options.

    Options that older releases did not have take the value of their time. Raises ValueError for an unsupported data
    set or combination.
    """
    if options["num_preprocess_blocks"] != options["num_postprocess_blocks"]:
        raise ValueError(
            "num_preprocess_blocks and num_postprocess_blocks differ: the output would not have the input's size"
        )
    config = NVAEConfig(
        groups_per_scale=_groups_per_scale(options)[::-1],
        encoder_channels=options["num_channels_enc"],
        decoder_channels=options["num_channels_dec"],
        latent_channels=options["num_latent_per_group"],
        num_blocks=options["num_preprocess_blocks"],
        num_preprocess_cells=options["num_preprocess_cells"],
        num_postprocess_cells=options["num_postprocess_cells"],
        num_encoder_cells=options["num_cell_per_cond_enc"],
        num_decoder_cells=options["num_cell_per_cond_dec"],
        num_flows=options["num_nf"],
        squeeze_excitation=options["use_se"],
        residual_posterior=options["res_dist"],
        cells=options["arch_instance"],
        likelihood=_likelihood(options),
    )
    channels = 1 if options["dataset"] in BINARY_DATASETS else 3
    size = _image_size(options["dataset"])
    border = BINARY_BORDER if options["dataset"] in BINARY_DATASETS else 0
    return config, (channels, size, size), border, options.get("num_x_bits", 8)


def _groups_per_scale(options: Mapping) -> tuple[int, ...]:
    """Highest resolution first. The minimum does not apply to the first entry."""
    groups = [options["num_groups_per_scale"]]
    for _ in range(options["num_latent_scales"] - 1):
        halved = max(options.get("min_groups_per_scale", 1), groups[-1] // 2)
        groups.append(halved if options.get("ada_groups", False) else groups[-1])
    return tuple(groups)


def _likelihood(options: Mapping) -> Likelihood:
    if options["dataset"] in BINARY_DATASETS:
        return BernoulliLikelihood()
    num_components = options.get("num_mixture_dec", 10)
    return NormalLikelihood() if num_components == 1 else LogisticMixtureLikelihood(num_components=num_components)


def _image_size(dataset: str) -> int:
    if dataset in (*BINARY_DATASETS, "cifar10"):
        return 32
    if dataset == "ffhq":
        return 256
    match = re.fullmatch(r"(?:celeba|imagenet|lsun_\w+)_(\d+)", dataset)
    if match is None:
        raise ValueError(f"unknown reference dataset {dataset!r}")
    return int(match[1])


# ---- state dict -----------------------------------------------------------------------------------------------------

# (reference, ours): prefixes of keys; {} stands for a number
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
WITHIN_MODULE = [
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
TENSOR_NAMES = [("log_weight_norm", "log_norm")]
STORED_TWICE = re.compile(r"branch\.\d+\.(?:expand|depthwise|project)\.weight$")


def _inverted_residual(first: int) -> list[tuple[str, str]]:
    """Rules for the modules of an inverted residual, numbered from `first`: 1 if it upsamples, else 0."""
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


def state_dict_from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This project's state_dict from the reference release's.

    Raises ValueError for an unknown key, and for a weight whose second copy differs.
    """
    for key in state:
        if key.endswith(".weight_normalized") and not torch.equal(state[key], state[key.removesuffix("_normalized")]):
            raise ValueError(f"{key} differs from the weight that it repeats: not a reference NVAE checkpoint")
    keys = keys_from_reference(key for key in state if not key.endswith(".weight_normalized"))
    return {ours: state[reference] for reference, ours in keys.items() if ours is not None}


def state_dict_to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference release's state_dict from this project's, with the weights that it stores twice.

    One key is missing for a model with a single latent group: `prior_ftr0`, which the reference release does not use.
    """
    exported = {}
    for ours, reference in keys_to_reference(state).items():
        exported[reference] = state[ours]
        if STORED_TWICE.search(ours):
            exported[f"{reference}_normalized"] = state[ours]
    return exported


def reference_parameter_names(model: NVAE) -> list[str]:
    """The reference release's names of `model.parameters()`, in order. Its optimizer state has the same order."""
    return list(keys_to_reference(name for name, _ in model.named_parameters()).values())


def keys_from_reference(reference_keys: Iterable[str]) -> dict[str, str | None]:
    """{reference key: our key}. None for the learned start of a decoder without a tower, which is not used."""
    keys = list(reference_keys)
    upsampling = {key.removesuffix("skip.1.weight") for key in keys if key.endswith(".skip.1.weight")}
    flat = {key: _convert(key, upsampling, to_ours=True) for key in keys}
    nested = dict(zip(keys, _nested(list(flat.values())), strict=True))
    if not any(key.startswith("decoder.") for key in nested.values()) and "prior_ftr0" in nested:
        nested["prior_ftr0"] = None
    return nested


def keys_to_reference(our_keys: Iterable[str]) -> dict[str, str]:
    """{our key: reference key}, in the given order."""
    keys = list(our_keys)
    flat = _flattened(keys)
    upsampling = {key.removesuffix("skip.conv.weight") for key in flat if key.endswith(".skip.conv.weight")}
    return {key: _convert(short, upsampling, to_ours=False) for key, short in zip(keys, flat, strict=True)}


def _convert(key: str, upsampling: set[str], to_ours: bool) -> str:
    """Convert one key, with flat towers on both sides. `upsampling`: key prefixes of upsampling cells."""
    top, rest = _replace_prefix(key, TOP_LEVEL, to_ours)
    if top is None:
        raise ValueError(f"{key!r} is not a key of an NVAE state_dict")
    first = 1 if key.removesuffix(rest) in upsampling else 0
    inside, rest = _replace_prefix(rest, WITHIN_MODULE + _inverted_residual(first), to_ours)
    tensor, rest = _replace_prefix(rest, TENSOR_NAMES, to_ours)
    return top + (inside or "") + (tensor or "") + rest


def _replace_prefix(key: str, rules: list[tuple[str, str]], to_ours: bool) -> tuple[str | None, str]:
    """(converted prefix of the key, or None if no rule matches; the rest of the key)."""
    for rule in rules:
        source, target = rule if to_ours else rule[::-1]
        match = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return target.format(*match.groups()), key[match.end() :]
    return None, key


# ---- towers: flat lists in the reference release, steps here --------------------------------------------------------

TOWER_KEY = re.compile(r"(encoder|decoder)\.(\d+)\.(?:cells\.(\d+)|(combine))\.(.*)")
FLAT_TOWER_KEY = re.compile(r"(encoder|decoder)\.(\d+)\.(.*)")


def _nested(keys: list[str]) -> list[str]:
    """encoder.7.* -> encoder.2.cells.1.* or encoder.2.combine.*; flows.5.* -> flows.2.1.*. A combiner ends a step."""
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
