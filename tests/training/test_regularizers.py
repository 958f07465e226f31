"""Spectral and batch-norm penalties, and the vectors that they carry from step to step."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.layers import SqueezeExcitation, WNConv2d, effective_weights
from pipeline.training.regularizers import RegularizerConfig, Regularizers
from pipeline.training.spectral import power_iteration


class SmallNet(nn.Module):
    """Convolutions of two matrix shapes (three of one), batch norms of two widths, and layers that take no part."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a = WNConv2d(4, 6, 3)
            self.plain = nn.Conv2d(36, 6, 1, bias=False)  # the matrix shape of `a`
            self.norm = BatchNorm2d(6)
            self.b = WNConv2d(4, 6, 3)
            self.c = WNConv2d(6, 5, 1)
            self.other_norm = BatchNorm2d(6)
            self.wide_norm = BatchNorm2d(9)
            self.plain_norm = nn.BatchNorm2d(6, affine=False)
            self.se = SqueezeExcitation(6)
        self.to(dtype)

    def convs(self) -> list[nn.Module]:
        return [self.a, self.plain, self.b, self.c]


def build(net: nn.Module, seed: int = 0, **settings) -> Regularizers:
    return Regularizers(RegularizerConfig(**settings), net, seed)


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def copied(regularizers: Regularizers) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in regularizers.state().items()}


# ---- the spectral term


def test_spectral_term_is_the_sum_of_largest_singular_values():
    net = SmallNet()
    exact = sum(torch.linalg.matrix_norm(weight.flatten(1), ord=2) for weight in effective_weights(net.convs()))
    few, many = (build(net, first_power_iterations=n).spectral() for n in (1, 2000))
    torch.testing.assert_close(many, exact, rtol=1e-12, atol=0)
    assert few < exact


def test_spectral_gradient_is_that_of_the_singular_values():
    net = SmallNet()
    build(net, first_power_iterations=2000).spectral().backward()
    found = [parameter.grad for conv in net.convs() for parameter in conv.parameters() if parameter.grad is not None]
    net.zero_grad(set_to_none=True)
    sum(torch.linalg.matrix_norm(weight.flatten(1), ord=2) for weight in effective_weights(net.convs())).backward()
    expected = [parameter.grad for conv in net.convs() for parameter in conv.parameters() if parameter.grad is not None]
    assert len(found) == len(expected) == 7  # three of a length and a direction, one plain; no biases
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_batched_iteration_equals_one_by_one():
    """Also for matrices of several shapes at once."""
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4, 7), (2, 6, 3))]
    starts = [torch.randn(stack.shape[:2], generator=generator, dtype=torch.float64) for stack in stacks]
    for stack, start, *found in zip(stacks, starts, *power_iteration(stacks, starts, iterations=3), strict=True):
        for matrix, left, u, v in zip(stack, start, *found, strict=True):
            for _ in range(3):
                right = left @ matrix / (left @ matrix).norm()
                left = matrix @ right / (matrix @ right).norm()
            torch.testing.assert_close(u, left)
            torch.testing.assert_close(v, right)


def test_a_vanishing_matrix_gives_no_nan():
    (u,), (v,) = power_iteration([torch.zeros(1, 3, 3)], [torch.ones(1, 3)], iterations=4)
    assert not u.any()
    assert not v.any()


