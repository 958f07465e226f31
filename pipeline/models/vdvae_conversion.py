"""Names of VDVAE's reference release (github.com/openai/vdvae), and the settings that its options describe.

Both state dicts have the same entries in the same order; only names differ.
"""

import re
from collections.abc import Iterable, Mapping
from math import isclose
from typing import Any

from torch import Tensor

from pipeline.models.likelihoods import LogisticMixtureLikelihood
from pipeline.models.release_network import Network, check_same
from pipeline.models.vdvae import VDVAEConfig
from pipeline.models.weights import problems_of

RULES = [
    ("encoder.in_conv.", "encoder.stem."),
    ("encoder.enc_blocks.{}.", "encoder.blocks.{}.bottleneck."),
    ("decoder.gain", "decoder.gain"),
    ("decoder.bias_xs.{}", "decoder.starts.{}"),
    ("decoder.bias", "decoder.bias"),
    ("decoder.dec_blocks.{}.enc.", "decoder.blocks.{}.posterior."),
    ("decoder.dec_blocks.{}.prior.", "decoder.blocks.{}.prior."),
    ("decoder.dec_blocks.{}.z_proj.", "decoder.blocks.{}.project."),
    ("decoder.dec_blocks.{}.resnet.", "decoder.blocks.{}.residual."),
    ("decoder.out_net.out_conv.", "decoder.output."),
]
"""(the release's prefix of a name, ours); {} stands for a number. What follows is a convolution, or nothing."""
CONVS = [(f"c{i + 1}.", f"convs.{i}.") for i in range(4)]
"""The convolutions of a block, by the release's names and ours."""

PIXELS = {
    "cifar10": (120.63838, 64.16736),
    "imagenet32": (116.2373, 69.37404),
    "imagenet64": (115.92961967, 69.37404),
    "ffhq_256": (112.8666757481, 69.84780273),
    "ffhq_1024": (0.4387 * 255, 0.2743 * 255),
}
"""Mean and standard deviation of pixels in 0..255, by data set of the release. Those of imagenet64 are as published."""
FIVE_BITS = "ffhq_256"
"""The data set whose likelihood has 5 bits, made of images of 8 bits."""


def state_dict_from_reference(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This project's state_dict from the reference release's.

    `expected`: the names, shapes and dtypes to arrive at, those of the model's own state_dict. Raises ValueError, with
    the release's names, where a tensor is missing, not known or does not fit.
    """
    names = keys_to_reference(expected)
    problems = problems_of(state, {names[ours]: tensor for ours, tensor in expected.items()})
    if problems:
        raise ValueError("; ".join(problems))
    return {ours: state[name] for ours, name in names.items()}


def state_dict_to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference release's state_dict from this project's."""
    return {name: state[ours] for ours, name in keys_to_reference(state).items()}


def keys_to_reference(our_keys: Iterable[str]) -> dict[str, str]:
    """{our key: reference key}, in the given order."""
    swapped = [[(ours, reference) for reference, ours in rules] for rules in (RULES, CONVS)]
    return {key: _converted(key, *swapped) for key in our_keys}


def name_from_reference(name: str) -> str:
    """This project's name of a parameter of the release."""
    return _converted(name, RULES, CONVS)


def _converted(name: str, *tables: list[tuple[str, str]]) -> str:
    """The name with the prefix that the first table names replaced, then that of the rest by the next table."""
    converted = ""
    for rules in tables:
        prefix, name = _replace_prefix(name, rules)
        converted += prefix
    return converted + name


def _replace_prefix(name: str, rules: list[tuple[str, str]]) -> tuple[str, str]:
    """(converted prefix of the name, empty if no rule matches; the rest of the name)."""
    for found, wanted in rules:
        match = re.match(re.escape(found).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return wanted.format(*match.groups()), name[match.end() :]
    return "", name


# ---- options --------------------------------------------------------------------------------------------------------


def config_from_reference(options: Mapping[str, Any]) -> VDVAEConfig:
    """The settings that describe the same network. Images are RGB, of 8 bits also for `ffhq_256`."""
    mean, std = PIXELS[options["dataset"]]
    rule = "vdvae_overlapping_5_bit" if options["dataset"] == FIVE_BITS else "vdvae"
    return VDVAEConfig(
        encoder_blocks=options["enc_blocks"],
        decoder_blocks=options["dec_blocks"],
        width=options["width"],
        widths=options["custom_width_str"],
        bottleneck=options["bottleneck_multiple"],
        latent_channels=options["zdim"],
        start_tensors_up_to=options["no_bias_above"],
        pixel_mean=mean,
        pixel_std=std,
        likelihood=LogisticMixtureLikelihood(num_components=options["num_mixtures"], bin_rule=rule),
    )


def options_for(network: Network) -> dict[str, Any]:
    """The options with which the reference release builds this network; the reverse of `config_from_reference`.

    Raises ValueError, naming the settings, for a network that no options describe.
    """
    config = network.config
    options = {
        "dataset": _dataset_of(config),
        "enc_blocks": config.encoder_blocks,
        "dec_blocks": config.decoder_blocks,
        "width": config.width,
        "custom_width_str": config.widths,
        "bottleneck_multiple": config.bottleneck,
        "zdim": config.latent_channels,
        "no_bias_above": config.start_tensors_up_to,
        "num_mixtures": getattr(config.likelihood, "num_components", 10),
    }
    described = Network(config_from_reference(options), (3, *network.image_shape[1:]), border=0, bits=8)
    comparable = network._replace(config=_without_rounding(config, described.config))
    check_same(comparable, described, options["dataset"])
    return options


def _without_rounding(config: VDVAEConfig, described: VDVAEConfig) -> VDVAEConfig:
    """`config`, with the release's pixel_mean and pixel_std, and its bin rule in place of `exact`, which differs from
    it in bins of probability below 1e-5 only.
    """
    pixels = {"pixel_mean": described.pixel_mean, "pixel_std": described.pixel_std}
    likelihood = config.likelihood
    if getattr(likelihood, "bin_rule", None) == "exact" and described.likelihood.bin_rule == "vdvae":
        likelihood = likelihood.model_copy(update={"bin_rule": "vdvae"})
    return config.model_copy(update=pixels | {"likelihood": likelihood})


def _dataset_of(config: VDVAEConfig) -> str:
    """The data set of the release whose pixels are standardized as this network's."""
    found = config.pixel_mean, config.pixel_std
    for dataset, numbers in PIXELS.items():
        if all(isclose(one, other, rel_tol=1e-6) for one, other in zip(found, numbers, strict=True)):
            return dataset
    known = ", ".join(f"{mean:g} and {std:g} ({name})" for name, (mean, std) in PIXELS.items())
    raise ValueError(
        f"model.pixel_mean={found[0]:g}, model.pixel_std={found[1]:g}; its code standardizes pixels by {known}"
    )
