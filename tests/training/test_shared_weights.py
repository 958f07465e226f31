"""The penalty uses the normalized weights of the last pass, and never those of an earlier state of the model."""

import copy

import pytest
import torch
from torch import Tensor

from pipeline.models.base import use_channels_last
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE
from pipeline.nn import weight_cache
from pipeline.training.regularizers import RegularizerConfig, Regularizers
from tests.helpers.nvae_cases import build_nvae

SETTINGS = RegularizerConfig(first_power_iterations=3)


@pytest.fixture
def model() -> NVAE:
    model = build_nvae(num_flows=1, cells="mbconv_den").double()  # masked, grouped and plain convolutions
    use_channels_last(model)
    return model


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """One entry for every time that the weights are normalized."""
    calls, plain = [], weight_cache.weight_stacks
    monkeypatch.setattr(weight_cache, "weight_stacks", lambda convs: (calls.append(len(convs)), plain(convs))[1])
    return calls


def loss(model: NVAE, seed: int = 0) -> Tensor:
    x = torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = draw_noise(model.groups, seed, "shared", range(2), dtype=torch.float64)
    return -model(x, noise).elbo.mean()


def alone(model: NVAE) -> Tensor:
    """The penalty of these weights, without a pass."""
    return Regularizers(SETTINGS, copy.deepcopy(model), seed=0)(1.0)[0]


def test_a_pass_and_its_penalty_normalize_the_weights_once(model, computed):
    """With the gradients of two separate computations."""
    other = copy.deepcopy(model)
    separate = loss(other)
    separate += Regularizers(SETTINGS, other, seed=0)(1.0)[0]
    Regularizers(RegularizerConfig(strength=0), other, seed=0)
    separate.backward()
    regularizers = Regularizers(SETTINGS, model, seed=0)
    computed.clear()
    total = loss(model) + regularizers(1.0)[0]
    assert len(computed) == 1
    total.backward()
    torch.testing.assert_close(total, separate, rtol=1e-13, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
        for size, stride, expected in zip(ours.shape, ours.grad.stride(), ours.stride(), strict=True):
            assert stride == expected or size == 1, name
    torch.testing.assert_close(regularizers(1.0)[0], alone(model))  # after backward: computed again


def test_the_last_pass_of_an_accumulated_step_counts(model):
    regularizers, other = Regularizers(SETTINGS, model, seed=0), copy.deepcopy(model)
    loss(model, 1).backward()
    (loss(model, 2) + regularizers(1.0)[0]).backward()
    penalty = Regularizers(SETTINGS, other, seed=0)
    for seed in (1, 2):
        loss(other, seed).backward()
    penalty(1.0)[0].backward()  # computes the weights again: the graph of the last pass is used up
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def move_by_hand(model: NVAE) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def take_a_step(model: NVAE) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adamax(model.parameters(), lr=0.1, foreach=True).step()


def load_other_weights(model: NVAE) -> None:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("change", [move_by_hand, take_a_step, load_other_weights])
def test_weights_that_changed_since_the_pass_are_normalized_again(model, change):
    regularizers = Regularizers(SETTINGS, model, seed=0)
    before = alone(model)
    loss(model)
    change(model)
    torch.testing.assert_close(regularizers(1.0)[0], alone(model), rtol=1e-12, atol=0)
    assert not torch.allclose(before, alone(model))


def test_only_a_training_pass_shares_its_weights(model, computed):
    regularizers = Regularizers(SETTINGS, model, seed=0)
    loss(model)
    with torch.no_grad():
        loss(model)
    computed.clear()
    assert regularizers(1.0)[0].requires_grad
    model.eval()
    loss(model)
    regularizers(1.0)
    assert len(computed) == 3


def test_nothing_is_kept_where_nobody_asks_for_it(model, computed):
    Regularizers(RegularizerConfig(strength=0), model, seed=0)
    loss(model)
    model.weight_cache.stacks()
    assert len(computed) == 2


def test_a_model_can_be_copied_after_a_pass(model):
    Regularizers(SETTINGS, model, seed=0)
    loss(model)
    other = copy.deepcopy(model)
    move_by_hand(other)
    assert not torch.allclose(alone(other), alone(model))
