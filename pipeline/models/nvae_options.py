"""The options of NVAE's reference release that its checkpoints hold: the network that they describe, and the reverse.

Options keep the release's names and defaults. They come from a file, so types and ranges are checked before anything
is built.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from pipeline.models.likelihoods import BernoulliLikelihood, Likelihood, LogisticMixtureLikelihood, NormalLikelihood
from pipeline.models.nvae import NVAEConfig
from pipeline.models.release_network import Network, check_same
from pipeline.nn.cells import CELLS
from pipeline.schema import Count, Layers, Section

BINARY_DATASETS = ("mnist", "omniglot")
BINARY_BORDER = 2
SIZED_DATASET = re.compile(r"(?:celeba|imagenet|lsun_[a-z]+)_([0-9]{1,4})")
DATASET_OF_SIZE = {32: "cifar10", 64: "celeba_64", 128: "lsun_bedroom_128", 256: "celeba_256"}
"""A data set of the release for color images of a size; its name is how a checkpoint states the size."""

Portion = Annotated[float, Field(ge=0, le=1)]


class ReleaseOptions(Section):
    """The options that decide the model or its training. Others, such as paths, are ignored.

    An option with a default may be missing: early releases did not have it, or it only matters for training.
    """

    model_config = ConfigDict(extra="ignore")

    dataset: str
    arch_instance: str
    num_latent_scales: Annotated[int, Field(ge=1, le=10)]
    num_groups_per_scale: Layers
    num_latent_per_group: Count
    ada_groups: bool = False
    min_groups_per_scale: Layers = 1
    num_channels_enc: Count
    num_channels_dec: Count
    num_preprocess_blocks: Layers
    num_preprocess_cells: Layers
    num_postprocess_blocks: Layers
    num_postprocess_cells: Layers
    num_cell_per_cond_enc: Layers
    num_cell_per_cond_dec: Layers
    num_nf: Annotated[int, Field(ge=0, le=100)]
    num_mixture_dec: Annotated[int, Field(ge=1, le=2**10)] = 10
    num_x_bits: Annotated[int, Field(ge=1, le=8)]
    use_se: bool
    res_dist: bool

    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 200
    """Per process."""
    num_process_per_node: Annotated[int, Field(ge=1, le=2**10)] = 1
    num_proc_node: Annotated[int, Field(ge=1, le=2**10)] = 1
    epochs: Annotated[int, Field(ge=1)] = 200
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    learning_rate_min: Annotated[float, Field(ge=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 3e-4
    weight_decay_norm: Annotated[float, Field(ge=0)] = 0.0
    weight_decay_norm_init: Annotated[float, Field(gt=0)] = 10.0
    weight_decay_norm_anneal: bool = False
    kl_anneal_portion: Portion = 0.3
    kl_const_portion: Portion = 1e-4
    kl_const_coeff: Portion = 1e-4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1

    @field_validator("dataset")
    @classmethod
    def _is_known(cls, dataset: str) -> str:
        if dataset not in (*BINARY_DATASETS, "cifar10", "ffhq") and not SIZED_DATASET.fullmatch(dataset):
            raise ValueError(f"unknown data set {dataset[:40]!r}: it does not say which images the model takes")
        return dataset

    @field_validator("arch_instance")
    @classmethod
    def _is_supported(cls, arch_instance: str) -> str:
        if arch_instance not in CELLS:
            raise ValueError(f"{arch_instance[:40]!r} is not supported; supported: {', '.join(CELLS)}")
        return arch_instance

    @model_validator(mode="after")
    def _makes_a_model(self) -> Self:
        if self.num_preprocess_blocks != self.num_postprocess_blocks:
            raise ValueError(
                "num_preprocess_blocks and num_postprocess_blocks differ: the output would not have the input's size"
            )
        if sum(self.groups_per_scale) == 1 and self.num_channels_enc != self.num_channels_dec:
            raise ValueError("num_channels_enc and num_channels_dec differ: with a single latent group they must not")
        return self

    @property
    def is_binary(self) -> bool:
        """Whether the images are binary: one channel, padded from 28x28 to 32x32."""
        return self.dataset in BINARY_DATASETS

    @property
    def image_size(self) -> int:
        """Height and width of the network's input, padding included."""
        sized = SIZED_DATASET.fullmatch(self.dataset)
        return int(sized[1]) if sized else {"ffhq": 256}.get(self.dataset, 32)

    @property
    def groups_per_scale(self) -> tuple[int, ...]:
        """Lowest resolution first."""
        return tuple(groups_of(self.num_latent_scales, self.num_groups_per_scale, self._minimum))[::-1]

    @property
    def _minimum(self) -> int | None:
        return self.min_groups_per_scale if self.ada_groups else None

    @property
    def likelihood(self) -> Likelihood:
        if self.is_binary:
            return BernoulliLikelihood()
        if self.num_mixture_dec == 1:
            return NormalLikelihood()
        return LogisticMixtureLikelihood(num_components=self.num_mixture_dec)

    def network(self) -> Network:
        """The network that the reference release builds from these options. Raises ValueError for one too deep."""
        config = NVAEConfig(
            groups_per_scale=self.groups_per_scale,
            encoder_channels=self.num_channels_enc,
            decoder_channels=self.num_channels_dec,
            latent_channels=self.num_latent_per_group,
            num_blocks=self.num_preprocess_blocks,
            num_preprocess_cells=self.num_preprocess_cells,
            num_postprocess_cells=self.num_postprocess_cells,
            num_encoder_cells=self.num_cell_per_cond_enc,
            num_decoder_cells=self.num_cell_per_cond_dec,
            num_flows=self.num_nf,
            squeeze_excitation=self.use_se,
            residual_posterior=self.res_dist,
            cells=self.arch_instance,
            likelihood=self.likelihood,
        )
        shape = (1 if self.is_binary else 3, self.image_size, self.image_size)
        return Network(config, shape, BINARY_BORDER if self.is_binary else 0, self.num_x_bits)


