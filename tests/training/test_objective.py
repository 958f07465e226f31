"""The training objective: warm-up, balancing, free bits, and one process agreeing with many."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from pipeline.models.base import LatentGroup, VAEOutput
from pipeline.training.objective import Objective, ObjectiveConfig, balancing_weights, kl_warmup, resolution_factors

GROUPS = (
    LatentGroup("4x4_group00", (2, 4, 4)),
    LatentGroup("8x8_group00", (3, 8, 8)),
    LatentGroup("8x8_group01", (3, 8, 8)),
)
STEPS = 1000


def output(kl: Tensor, log_px: Tensor | None = None, kl_units: tuple[Tensor, ...] | None = None) -> VAEOutput:
    log_px = kl.new_zeros(len(kl)) if log_px is None else log_px
    kl_units = kl_units or tuple(kl.new_zeros(group.shape[0]) for group in GROUPS)
    return VAEOutput(log_px, kl, kl.sum(1), -kl.sum(1), kl_units)


def random_kl(batch: int = 6, seed: int = 0) -> Tensor:
    """(B, 3) with groups of very different size, and some negative values, as flows give them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([30.0, 0.3, 3.0], dtype=torch.float64)
    return (torch.randn(batch, 3, generator=generator, dtype=torch.float64) + 0.8) * scale


def objective(mean_over_ranks=lambda tensor: tensor, **settings) -> Objective:
    return Objective(ObjectiveConfig(**settings), GROUPS, STEPS, mean_over_ranks)


# ---- warm-up


def test_warmup_of_the_paper():
    config = ObjectiveConfig()
    assert kl_warmup(0, STEPS, config) == 1e-4
    assert kl_warmup(150, STEPS, config) == pytest.approx((150 - 0.1) / 300, rel=1e-14)
    assert kl_warmup(300, STEPS, config) < 1
    assert kl_warmup(301, STEPS, config) == kl_warmup(10 * STEPS, STEPS, config) == 1


