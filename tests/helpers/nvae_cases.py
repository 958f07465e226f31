"""Small NVAEs with each of the architecture's options."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.likelihoods import BernoulliLikelihood, LogisticMixtureLikelihood, NormalLikelihood
from pipeline.models.nvae import NVAE, NVAEConfig
from pipeline.models.nvae_conversion import state_dict_from_reference
from pipeline.models.nvae_options import ReleaseOptions

SMALL_NVAE = {
    "groups_per_scale": (1, 2),
    "encoder_channels": 8,
    "decoder_channels": 8,
    "latent_channels": 3,
    "num_preprocess_cells": 1,
    "num_encoder_cells": 1,
    "num_decoder_cells": 1,
    "likelihood": LogisticMixtureLikelihood(num_components=2),
}
NVAE_VARIANTS = {
    "default": {},
    "flows": {"num_flows": 2},
    "no squeeze-excitation": {"squeeze_excitation": False},
    "absolute posterior": {"residual_posterior": False},
    "wider decoder": {"decoder_channels": 12},
    "two blocks": {"num_blocks": 2, "num_preprocess_cells": 2, "num_postprocess_cells": 1},
    "normal": {"likelihood": NormalLikelihood()},
    "bernoulli": {"likelihood": BernoulliLikelihood()},
    "vanilla": {"groups_per_scale": (1,)},
    "vanilla with flows": {"groups_per_scale": (1,), "num_flows": 1, "decoder_channels": 12},
    "res_bnswish": {"cells": "res_bnswish"},
    "mbconv_sep": {"cells": "mbconv_sep"},
}


def build_nvae(
    size: int = 16, channels: int = 3, bits: int = 8, border: int = 0, condition_size: int = 0, **changes
) -> NVAE:
    torch.manual_seed(0)
    return NVAE(NVAEConfig(**(SMALL_NVAE | changes)), (channels, size, size), border, bits, condition_size)


def nvae_from_reference(options: dict) -> NVAE:
    """The model that these options of the reference release describe, with new weights."""
    return NVAE(*ReleaseOptions(**options).network())


def load_reference(model: NVAE, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict of the reference release, of the model's own precision."""
    model.load_state_dict(state_dict_from_reference(state, model.state_dict()))
