"""Efficient-VDVAE from the options and names of its reference release."""

import re
from typing import Any

from pipeline.models.efficient_vdvae import EfficientVDVAEConfig
from pipeline.models.likelihoods import LogisticMixtureLikelihood

SCALE_RULES = {"std": "softplus", "logstd": "exp"}
MIN_LOG_SCALE = -80.0
"""The release's -250 is the same: float32 ends before."""


def config_from_release(args: dict[str, Any]) -> EfficientVDVAEConfig:
    """The settings that describe the same network. The release lists the decoder's levels from the lowest up."""
    assert args["up_strides"] == args["down_strides"][::-1]
    assert set(args["up_n_blocks"] + args["down_n_blocks"]) == {args["up_n_blocks"][0]}
    assert args["up_mid_filters_ratio"] == args["down_mid_filters_ratio"][::-1]
    assert args["down_filters"][::-1] == args["up_skip_filters"]
    assert set(args["up_n_layers"] + args["down_n_layers"]) == {2}
    return EfficientVDVAEConfig(
        strides=args["up_strides"],
        encoder_widths=[args["input_conv_filters"], *args["up_filters"][:-1]],
        decoder_widths=args["down_filters"][::-1],
        encoder_blocks=args["up_n_blocks_per_res"],
        groups=[count + 1 for count in args["down_n_blocks_per_res"][::-1]],
        latent_channels=args["down_latent_variates"][::-1],
        bottleneck=args["up_mid_filters_ratio"],
        residual_blocks=args["up_n_blocks"][0],
        outer_kernel=1 if args["use_1x1_conv"] else 3,
        scale=SCALE_RULES[args["distribution_base"]],
        scale_beta=args["gradient_smoothing_beta"],
        residual_posterior=args["use_residual_distribution"],
        likelihood=LogisticMixtureLikelihood(
            num_components=args["num_output_mixtures"],
            bin_rule="vdvae" if args["num_bits"] == 8 else "efficient_vdvae_overlapping_5_bit",
            scale=SCALE_RULES[args["output_distribution_base"]],
            scale_beta=args["output_gradient_smoothing_beta"],
            min_log_scale=max(args["min_mol_logscale"], MIN_LOG_SCALE),
        ),
    )


def name_from_release(name: str, args: dict[str, Any]) -> str:
    """This project's name of a parameter of the release."""
    counts = [count + 1 for count in args["down_n_blocks_per_res"]]

    def plain(match: re.Match) -> str:
        return f"encoder.levels.{match[1]}.blocks.{match[2]}."

    def last(match: re.Match) -> str:
        return f"encoder.levels.{match[1]}.blocks.{args['up_n_blocks_per_res'][int(match[1])]}."

    def first_group(match: re.Match) -> str:
        return f"decoder.blocks.{sum(counts[: int(match[1])])}."

    def other_group(match: re.Match) -> str:
        return f"decoder.blocks.{sum(counts[: int(match[1])]) + 1 + int(match[2])}."

    rules = [
        (r"bottom_up\.input_conv\.", "encoder.stem."),
        (r"bottom_up\.levels_up\.(\d+)\.(\d+)\.residual_block\.", plain),
        (r"bottom_up\.levels_up_downsample\.(\d+)\.residual_block\.", last),
        (r"bottom_up\.levels_up_downsample\.(\d+)\.skip_projection\.", r"encoder.levels.\1.skip."),
        (r"bottom_up\.levels_up_downsample\.(\d+)\.pool\.ops\.0\.", r"encoder.levels.\1.pool."),
        (r"top_down\.trainable_h", "decoder.start"),
        (r"top_down\.output_conv\.", "decoder.output."),
        (r"top_down\.levels_down_upsample\.(\d+)\.", first_group),
        (r"top_down\.levels_down\.(\d+)\.(\d+)\.", other_group),
        (r"unpool\.scale_bias", "unpool.map"),
        (r"unpool\.ops\.0\.", "unpool.conv."),
        (r"residual_block\.", "residual."),
        (r"posterior_net\.", "posterior."),
        (r"posterior_layer\.projection\.", "posterior.1."),
        (r"prior_net\.0\.", "prior."),
        (r"prior_layer\.projection\.", "prior_parameters."),
        (r"z_projection\.", "project."),
        (r"convs\.(\d+)\.", lambda match: f"convs.{(int(match[1]) - 1) // 2}."),
    ]
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name