@given(st.integers(1, 5000), st.floats(0.001, 1), st.floats(0, 1), st.floats(0, 1))
def test_warmup_rises_from_its_floor_to_one(total, portion, delay, floor):
    config = ObjectiveConfig(kl_warmup_portion=portion, kl_warmup_delay=delay, kl_warmup_floor=floor)
    values = [kl_warmup(step, total, config) for step in range(0, 3 * total, max(total // 20, 1))]
    assert values == sorted(values)
    assert values[0] >= floor
    assert values[-1] == 1


def test_constant_beta():
    constant = objective(kl_warmup_portion=0, beta=0.25)
    assert [constant.beta(step) for step in (0, 1, STEPS)] == [0.25] * 3
    kl = random_kl()
    loss, _ = constant(output(kl), step=0)
    torch.testing.assert_close(loss, 0.25 * kl.sum(1).mean())


def test_loss_after_the_warmup_is_the_negative_elbo():
    kl, log_px = random_kl(), torch.linspace(-90, -50, 6, dtype=torch.float64)
    out = output(kl, log_px)
    loss, statistics = objective()(out, STEPS)
    torch.testing.assert_close(loss, -out.elbo.mean())
    torch.testing.assert_close(statistics["elbo"], out.elbo.mean())


# ---- balancing


def test_weights_by_kl_alone():
    """Proportional to the KL of a group, or of an element of its latent; mean 1; for as long as the setting says."""
    kl = random_kl().abs()
    means = kl.mean(0)
    elements = torch.tensor([2 * 4 * 4, 3 * 8 * 8, 3 * 8 * 8])
    for rule, shares in (("kl", means), ("kl_per_element", means / elements)):
        weights = shares / shares.mean()
        balanced = objective(kl_balancing=rule, kl_balancing_portion=0.6, kl_warmup_portion=0.3)
        torch.testing.assert_close(balanced.charged_kl(kl, 599), (weights * kl).sum(1))
        torch.testing.assert_close(balanced.charged_kl(kl, 600), kl.sum(1))
    assert not objective(kl_balancing="none", kl_balancing_portion=1.0).balances(0)
    assert objective(kl_balancing="kl").charged_kl(torch.zeros(2, 3), 0).tolist() == [0, 0]  # no 0 / 0


def test_resolution_factors():
    assert resolution_factors(GROUPS, "equal") == [1, 1, 1]
    assert resolution_factors(GROUPS, "linear") == [1, 2, 2]
    assert resolution_factors(GROUPS, "sqrt") == pytest.approx([1, 2**0.5, 2**0.5])
    assert resolution_factors(GROUPS, "square") == [1, 2, 2]  # 4^1 / 2 groups
    assert resolution_factors(GROUPS[1:], "square") == [1, 1]


def test_weights_are_proportional_to_what_a_group_carries():
    mean_abs_kl, alpha = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    weights = balancing_weights(mean_abs_kl, alpha)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor(3.01 / 1.01))
    torch.testing.assert_close(weights[2] / weights[0], torch.tensor(0.01 / 2 / 1.01))


def test_weights_take_no_gradient():
    kl = random_kl().requires_grad_()
    balanced = objective()
    balanced.charged_kl(kl, step=150).mean().backward()
    alpha = torch.tensor(resolution_factors(GROUPS, "square"), dtype=torch.float64)
    weights = balancing_weights(kl.abs().mean(0), alpha)
    torch.testing.assert_close(kl.grad, (balanced.beta(150) * weights / len(kl)).expand_as(kl))


def test_balancing_ends_with_the_warmup_or_is_off():
    kl = random_kl()
    plain = kl.sum(1)
    torch.testing.assert_close(objective().charged_kl(kl, 301), plain)
    assert not torch.allclose(objective().charged_kl(kl, 300), plain * objective().beta(300))
    torch.testing.assert_close(objective(kl_balancing="none").charged_kl(kl, 150), plain * objective().beta(150))


# ---- free bits


def test_free_bits_spare_only_the_groups_below_them():
    kl = torch.tensor([[0.1, 0.9, 3.0], [0.3, 1.3, 5.0]], dtype=torch.float64, requires_grad=True)  # means 0.2, 1.1, 4
    spared = objective(free_bits=1.0)
    charged = spared.charged_kl(kl, STEPS)
    charged.mean().backward()
    torch.testing.assert_close(kl.grad, torch.tensor([[0, 0.5, 0.5], [0, 0.5, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(charged.mean(), torch.tensor(1.0 + 1.1 + 4.0, dtype=torch.float64))


@pytest.mark.parametrize("step", [150, STEPS])
def test_a_group_exactly_at_its_free_bits_is_spared(step):
    """Its mean is the threshold to the bit; a threshold one step of the floating-point numbers below charges it."""
    kl = torch.tensor([[0.5, 0.5, 3.0], [1.5, 1.5, 5.0]], dtype=torch.float64)  # means 1, 1, 4
    free = {}
    for name, threshold in (("at", 1.0), ("below", math.nextafter(1.0, 0.0))):
        leaf = kl.clone().requires_grad_()
        objective(free_bits=threshold).charged_kl(leaf, step).mean().backward()
        free[name] = (leaf.grad == 0).all(dim=0).tolist()
    assert free == {"at": [True, True, False], "below": [False, False, False]}


def test_free_bits_together_with_balancing():
    kl = torch.tensor([[0.1, 0.9, 3.0], [0.3, 1.3, 5.0]], dtype=torch.float64, requires_grad=True)
    objective(free_bits=1.0).charged_kl(kl, 150).mean().backward()
    assert (kl.grad[:, 0] == 0).all()
    assert (kl.grad[:, 1:] > 0).all()


# ---- processes


@pytest.mark.parametrize("settings", [{}, {"free_bits": 2.0}, {"free_bits": 2.0, "kl_balancing": "none"}])
@pytest.mark.parametrize("step", [0, 150, STEPS])
def test_shares_of_a_batch_add_up_to_the_batch(settings, step):
    whole = random_kl(batch=8).requires_grad_()
    objective(**settings).charged_kl(whole, step).mean().backward()
    shares = [share.clone().requires_grad_() for share in whole.detach().split(2)]

    means = []
    for share in shares:  # what each rank brings to the collective
        objective(mean_over_ranks=lambda tensor: means.append(tensor) or tensor, **settings).charged_kl(share, step)
    for share in shares:
        run_on_all = objective(mean_over_ranks=lambda _: torch.stack(means).mean(0), **settings)
        (run_on_all.charged_kl(share, step).mean() / len(shares)).backward()

    torch.testing.assert_close(torch.cat([share.grad for share in shares]), whole.grad, rtol=1e-14, atol=0)


def test_at_most_one_collective():
    calls = []
    counted = objective(mean_over_ranks=lambda tensor: calls.append(1) or tensor, free_bits=1.0)
    counted(output(random_kl()), step=150)
    assert len(calls) == 1


# ---- statistics and settings


def test_statistics():
    kl, log_px = random_kl().requires_grad_(), torch.linspace(-90, -50, 6, dtype=torch.float64)
    _, statistics = objective()(output(kl, log_px), step=150)
    assert not any(value.requires_grad or value.dim() for value in statistics.values())
    torch.testing.assert_close(statistics["log_px"], log_px.mean())
    torch.testing.assert_close(statistics["kl"], kl.detach().sum(1).mean())
    for k, group in enumerate(GROUPS):
        torch.testing.assert_close(statistics[f"kl/{group.name}"], kl.detach()[:, k].mean())


def test_a_nan_reaches_the_loss():
    """Balancing and free bits must not hide a non-finite KL from the trainer."""
    kl = random_kl()
    kl[2, 1] = float("nan")
    for settings in ({}, {"free_bits": 1e9}):
        for step in (150, STEPS):
            loss, _ = objective(**settings)(output(kl), step)
            assert loss.isnan()


@pytest.mark.parametrize(
    "settings",
    [{"beta": -1.0}, {"kl_warmup_portion": 1.5}, {"kl_balancing": "cubic"}, {"free_bits": -0.1}, {"betta": 1.0}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        ObjectiveConfig(**settings)
