"""Names of VDVAE's reference release, and the settings that its options describe.

Both state dicts have the same entries in the same order; only names differ.
"""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.models.likelihoods import LogisticMixtureLikelihood
from pipeline.models.vdvae import VDVAEConfig

RULES = [
    (r"^encoder\.in_conv\.", "encoder.stem."),
    (r"^encoder\.enc_blocks\.(\d+)\.", r"encoder.blocks.\1.bottleneck."),
    (r"^decoder\.dec_blocks\.(\d+)\.enc\.", r"decoder.blocks.\1.posterior."),
    (r"^decoder\.dec_blocks\.(\d+)\.prior\.", r"decoder.blocks.\1.prior."),
    (r"^decoder\.dec_blocks\.(\d+)\.z_proj\.", r"decoder.blocks.\1.project."),
    (r"^decoder\.dec_blocks\.(\d+)\.resnet\.", r"decoder.blocks.\1.residual."),
    (r"^decoder\.bias_xs\.", "decoder.starts."),
    (r"^decoder\.out_net\.out_conv\.", "decoder.output."),
    (r"\.c([1-4])\.", lambda match: f".convs.{int(match[1]) - 1}."),
]
"""(pattern of the release's name, ours), applied one after the other."""

PIXELS = {
    "cifar10": (120.63838, 64.16736),
    "imagenet32": (116.2373, 69.37404),
    "imagenet64": (115.92961967, 69.37404),
    "ffhq_256": (112.8666757481, 69.84780273),
    "ffhq_1024": (0.4387 * 255, 0.2743 * 255),
}
"""Mean and standard deviation of pixels in 0..255, by data set of the release. Those of imagenet64 are as published."""


def name_from_reference(name: str) -> str:
    """This project's name of a parameter of the release."""
    for pattern, ours in RULES:
        name = re.sub(pattern, ours, name)
    return name


def config_from_reference(options: Mapping[str, Any]) -> VDVAEConfig:
    """The settings that describe the same network. Images are RGB, of 8 bits also for `ffhq_256`."""
    mean, std = PIXELS[options["dataset"]]
    rule = "vdvae_overlapping_5_bit" if options["dataset"] == "ffhq_256" else "vdvae"
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
