"""Options and state dicts of NVAE's reference release, converted both ways."""

import pytest
import torch
from torch import nn

from pipeline.models.likelihoods import LogisticMixtureLikelihood, NormalLikelihood
from pipeline.models.nvae import NVAE
from pipeline.models.nvae_conversion import (
    config_from_reference,
    reference_parameter_names,
    state_dict_from_reference,
    state_dict_to_reference,
)
from pipeline.nn.layers import WNConv2d, find_convs
from tests.helpers.nvae_cases import NVAE_VARIANTS, build_nvae

COMMON = {
    "arch_instance": "res_mbconv",
    "num_latent_per_group": 20,
    "num_cell_per_cond_enc": 2,
    "num_cell_per_cond_dec": 2,
    "use_se": True,
    "res_dist": True,
    "min_groups_per_scale": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_cells": 2,
}


def reference_args(
    dataset: str, width: int, scales: int, groups: int, blocks: int = 1, flows: int = 1, **others
) -> dict:
    sizes = {"num_channels_enc": width, "num_channels_dec": width, "num_latent_scales": scales, "num_nf": flows}
    blocks = {"num_preprocess_blocks": blocks, "num_postprocess_blocks": blocks, "num_groups_per_scale": groups}
    return COMMON | sizes | blocks | {"dataset": dataset} | others


PUBLISHED = {
    "mnist": reference_args(
        "mnist", 32, 2, 10, blocks=2, flows=0, ada_groups=True, num_preprocess_cells=3, num_postprocess_cells=3
    ),
    "cifar10": reference_args("cifar10", 128, 1, 30),
    "celeba_64": reference_args("celeba_64", 64, 3, 20, ada_groups=True),
    "imagenet_32": reference_args("imagenet_32", 192, 1, 28),
    "celeba_256": reference_args(
        "celeba_256", 30, 5, 16, flows=2, ada_groups=True, min_groups_per_scale=4, num_x_bits=5
    ),
}


@pytest.mark.parametrize(
    ("recipe", "millions", "tensors", "groups", "convs", "norms", "start"),
    [
        ("mnist", 33.363, 1269, (5, 10), 255, 214, (256, 4, 4)),
        ("cifar10", 130.852, 2566, (30,), 610, 364, (256, 16, 16)),
        ("celeba_64", 153.281, 3072, (5, 10, 20), 730, 436, (512, 8, 8)),
        ("imagenet_32", 268.509, 2398, (28,), 570, 340, (384, 16, 16)),
        ("celeba_256", 330.799, 3746, (4, 4, 4, 8, 16), 986, 460, (960, 8, 8)),
    ],
)
def test_published_recipes_have_the_published_sizes(recipe, millions, tensors, groups, convs, norms, start):
    config, image_shape, border, bits = config_from_reference(PUBLISHED[recipe])
    with torch.device("meta"):
        model = NVAE(config, image_shape, border, bits)
    parameters = list(model.parameters())
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 3) == millions
    assert len(parameters) == tensors
    assert config.groups_per_scale == groups
    assert len(model.groups) == sum(groups)
    assert len(find_convs(model)) == convs
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    assert model.start.shape == start
    assert (border, bits) == (2 if recipe == "mnist" else 0, 5 if recipe == "celeba_256" else 8)


def test_options_that_old_releases_lack():
    args = reference_args("celeba_64", 8, 3, 4)
    del args["min_groups_per_scale"]
    config, image_shape, _, bits = config_from_reference(args)
    assert config.groups_per_scale == (4, 4, 4)
    assert config.likelihood == LogisticMixtureLikelihood(num_components=10)
    assert (image_shape, bits) == ((3, 64, 64), 8)
    assert config_from_reference(args | {"num_mixture_dec": 1})[0].likelihood == NormalLikelihood()


def test_reference_options_that_make_no_model_are_refused():
    with pytest.raises(ValueError, match="num_postprocess_blocks differ"):
        config_from_reference(reference_args("cifar10", 8, 1, 2) | {"num_postprocess_blocks": 2})
    with pytest.raises(ValueError, match="'tiny_pictures'"):
        config_from_reference(reference_args("tiny_pictures", 8, 1, 2))


@pytest.mark.parametrize("changes", NVAE_VARIANTS.values(), ids=NVAE_VARIANTS)
def test_state_dict_survives_the_round_trip(changes):
    model = build_nvae(**changes)
    state = model.state_dict()
    exported = state_dict_to_reference(state)
    returned = state_dict_from_reference(exported)
    assert list(returned) == list(state)
    assert all(torch.equal(returned[key], state[key]) for key in state)
    order = reference_parameter_names(model)
    assert order == [key for key in exported if key in set(order)]
    aliases = [key for key in exported if key.endswith("weight_normalized")]
    plain_convs = [conv for conv in find_convs(model).values() if not isinstance(conv, WNConv2d)]
    assert len(aliases) == len(plain_convs)
    assert all(exported[alias] is exported[alias.removesuffix("_normalized")] for alias in aliases)
    without = {key: tensor for key, tensor in exported.items() if key not in aliases}
    assert list(state_dict_from_reference(without)) == list(state)


def test_an_alias_that_differs_is_refused():
    exported = state_dict_to_reference(build_nvae().state_dict())
    alias = next(key for key in exported if key.endswith("weight_normalized"))
    exported[alias] = exported[alias] + 1
    with pytest.raises(ValueError, match=f"{alias} differs from the weight"):
        state_dict_from_reference(exported)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="'discriminator.weight' is not a key"):
        state_dict_from_reference({"discriminator.weight": torch.zeros(1)})


def test_the_unused_start_of_a_vanilla_reference_is_left_out():
    model = build_nvae(groups_per_scale=(1,))
    exported = state_dict_to_reference(model.state_dict()) | {"prior_ftr0": torch.zeros(16, 8, 8)}
    assert set(state_dict_from_reference(exported)) == set(model.state_dict())
