"""Optimisers against their formulas, and learning rates against PyTorch's schedulers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from pipeline.models.base import use_channels_last
from pipeline.training.optim import LearningRate, OptimConfig, build_optimizer
from tests.models.nvae_restatement_training import adamax_step


def tiny_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()


def random_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


# ---- optimisers


def test_one_group_in_registration_order():
    model = tiny_model()
    (group,) = build_optimizer(model, OptimConfig()).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.9, 0.999), 1e-3, 3e-4)


def test_adamax_is_the_published_rule():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    state = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for t, lr in enumerate((0.0, 0.01, 0.02, 0.005), start=1):
        random_gradients(model, t)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, parameter in enumerate(model.parameters()):
            p, m, n = state[i]
            state[i] = adamax_step(p, parameter.grad, m, n, t, lr, wd=0.1)
            torch.testing.assert_close(parameter.detach(), state[i][0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["adamax", "adam", "adamw"])
def test_batched_update_equals_one_by_one(name):
    """Bit for bit where both are torch's plain arithmetic; a fused update rounds a little differently."""
    models = [tiny_model(), tiny_model()]
    batched = build_optimizer(models[0], OptimConfig(name=name))
    single = type(batched)(
        models[1].parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=3e-4, foreach=False
    )
    for t in range(4):
        for model, optimizer in zip(models, (batched, single), strict=True):
            random_gradients(model, t)
            optimizer.step()
    tolerance = 0 if name == "adamax" else 1e-6
    for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["adamax", "adam", "adamw"])
def test_weights_in_channels_last_order_are_updated_equally(name):
    """A fused update reads memory in order: weight, gradient and moments must have one layout for any kernel."""
    networks = []
    for _ in range(2):
        torch.manual_seed(1)
        networks.append(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()))
    use_channels_last(networks[0])
    ours = build_optimizer(networks[0], OptimConfig(name=name))
    plain = type(ours)(networks[1].parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=3e-4)
    for step in range(4):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for network, optimizer, layout in (
            (networks[0], ours, torch.channels_last),
            (networks[1], plain, torch.contiguous_format),
        ):
            optimizer.zero_grad()
            network(x.contiguous(memory_format=layout)).square().sum().backward()
            optimizer.step()
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weight_decay_of_adamw_is_decoupled():
    """With no gradient at all, AdamW shrinks weights by lr * weight_decay; the coupled forms take a whole step."""
    moved = {}
    for name in ("adamw", "adam", "adamax"):
        model = tiny_model()
        before = model[0].weight.detach().clone()
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5, eps=1e-8))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[name] = model[0].weight.detach() / before
    torch.testing.assert_close(moved["adamw"], torch.full_like(moved["adamw"], 0.95))
    assert not torch.allclose(moved["adam"], moved["adamw"])
    assert not torch.allclose(moved["adamax"], moved["adamw"])


# ---- learning rate


def rates(total_steps: int, steps_per_epoch: float = 10, **options) -> list[float]:
    learning_rate = LearningRate(OptimConfig(**options), total_steps, steps_per_epoch)
    return [learning_rate(step) for step in range(total_steps)]


def test_cosine_with_warmup():
    found = rates(110, lr=1.0, lr_min=0.1, warmup_steps=10)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    assert found[10:] == pytest.approx(expected)


def test_cosine_is_pytorchs():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=57, eta_min=1e-4)
    expected = []
    for _ in range(57):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(57, lr=0.01, lr_min=1e-4) == pytest.approx(expected, rel=1e-9)


def test_constant():
    assert rates(6, lr=0.5, schedule="constant") == [0.5] * 6
    assert rates(6, lr=0.5, schedule="constant", warmup_steps=4) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_warmup_from_zero():
    """VDVAE's: the first step has a rate of 0, the one of index `warmup_steps` the first full one."""
    options = {"lr": 1.0, "warmup_steps": 4, "warmup_from_zero": True}
    assert rates(6, schedule="constant", **options) == [0, 0.25, 0.5, 0.75, 1, 1]
    assert rates(6, schedule="cosine", lr_min=0.5, **options) == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75])
    assert rates(3, schedule="constant", lr=1.0, warmup_from_zero=True) == [1, 1, 1]  # no warm-up


def reference_rates(epochs: int, warmup_epochs: int, iterations: int, lr: float, lr_min: float) -> list[float]:
    """The reference release's procedure: lr set by hand at first, then a scheduler stepped once an epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs - warmup_epochs - 1, 1), lr_min)
    found, warmup = [], warmup_epochs * iterations
    optimizer.step()
    for epoch in range(epochs):
        if epoch > warmup_epochs:
            scheduler.step()
        for iteration in range(iterations):
            step = epoch * iterations + iteration
            if step < warmup:
                optimizer.param_groups[0]["lr"] = lr * step / warmup
            found.append(optimizer.param_groups[0]["lr"])
    return found


@given(st.integers(1, 12), st.integers(0, 5), st.integers(2, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cosine_per_epoch_is_the_reference_procedure(epochs_after, warmup_epochs, iterations):
    epochs = warmup_epochs + epochs_after
    options = {"lr": 0.01, "lr_min": 1e-4}
    expected = reference_rates(epochs, warmup_epochs, iterations, **options)
    for warmup in ({"warmup_epochs": warmup_epochs}, {"warmup_steps": warmup_epochs * iterations}):
        found = rates(epochs * iterations, iterations, schedule="cosine_per_epoch", **options, **warmup)
        assert found == pytest.approx(expected, rel=1e-9)


@given(
    st.sampled_from(["cosine", "cosine_per_epoch", "constant"]),
    st.integers(1, 400),
    st.floats(0.5, 300),
    st.floats(0, 20),
)
@settings(deadline=None)
def test_rates_stay_within_bounds(schedule, total_steps, steps_per_epoch, warmup_epochs):
    """Also where an epoch is no whole number of steps, or the warm-up is longer than the run."""
    learning_rate = LearningRate(
        OptimConfig(lr=0.01, lr_min=1e-4, schedule=schedule, warmup_epochs=warmup_epochs), total_steps, steps_per_epoch
    )
    for step in range(total_steps + 3):
        assert 0 <= learning_rate(step) <= 0.01
        if step >= learning_rate.warmup_steps + 2 * steps_per_epoch:
            assert learning_rate(step) >= min(1e-4, 0.01 * (1 - 1 / max(learning_rate.warmup_steps, 1)))


def test_warmup_in_epochs_equals_warmup_in_steps():
    assert rates(100, 10, warmup_epochs=2.5) == rates(100, 10, warmup_steps=25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "keep one"),
        ({"lr": 1e-5}, "lr_min"),
        ({"lr": 1e-5, "schedule": "cosine_per_epoch"}, "lr_min"),
        ({"lr": 0.0}, "greater than 0"),
        ({"name": "sgd"}, "adamax"),
        ({"schedule": "linear"}, "cosine_per_epoch"),
        ({"clip": -1.0}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**options)


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_the_end_of_a_cosine_limits_no_other_schedule(schedule):
    assert rates(3, schedule=schedule, lr=1e-5) == [1e-5] * 3