def groups_of(scales: int, first: int, minimum: int | None) -> Iterator[int]:
    """Groups per scale, highest resolution first. They halve, down to `minimum`, or stay where that is None.

    The minimum does not apply to the first entry.
    """
    groups = first
    for _ in range(scales):
        yield groups
        groups = groups if minimum is None else max(minimum, groups // 2)


def options_for(network: Network, dataset: str | None = None) -> dict[str, Any]:
    """The options from which the reference release builds this network. `dataset`: default by the images' size.

    Raises ValueError, naming the settings, for a network that no options describe.
    """
    config = network.config
    likelihood = config.likelihood
    if config.is_vanilla and config.encoder_channels != config.decoder_channels:
        raise ValueError(
            f"model.encoder_channels={config.encoder_channels}, model.decoder_channels={config.decoder_channels}: the "
            "release has models of a single latent group with equal widths only"
        )
    options = {
        "dataset": dataset or _dataset_for(network),
        "arch_instance": config.cells,
        **_group_options(config.groups_per_scale[::-1]),
        "num_latent_per_group": config.latent_channels,
        "num_channels_enc": config.encoder_channels,
        "num_channels_dec": config.decoder_channels,
        "num_preprocess_blocks": config.num_blocks,
        "num_preprocess_cells": config.num_preprocess_cells,
        "num_postprocess_blocks": config.num_blocks,
        "num_postprocess_cells": config.num_postprocess_cells,
        "num_cell_per_cond_enc": config.num_encoder_cells,
        "num_cell_per_cond_dec": config.num_decoder_cells,
        "num_nf": config.num_flows,
        "num_mixture_dec": {"logistic_mixture": getattr(likelihood, "num_components", 0), "normal": 1}.get(
            likelihood.name, 10
        ),
        "num_x_bits": network.bits,
        "use_se": config.squeeze_excitation,
        "res_dist": config.residual_posterior,
    }
    check_same(network, ReleaseOptions(**options).network(), options["dataset"])
    return options


def _group_options(groups: tuple[int, ...]) -> dict[str, Any]:
    """For groups per scale, highest resolution first."""
    for minimum in (None, *sorted({1, *groups})):
        if tuple(groups_of(len(groups), groups[0], minimum)) == groups:
            return {
                "num_latent_scales": len(groups),
                "num_groups_per_scale": groups[0],
                "ada_groups": minimum is not None,
                "min_groups_per_scale": minimum or 1,
            }
    raise ValueError(
        f"model.groups_per_scale={list(groups[::-1])}: the release has either equal numbers of groups, or half of "
        "them at each lower resolution, down to a minimum"
    )


def _dataset_for(network: Network) -> str:
    channels, size, _ = network.image_shape
    if (channels, size) == (1, 32):
        return "mnist"
    if channels == 3 and size in DATASET_OF_SIZE:
        return DATASET_OF_SIZE[size]
    known = ", ".join(map(str, DATASET_OF_SIZE))
    raise ValueError(
        f"the model takes images of {size}x{size} with {channels} channels, padding included; the release has models "
        f"for 28x28 with one channel, padded to 32x32, and for color images of {known} pixels"
    )


# ---- what the release calls the parts of its cells ------------------------------------------------------------------

_CONVS, _EXPAND_3, _EXPAND_6 = ["res_bnswish", "res_bnswish"], ["mconv_e3k5g0"], ["mconv_e6k5g0"]
_PARTS = {
    "res_mbconv": (_CONVS, _CONVS, _EXPAND_6, _EXPAND_3),
    "res_bnswish": (_CONVS, _CONVS, _CONVS, _CONVS),
    "res_bnelu": (["res_bnelu", "res_bnelu"],) * 4,
    "mbconv_sep": (_EXPAND_3, _EXPAND_6, _EXPAND_6, _EXPAND_3),
    "mbconv_sep11": (_EXPAND_3, ["mconv_e6k11g0"], ["mconv_e6k11g0"], _EXPAND_3),
    "mbconv_res": (_EXPAND_3, _EXPAND_6, _CONVS, _CONVS),
    "mbconv_den": (["mconv_e3k5g8"], _EXPAND_6, _EXPAND_6, ["mconv_e3k5g8"]),
    "res53_mbconv": (*[["res_bnswish5", "res_bnswish"]] * 2, _EXPAND_6, _EXPAND_3),
    "res35_mbconv": (*[["res_bnswish", "res_bnswish5"]] * 2, _EXPAND_6, _EXPAND_3),
    "res55_mbconv": (*[["res_bnswish5", "res_bnswish5"]] * 2, _EXPAND_6, _EXPAND_3),
}


def cell_operations(arch_instance: str) -> dict[str, list[str]]:
    """The entry `arch_instance` of a checkpoint: the operations of each kind of cell, in the release's words."""
    pre, enc, dec, post = _PARTS[arch_instance]
    kinds = {"enc": ("normal_enc", "down_enc"), "dec": ("normal_dec", "up_dec")}
    kinds |= {"pre": ("normal_pre", "down_pre"), "post": ("normal_post", "up_post")}
    operations = {"enc": enc, "dec": dec, "pre": pre, "post": post}
    return {kind: list(operations[part]) for part, names in kinds.items() for kind in names} | {"ar_nn": [""]}
