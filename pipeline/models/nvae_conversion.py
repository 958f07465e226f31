"""Converts state dicts between NVAE's reference release and this project.

Both state dicts have their entries in the same order. They differ in names, and in two more points. The reference
release keeps the cells and combiners of a tower in one flat list, where this project has one step per latent group. And
it stores the three plain convolutions of an inverted residual twice, as `weight` and as `weight_normalized`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.models.nvae import NVAE
from pipeline.models.weights import problems_of

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
COPY = "_normalized"
"""What the release appends to the name of a weight for its second copy."""
UNUSED = "prior_ftr0"
"""The learned start of the decoder, which a model with a single latent group does not use."""
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


def state_dict_from_reference(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This project's state_dict from the reference release's.

    `expected`: the names, shapes and dtypes to arrive at, those of the model's own state_dict. Second copies of weights
    may be missing, as in early releases. Raises ValueError, with the release's names, where a tensor is missing, not
    known or does not fit, or where a weight's second copy differs.
    """
    names = keys_to_reference(expected)
    copies = {f"{name}{COPY}": name for ours, name in names.items() if STORED_TWICE.search(ours)}
    single = {name: tensor for name, tensor in state.items() if name not in copies}
    if UNUSED not in names.values():
        single.pop(UNUSED, None)
    problems = problems_of(single, {names[ours]: tensor for ours, tensor in expected.items()})
    if not problems:
        copied = [(copy, name) for copy, name in copies.items() if copy in state]
        problems = [f"{copy!r} differs from {name!r}" for copy, name in copied if not _equal(state[copy], state[name])]
    if problems:
        raise ValueError("; ".join(problems))
    return {ours: state[name] for ours, name in names.items()}


def _equal(copy: Tensor, weight: Tensor) -> bool:
    return copy.shape == weight.shape and torch.equal(copy, weight)


def state_dict_to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference release's state_dict from this project's, with the weights that it stores twice.

    A model with a single latent group has no `prior_ftr0`; the release has one there, which it does not use.
    """
    exported = {}
    for ours, reference in keys_to_reference(state).items():
        exported[reference] = state[ours]
        if STORED_TWICE.search(ours):
            exported[f"{reference}{COPY}"] = state[ours]
    return exported


def reference_parameter_names(model: NVAE) -> list[str]:
    """The reference release's names of `model.parameters()`, in order. Its optimizer state has the same order."""
    return list(keys_to_reference(name for name, _ in model.named_parameters()).values())


def keys_to_reference(our_keys: Iterable[str]) -> dict[str, str]:
    """{our key: reference key}, in the given order."""
    keys = list(our_keys)
    flat = _flattened(keys)
    upsampling = {key.removesuffix("skip.conv.weight") for key in flat if key.endswith(".skip.conv.weight")}
    return {key: _convert(short, upsampling) for key, short in zip(keys, flat, strict=True)}


def _convert(key: str, upsampling: set[str]) -> str:
    """Convert one key of flat towers. `upsampling`: key prefixes of upsampling cells."""
    top, rest = _replace_prefix(key, TOP_LEVEL)
    assert top, f"{key!r} is not a key of an NVAE state_dict"
    first = 1 if key.removesuffix(rest) in upsampling else 0
    inside, rest = _replace_prefix(rest, WITHIN_MODULE + _inverted_residual(first))
    tensor, rest = _replace_prefix(rest, TENSOR_NAMES)
    return top + inside + tensor + rest


def _replace_prefix(key: str, rules: list[tuple[str, str]]) -> tuple[str, str]:
    """(converted prefix of the key, empty if no rule matches; the rest of the key)."""
    for reference, ours in rules:
        match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return reference.format(*match.groups()), key[match.end() :]
    return "", key


# ---- towers: flat lists in the reference release, steps here --------------------------------------------------------

TOWER_KEY = re.compile(r"(encoder|decoder)\.(\d+)\.(?:cells\.(\d+)|(combine))\.(.*)")


def _flattened(keys: list[str]) -> list[str]:
    """encoder.2.cells.1.* and encoder.2.combine.* -> encoder.7.*; flows.2.1.* -> flows.5.*. A combiner ends a step."""
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