def test_a_short_vector_is_not_blown_up():
    """Vectors are divided by their length or by 1e-3, whichever is larger."""
    matrix, start = 1e-4 * torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    (u,), (v,) = power_iteration([matrix[None]], [start], iterations=1)
    torch.testing.assert_close(v, torch.tensor([[0.1, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(u, torch.tensor([[0.01, 0.0]], dtype=torch.float64))


def test_linear_layers_take_no_part():
    penalty, _ = build(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))(1.0)
    assert penalty == 0


# ---- the batch-norm term


def test_batch_norm_term_is_the_sum_of_largest_scales():
    net = SmallNet()
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([0.1, -3.0, 2.0, 0, 0, 1]))
        net.other_norm.weight.fill_(0.5)
        net.wide_norm.weight.fill_(-0.25)
    term = build(net).batch_norm()
    torch.testing.assert_close(term, torch.tensor(3.75, dtype=torch.float64))
    term.backward()
    assert net.norm.weight.grad.tolist() == [0, -1, 0, 0, 0, 0]


def test_ties_share_the_gradient():
    """At the start all scales are 1. Given to one channel alone, the penalty would break the symmetry at once."""
    net = SmallNet()
    build(net).batch_norm().backward()
    torch.testing.assert_close(net.norm.weight.grad, torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(net.wide_norm.weight.grad, torch.full((9,), 1 / 9, dtype=torch.float64))


# ---- the whole penalty


def test_penalty_and_statistics():
    net = SmallNet()
    regularizers = build(net, strength=0.5)
    penalty, statistics = regularizers(0.3)
    torch.testing.assert_close(penalty.detach(), 0.5 * (statistics["spectral"] + statistics["batch_norm"]))
    assert penalty.requires_grad
    assert not any(value.requires_grad for value in statistics.values())


def test_annealing_is_geometric():
    regularizers = build(SmallNet(), strength=0.01, initial_strength=1.0)
    assert [regularizers.strength(warmup) for warmup in (0, 0.5, 1)] == pytest.approx([1, 0.1, 0.01], rel=1e-14)
    assert build(SmallNet(), strength=0.01).strength(0) == 0.01


def test_strength_zero_is_off():
    regularizers = build(SmallNet(), strength=0)
    penalty, statistics = regularizers(0.5)
    regularizers.commit()
    assert penalty == 0
    assert statistics == {}
    assert regularizers.state() == {}


def test_bad_settings_are_refused():
    with pytest.raises(ValidationError, match="strength is 0"):
        RegularizerConfig(strength=0, initial_strength=1.0)
    with pytest.raises(ValidationError):
        RegularizerConfig(power_iterations=0)


# ---- the carried vectors


def test_vectors_are_a_function_of_the_seed():
    states = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        regularizers = build(SmallNet(), seed=seed, first_power_iterations=1)
        regularizers(1.0)
        regularizers.commit()
        states.append(regularizers.state())
    assert_same_bits(states[0], states[1])
    assert not torch.equal(states[0]["6x36"], states[2]["6x36"])
    assert {name: tuple(vectors.shape) for name, vectors in states[0].items()} == {"6x36": (3, 6), "5x6": (1, 5)}


def test_a_call_changes_nothing_until_commit():
    regularizers = build(SmallNet(), power_iterations=1, first_power_iterations=1)
    first, _ = regularizers(1.0)
    assert regularizers.state() == {}
    again, _ = regularizers(1.0)
    assert torch.equal(first, again)
    regularizers.commit()
    before = copied(regularizers)
    second, _ = regularizers(1.0)
    regularizers.discard()
    assert_same_bits(regularizers.state(), before)
    repeated, _ = regularizers(1.0)
    assert torch.equal(second, repeated)
    regularizers.commit()
    assert not torch.equal(regularizers.state()["6x36"], before["6x36"])
    assert second > first


def test_commit_without_a_call_keeps_the_vectors():
    regularizers = build(SmallNet())
    regularizers(1.0)
    regularizers.commit()
    before = copied(regularizers)
    regularizers.commit()
    assert_same_bits(regularizers.state(), before)


def test_a_skipped_step_leaves_the_vectors_bit_for_bit():
    net = SmallNet()
    regularizers = build(net)
    regularizers(1.0)
    regularizers.commit()
    before, weight = copied(regularizers), net.a.weight.detach().clone()
    net.a.weight.data[0, 0, 0, 0] = float("nan")
    penalty, _ = regularizers(1.0)
    assert penalty.isnan()
    regularizers.discard()
    net.a.weight.data.copy_(weight)
    assert_same_bits(regularizers.state(), before)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_resuming_from_a_state_equals_continuing(steps_before):
    """Also before the first step: the state is empty then, and both begin with the many first iterations."""

    def steps(regularizers: Regularizers, count: int) -> list[Tensor]:
        penalties = []
        for _ in range(count):
            penalties.append(regularizers(1.0)[0])
            regularizers.commit()
        return penalties

    settings = {"power_iterations": 1, "first_power_iterations": 3}
    uninterrupted, stopped, resumed = (build(SmallNet(), **settings) for _ in range(3))
    steps(stopped, steps_before)
    steps(uninterrupted, steps_before)
    resumed.load_state(copied(stopped))
    assert all(map(torch.equal, steps(uninterrupted, 3), steps(resumed, 3)))
    assert_same_bits(uninterrupted.state(), resumed.state())


def test_a_state_of_another_model_is_refused():
    regularizers = build(SmallNet())
    regularizers(1.0)
    regularizers.commit()
    state = regularizers.state()
    with pytest.raises(ValueError, match="5x6"):
        build(SmallNet()).load_state({"6x36": state["6x36"]})
    with pytest.raises(ValueError, match="6x36"):
        build(SmallNet()).load_state(state | {"6x36": state["6x36"][:2]})
    with pytest.raises(ValueError, match="6x36"):
        build(nn.Conv2d(2, 2, 1)).load_state(state)


# ---- precision


def test_autocast_does_not_reach_the_iteration():
    regularizers = build(SmallNet(torch.float32))
    outside, _ = regularizers(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = regularizers(1.0)
    assert inside.dtype == torch.float32
    assert torch.equal(outside, inside)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_vectors_are_float32_at_least(dtype, expected):
    regularizers = build(SmallNet(dtype))
    penalty, _ = regularizers(1.0)
    regularizers.commit()
    assert {vectors.dtype for vectors in regularizers.state().values()} == {expected}
    assert penalty.isfinite()


def test_memory_format_does_not_matter():
    net = SmallNet()
    plain, _ = build(net)(1.0)
    last, _ = build(net.to(memory_format=torch.channels_last))(1.0)
    torch.testing.assert_close(plain, last, rtol=1e-13, atol=0)
