"""Options and state dicts of NVAE's reference release, converted both ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.models.likelihoods import BernoulliLikelihood, LogisticMixtureLikelihood, NormalLikelihood
from pipeline.models.nvae import NVAE
from pipeline.models.nvae_conversion import (
    reference_parameter_names,
    state_dict_from_reference,
    state_dict_to_reference,
)
from pipeline.models.nvae_options import DATASET_OF_SIZE, ReleaseOptions, options_for
from pipeline.models.release_network import Network
from pipeline.nn.cells import CELLS
from pipeline.nn.layers import WNConv2d, find_convs
from tests.helpers.nvae_cases import NVAE_VARIANTS, build_nvae

COMMON = {
    "num_x_bits": 8,
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
    config, image_shape, border, bits = ReleaseOptions(**PUBLISHED[recipe]).network()
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
    config, image_shape, _, bits = ReleaseOptions(**args).network()
    assert config.groups_per_scale == (4, 4, 4)
    assert config.likelihood == LogisticMixtureLikelihood(num_components=10)
    assert (image_shape, bits) == ((3, 64, 64), 8)
    assert ReleaseOptions(**args | {"num_mixture_dec": 1}).likelihood == NormalLikelihood()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_postprocess_blocks": 2}, "num_postprocess_blocks differ"),
        ({"dataset": "tiny_pictures"}, "'tiny_pictures'"),
        ({"dataset": "celeba_99999"}, "'celeba_99999'"),
        ({"arch_instance": "res_elu"}, "'res_elu' is not supported"),
        ({"num_groups_per_scale": 1, "num_channels_dec": 4}, "num_channels_dec differ"),
        ({"num_latent_scales": 10**9}, "num_latent_scales"),
        ({"num_channels_enc": "8"}, "num_channels_enc"),
        ({"num_channels_enc": 10**9}, "num_channels_enc"),
        ({"num_groups_per_scale": -1}, "num_groups_per_scale"),
        ({"use_se": 1}, "use_se"),
        ({"num_mixture_dec": 0}, "num_mixture_dec"),
        ({"num_x_bits": 9}, "num_x_bits"),
    ],
)
def test_reference_options_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReleaseOptions(**reference_args("cifar10", 8, 1, 2) | changes)


@pytest.mark.parametrize("name", sorted(reference_args("cifar10", 8, 1, 2).keys() - {"min_groups_per_scale"}))
def test_an_option_that_decides_the_model_has_to_be_there(name):
    args = reference_args("cifar10", 8, 1, 2)
    del args[name]
    with pytest.raises(ValueError, match=name):
        ReleaseOptions(**args)


# ---- the options of a network of ours


@st.composite
def networks(draw) -> dict:
    """Options of the release, of any model that this project has as well."""
    scales = draw(st.integers(1, 4))
    blocks, few = draw(st.integers(1, 2)), st.integers(1, 3)
    names = ["mnist", *DATASET_OF_SIZE.values()]
    groups, flows = draw(st.integers(2, 9)), draw(st.integers(0, 2))
    args = reference_args(draw(st.sampled_from(names)), 4, scales, groups, blocks, flows)
    own = {name: draw(few) for name in ("num_preprocess_cells", "num_postprocess_cells", "num_cell_per_cond_enc")}
    choices = {"use_se": st.booleans(), "res_dist": st.booleans(), "ada_groups": st.booleans(),
               "min_groups_per_scale": few, "num_mixture_dec": few, "num_x_bits": st.integers(5, 8),
               "arch_instance": st.sampled_from(sorted(CELLS)), "num_channels_dec": few}  # fmt: skip
    return args | own | {name: draw(choice) for name, choice in choices.items()}


@given(networks())
def test_a_network_is_described_by_options_that_make_it_again(args):
    network = ReleaseOptions(**args).network()
    assert ReleaseOptions(**options_for(network)).network() == network


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 16}, "16x16 with 3 channels"),
        ({"channels": 1, "likelihood": NormalLikelihood()}, r"model.likelihood.name=normal .*data.pad=0 \(it has 2\)"),
        ({"channels": 1, "border": 2, "likelihood": BernoulliLikelihood()}, None),
        ({"border": 2}, "data.pad"),
        (
            {"likelihood": LogisticMixtureLikelihood(num_components=2, bin_rule="exact")},
            "model.likelihood.bin_rule=exact",
        ),
        ({"likelihood": LogisticMixtureLikelihood(num_components=1)}, "model.likelihood.name"),
        ({"likelihood": NormalLikelihood(sigma=0.5)}, r"model.likelihood.sigma=0.5 \(it has null\)"),
        ({"groups_per_scale": (2, 1)}, None),
        ({"groups_per_scale": (1, 5)}, "model.groups_per_scale"),
        ({"groups_per_scale": (2, 2, 5)}, None),
    ],
)
def test_what_no_options_describe_is_refused_by_name(changes, message):
    model = build_nvae(**{"size": 32} | changes)
    network = Network(model.config, model.image_shape, model.border, model.bits)
    if message is None:
        assert ReleaseOptions(**options_for(network)).network() == network
        return
    with pytest.raises(ValueError, match=message):
        options_for(network)


# ---- state dicts


@pytest.mark.parametrize("changes", NVAE_VARIANTS.values(), ids=NVAE_VARIANTS)
def test_state_dict_survives_the_round_trip(changes):
    model = build_nvae(**changes)
    state = model.state_dict()
    exported = state_dict_to_reference(state)
    returned = state_dict_from_reference(exported, state)
    assert list(returned) == list(state)
    assert all(torch.equal(returned[key], state[key]) for key in state)
    order = reference_parameter_names(model)
    assert order == [key for key in exported if key in set(order)]
    aliases = [key for key in exported if key.endswith("weight_normalized")]
    plain_convs = [conv for conv in find_convs(model).values() if not isinstance(conv, WNConv2d)]
    assert len(aliases) == len(plain_convs)
    assert all(exported[alias] is exported[alias.removesuffix("_normalized")] for alias in aliases)
    without = {key: tensor for key, tensor in exported.items() if key not in aliases}
    assert list(state_dict_from_reference(without, state)) == list(state)


@pytest.mark.parametrize("changed", [lambda weight: weight + 1e-6, lambda weight: weight[:1]])
def test_a_second_copy_that_differs_is_refused(changed):
    state = build_nvae().state_dict()
    exported = state_dict_to_reference(state)
    copy = next(key for key in exported if key.endswith("weight_normalized"))
    exported[copy] = changed(exported[copy])
    with pytest.raises(ValueError, match=f"{copy}' differs from '{copy.removesuffix('_normalized')}'"):
        state_dict_from_reference(exported, state)


def test_what_is_left_over_missing_or_of_another_shape_is_listed_by_its_name_there():
    state = build_nvae().state_dict()
    exported = state_dict_to_reference(state)
    weight = exported.pop("stem.weight")
    exported |= {"discriminator.weight": torch.zeros(1), "stem.weight_normalized": weight}
    with pytest.raises(ValueError, match="'stem.weight' is missing; 'discriminator.weight' is unknown; 'stem.w.*d' is"):
        state_dict_from_reference(exported, state)
    exported = state_dict_to_reference(state) | {"stem.weight": weight[:, :, :1], "enc0.1.bias": weight * torch.nan}
    with pytest.raises(ValueError, match=r"'stem.weight' has shape \(8, 3, 1, 3\) .*; 'enc0.1.bias' has shape"):
        state_dict_from_reference(exported, state)
    exported = state_dict_to_reference(state) | {"stem.weight": weight * torch.nan}
    with pytest.raises(ValueError, match="'stem.weight' has non-finite values"):
        state_dict_from_reference(exported, state)


def test_the_unused_start_of_a_vanilla_reference_is_dropped():
    model = build_nvae(groups_per_scale=(1,))
    exported = state_dict_to_reference(model.state_dict()) | {"prior_ftr0": torch.zeros(16, 8, 8)}
    assert set(state_dict_from_reference(exported, model.state_dict())) == set(model.state_dict())
