"""Means and standard errors over images: numpy's, however the images are shared among processes and batches."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.unreadable import SkippedSample
from pipeline.evaluation.bound_totals import BatchBounds, BoundTotals
from pipeline.models.base import LatentGroup

GROUPS = [LatentGroup("4x4_group00", (2, 4, 4)), LatentGroup("8x8_group00", (1, 8, 8))]


class Ranks:
    """A sum over threads that stand for processes."""

    def __init__(self, size: int):
        self.values, self.barrier = {}, threading.Barrier(size)

    def sum(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self.values[rank] = value
        self.barrier.wait()
        total = sum(self.values[rank] for rank in sorted(self.values))
        self.barrier.wait()
        return total


def measured(values: np.ndarray, sums: np.ndarray, world_size: int, batch: int) -> list[dict]:
    """The figures on each of the ranks. `values` (R, N, 3), `sums` (N, G + U)."""
    ranks, (runs, count, _) = Ranks(world_size), values.shape

    def work(rank: int) -> dict:
        totals = BoundTotals(GROUPS, True, "cpu", runs)
        mine = range(count * rank // world_size, count * (rank + 1) // world_size)
        for run in range(runs):
            for start in range(0, len(mine), batch):
                rows = mine[start : start + batch]
                groups = torch.from_numpy(sums[rows].sum(axis=0))
                totals.add(BatchBounds(run, torch.from_numpy(values[run, rows]), groups, []))
        return totals.figures(lambda value: ranks.sum(rank, value), num_dimensions=100)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, range(world_size)))


@given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 12),
    world=st.integers(1, 3),
    batch=st.integers(1, 5),
    runs=st.integers(1, 3),
)
@settings(max_examples=50)
def test_the_figures_are_those_of_numpy_on_any_number_of_processes(seed, count, world, batch, runs):
    rng = np.random.default_rng(seed)
    values, sums = rng.normal(-1e5, 3.0, (runs, count, 3)), rng.exponential(0.1, (count, 5))
    found = measured(values, sums, world, batch)
    assert all(figures == found[0] for figures in found)
    bits = 100 * np.log(2)
    expected = {"elbo": values[..., 0].mean(), "log_px": values[..., 1].mean(), "nll": values[..., 2].mean()}
    for name, column, per_bit in (("elbo", 0, "bpd"), ("nll", 2, "bpd_nll")):
        expected[f"{name}_se"] = np.std(values[..., column].mean(0), ddof=1) / np.sqrt(count)
        expected[f"{per_bit}_se"] = expected[f"{name}_se"] / bits
        if runs > 1:
            expected[f"{name}_binarization_se"] = np.std(values[..., column].mean(1), ddof=1) / np.sqrt(runs)
            expected[f"{per_bit}_binarization_se"] = expected[f"{name}_binarization_se"] / bits
    expected |= {"bpd": -expected["elbo"] / bits, "bpd_nll": expected["nll"] / bits}
    means = sums.mean(axis=0)
    expected |= {"kl": means[:2].sum(), "kl/4x4_group00": means[0], "kl/8x8_group00": means[1]}
    expected |= {
        "active_units/4x4_group00": (means[2:4] > 0.1).sum(),
        "active_units/8x8_group00": float(means[4] > 0.1),
    }
    assert found[0].keys() == expected.keys()
    for name, value in expected.items():  # deviations of 1e-4 of values of 1e5: squares of values would lose them
        assert found[0][name] == pytest.approx(value, rel=1e-7), name


def test_one_image_has_no_standard_error_and_none_has_no_figures():
    one = measured(np.ones((1, 1, 3)), np.ones((1, 5)), 2, 4)[0]
    assert (one["elbo"], np.isnan(one["elbo_se"]), np.isnan(one["bpd_nll_se"])) == (1.0, True, True)
    none = measured(np.ones((2, 0, 3)), np.ones((0, 5)), 2, 4)[0]
    assert all(np.isnan(none[name]) for name in ("elbo", "elbo_se", "nll", "kl", "kl/4x4_group00"))


def test_bounds_survive_json_and_nothing_else_is_taken_for_bounds():
    skipped = [SkippedSample(4, 4, "a.tar: sample 'x': \x1b[2Jtruncated", None)]
    bounds = BatchBounds(2, torch.rand(3, 2).double(), torch.rand(5).double(), skipped)
    again = BatchBounds.from_json(json.loads(json.dumps(bounds.as_json())), 2, 5, "cpu")
    assert again.binarization == 2
    assert again.skipped == [SkippedSample(4, 4, "a.tar: sample 'x': [2Jtruncated", None)]
    assert torch.equal(again.images, bounds.images)
    assert torch.equal(again.groups, bounds.groups)
    for wrong in (
        None,
        [],
        [0, [], [1.0], []],
        [0, [[1.0]], [1.0] * 5, []],
        [0, [["x", 1]], [1.0] * 5, []],
        5,
        [0] * 4,
    ):
        with pytest.raises(ValueError, match="not the bounds of a batch"):
            BatchBounds.from_json(wrong, 2, 5, "cpu")
