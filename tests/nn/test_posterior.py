"""The flat posterior and its flows: exact log-determinants, densities that integrate to one, autoregressive order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.nn.posterior import Posterior
from pipeline.nn.posterior_flows import (
    AutoregressiveFlows,
    Flows,
    InverseFlow,
    PlanarFlow,
    PlanarFlows,
    autoregressive_masks,
    invertible,
)

FEATURES = 5
lengths = st.integers(1, 5)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([0.1, 1.0, 3.0])
kinds = st.sampled_from(["planar", "iaf"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def section(kind: str, length: int) -> Flows:
    return PlanarFlows(length=length) if kind == "planar" else AutoregressiveFlows(length=length, hidden=9)


def posterior(size: int, flows: Flows | None, seed: int = 0, scale: float = 1.0) -> Posterior:
    """With parameters `scale` times as large as a fresh model's."""
    torch.manual_seed(seed)
    made = Posterior(FEATURES, size, flows).double()
    with torch.no_grad():
        for parameter in made.flows.parameters():
            parameter.mul_(scale)
    return made


def flowed(made: Posterior, base: Tensor, features: Tensor) -> Tensor:
    """One image's latent (L,) from its sample before flows."""
    return made._flow(base[None], features[None])[0][0]


# ---- the Jacobian ----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(kinds, lengths, sizes, seeds, scales)
def test_the_log_determinant_is_the_jacobians(kind, length, size, seed, scale):
    made = posterior(size, section(kind, length), seed, scale)
    base, features = random(3, size, seed=seed), random(3, FEATURES, seed=seed + 1)
    _, log_det = made._flow(base, features)
    for n in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z, n=n: flowed(made, z, features[n]), base[n])
        sign, expected = torch.linalg.slogdet(jacobian)
        assert sign > 0
        tolerance = 1e-9 if scale <= 1 else 1e-6  # the elimination of a nearly singular matrix has few digits
        torch.testing.assert_close(log_det[n].sum(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["planar", "iaf"])
def test_the_log_determinant_is_that_of_finite_differences(kind):
    made = posterior(4, section(kind, 4))
    base, features, step = random(4, seed=3), random(FEATURES, seed=4), 1e-6
    columns = [
        (flowed(made, base + step * unit, features) - flowed(made, base - step * unit, features)) / (2 * step)
        for unit in torch.eye(4, dtype=torch.float64)
    ]
    expected = torch.linalg.slogdet(torch.stack(columns, dim=1))[1]
    log_det = made._flow(base[None], features[None])[1].sum()
    torch.testing.assert_close(log_det, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["planar", "iaf", None])
def test_the_density_integrates_to_one(kind):
    """E_q[p(z) / q(z)] is the prior's integral, 1, only if log q is normalized and belongs to the draws."""
    made = posterior(2, section(kind, 3) if kind else None, seed=5)
    features = random(1, FEATURES, seed=6).expand(200_000, -1)
    with torch.no_grad():
        sample = made(features, random(200_000, 2, seed=7))
        weights = (sample.log_pz.sum(1) - sample.log_qz.sum(1)).exp()
    standard_error = weights.std() / len(weights) ** 0.5
    assert standard_error < 0.02
    assert abs(weights.mean() - 1) < 5 * standard_error


def test_a_density_on_a_line_integrates_to_one_by_quadrature():
    for kind in ("planar", "iaf"):
        made = posterior(1, section(kind, 3), seed=8, scale=2.0)
        base = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
        features = random(1, FEATURES, seed=9).expand(len(base), -1)
        with torch.no_grad():
            normal = made.normal(features)
            z, log_det = made._flow(normal.mean + normal.sigma * base, features)
            log_q = normal.log_prob(normal.mean + normal.sigma * base) - log_det
        assert (z.diff(dim=0) > 0).all()
        torch.testing.assert_close(torch.trapezoid(log_q.exp()[:, 0], z[:, 0]).item(), 1.0, rtol=1e-6, atol=0)


# ---- planar ----------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([1e-9, 1e-3, 1.0, 5.0]), st.sampled_from([1e-9, 1e-3, 1.0, 5.0]))
def test_planar_flows_stay_invertible(seed, u_scale, w_scale):
    u, w = u_scale * random(8, 3, seed=seed), w_scale * random(8, 3, seed=seed + 1)
    moved, room = invertible(u, w)
    torch.testing.assert_close(room, (w * moved).sum(1, keepdim=True) + 1, rtol=1e-9, atol=1e-9)
    assert (room > 0).all()
    across = moved - u  # u moves along w alone
    torch.testing.assert_close(across, w * (across * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True))


def test_planar_parameters_of_zero_change_nothing():
    flow = PlanarFlow(3, FEATURES).double()
    torch.nn.init.zeros_(flow.to_parameters.weight)
    torch.nn.init.zeros_(flow.to_parameters.bias)
    z = random(4, 3)
    moved, log_det = flow(z, random(4, FEATURES))
    torch.testing.assert_close(moved, z)
    assert not log_det.any()
    moved.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


# ---- inverse autoregressive ------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(sizes, st.integers(1, 12), st.booleans())
def test_masks_leave_an_order_and_nothing_else_out(size, hidden, reverse):
    into, out = autoregressive_masks(size, hidden, reverse)
    connected = (out @ into).bool()
    earlier = torch.ones(size, size).tril(-1).bool()
    earlier = earlier.T if reverse else earlier
    assert not (connected & ~earlier).any()
    if hidden >= size:
        assert torch.equal(connected, earlier)
    assert (out.sum(1) > 0).all()  # every output depends on the features


@pytest.mark.parametrize("reverse", [False, True])
def test_each_unit_sees_the_units_before_it_and_the_features(reverse):
    torch.manual_seed(0)
    flow = InverseFlow(4, FEATURES, 16, reverse).double()
    z, features = random(4), random(FEATURES, seed=1)
    by_z, by_features = torch.autograd.functional.jacobian(
        lambda z, features: flow(z[None], features[None])[0][0], (z, features)
    )
    seen = torch.ones(4, 4).tril().bool()
    assert torch.equal(by_z != 0, seen.T if reverse else seen)
    assert (by_features != 0).all()


def test_the_order_is_reversed_between_steps():
    first, second, third = AutoregressiveFlows(length=3).build(4, FEATURES)
    assert torch.equal(first.latent_layer.mask, third.latent_layer.mask)
    assert not torch.equal(first.latent_layer.mask, second.latent_layer.mask)


def test_a_step_is_undone_unit_by_unit():
    torch.manual_seed(1)
    flow = InverseFlow(4, FEATURES, 16, reverse=True).double()
    z, features = random(3, 4), random(3, FEATURES, seed=1)
    moved, _ = flow(z, features)
    found = torch.zeros_like(z)
    for i in (3, 2, 1, 0):
        hidden = torch.nn.functional.elu(flow.latent_layer(found) + flow.feature_layer(features))
        gate, mean = torch.sigmoid(flow.gate(hidden)), flow.mean(hidden)
        found[:, i] = ((moved - (1 - gate) * mean) / gate)[:, i]
    torch.testing.assert_close(found, z)


# ---- the posterior ---------------------------------------------------------------------------------------------------


def test_without_flows_the_kl_is_analytic_and_without_bounds():
    made = posterior(3, None)
    features, noise = 50 * random(4, FEATURES), random(4, 3, seed=1)
    sample = made(features, noise)
    mu, log_variance = made.mean(features), made.log_variance(features)
    torch.testing.assert_close(sample.z, mu + torch.exp(log_variance / 2) * noise)
    torch.testing.assert_close(sample.kl, 0.5 * (mu**2 + log_variance.exp() - 1 - log_variance))
    theirs = torch.distributions.Normal(mu, torch.exp(log_variance / 2))
    torch.testing.assert_close(sample.log_qz, theirs.log_prob(sample.z))
    assert mu.abs().max() > 5


@pytest.mark.parametrize("kind", ["planar", "iaf"])
def test_with_flows_the_kl_is_that_of_the_sample(kind):
    made = posterior(3, section(kind, 2))
    sample = made(random(4, FEATURES), random(4, 3, seed=1))
    torch.testing.assert_close(sample.kl, sample.log_qz - sample.log_pz)
    torch.testing.assert_close(sample.log_pz, torch.distributions.Normal(0.0, 1.0).log_prob(sample.z))


@pytest.mark.parametrize("kind", ["planar", "iaf"])
def test_flows_fit_a_density_that_no_diagonal_normal_can(kind):
    """Two correlated units: a diagonal normal's KL from N(0, S) is at best -log(1 - r^2) / 2."""
    correlation = 0.9
    target = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64),
    )
    best_diagonal = -0.5 * torch.log(torch.tensor(1 - correlation**2)).item()
    made = posterior(2, section(kind, 4))
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-2)
    features = torch.ones(128, FEATURES, dtype=torch.float64)
    kls = []
    for step in range(300):
        sample = made(features, random(128, 2, seed=step))
        kl = (sample.log_qz.sum(1) - target.log_prob(sample.z)).mean()
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
        kls.append(kl.item())
    assert sum(kls[-50:]) / 50 < 0.5 * best_diagonal


@pytest.mark.parametrize("kind", ["planar", "iaf"])
def test_extreme_features_give_finite_gradients(kind):
    made = posterior(3, section(kind, 3)).float()
    features = (30 * random(4, FEATURES)).float().requires_grad_()
    sample = made(features, random(4, 3, seed=1).float())
    (sample.log_qz - sample.log_pz).sum().backward()
    assert features.grad.isfinite().all()
    assert sample.log_qz.isfinite().all()
