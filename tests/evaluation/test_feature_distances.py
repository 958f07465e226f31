"""Frechet distance, kernel distance, precision and recall: against closed forms and other programs, and the same on any
number of ranks."""

from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.feature_moments import FeatureMoments, Moments
from pipeline.evaluation.frechet import frechet_distance
from pipeline.evaluation.kernel_distance import kernel_distance, squared_discrepancy
from pipeline.evaluation.precision_recall import precision_recall, squared_distances
from tests.helpers.feature_networks import import_reference


def features(count: int, size: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing / size**0.5 + shift


def moments(rows: Tensor) -> Moments:
    sums = FeatureMoments(rows.shape[1])
    for part in rows.split(7):
        sums.add(part)
    return sums.reduce()


def on_ranks(world_size: int, measure) -> list:
    """The results of `measure(share, total)` on each of several ranks, which run as threads in lockstep."""
    barrier, slots, results = Barrier(world_size), [None] * world_size, [None] * world_size

    def work(rank: int) -> None:
        def total(values: Tensor) -> Tensor:
            slots[rank] = values
            barrier.wait()
            summed = torch.stack(list(slots)).sum(0)
            barrier.wait()
            return summed

        results[rank] = measure(lambda count: range(rank, count, world_size), total)

    threads = [Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_moments_are_numpys():
    rows = features(100, 9, seed=1, shift=30)
    found = moments(rows)
    assert found.count == 100
    np.testing.assert_allclose(found.mean, rows.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-10, atol=1e-11)


def test_moments_refuse_what_has_none():
    sums = FeatureMoments(3)
    sums.add(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 images; there are 1"):
        sums.reduce()
    sums.add(torch.tensor([[1.0, float("nan"), 2.0]]))
    with pytest.raises(ValueError, match="not finite"):
        sums.reduce()


def normal(mean: list[float], covariance: Tensor) -> Moments:
    return Moments(10**6, torch.tensor(mean, dtype=torch.float64), covariance.double())


def test_the_distance_of_known_normals():
    """Of diagonal ones, sum (m1 - m2)^2 + (s1 - s2)^2; rotated, the same."""
    first, second = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.0])
    expected = (3**2 + 1 + 0) + (2 - 1) ** 2 + (1 - 3) ** 2 + 0.5**2
    a, b = normal([3, 0, 1], first.diag()), normal([0, 1, 1], second.diag())
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)
    rotation = torch.linalg.qr(features(3, 3, seed=2)).Q
    turned = [Moments(m.count, rotation @ m.mean, rotation @ m.covariance @ rotation.T) for m in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [500, 20])
def test_a_set_is_at_distance_zero_from_itself(count):
    """Also where there are fewer features than dimensions."""
    rows = features(count, 64, seed=3, shift=2)
    assert frechet_distance(moments(rows), moments(rows.flip(0))) < 1e-9


def test_the_distance_is_that_of_torch_fidelity_torchmetrics_and_scipy():
    x, y = features(300, 48, seed=4), features(260, 48, seed=5, shift=0.3)
    found = frechet_distance(moments(x), moments(y))
    fidelity = import_reference("torch_fidelity.metric_fid")
    statistics = map(fidelity.fid_features_to_statistics, (x, y))
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found > 1
    assert found == pytest.approx(theirs, rel=1e-9)
    metrics = import_reference("torchmetrics.image.fid")
    a, b = moments(x), moments(y)
    assert found == pytest.approx(float(metrics._compute_fid(a.mean, a.covariance, b.mean, b.covariance)), rel=1e-9)
    sqrtm = pytest.importorskip("scipy.linalg", reason="an independent matrix root (extra `test`)").sqrtm
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    trace = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    assert found == pytest.approx(float((a.mean - b.mean).square().sum()) + trace, rel=1e-9)


def test_the_kernel_distance_is_that_of_torch_fidelity_and_torchmetrics():
    """Of one subset, and of subsets that are the whole sets, which no choice changes."""
    x, y = features(60, 24, seed=6), features(60, 24, seed=7, shift=0.5)
    fidelity, metrics = import_reference("torch_fidelity.metric_kid"), import_reference("torchmetrics.image.kid")
    found = squared_discrepancy(x, y).item()
    assert found == pytest.approx(metrics.poly_mmd(x, y).item(), rel=1e-9)
    theirs = fidelity.kid_features_to_metric(x, y, kid_subsets=3, kid_subset_size=60, verbose=False)
    ours = kernel_distance(x, y, subsets=3, size=60, seed=0)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours["kid"] == pytest.approx(found, rel=1e-9)
    assert ours["kid_std"] < 1e-12


def test_the_kernel_distance_is_unbiased():
    """Over many subsets of two halves of one distribution its mean is near 0, within its standard error, and its
    standard deviation is that of the subsets.
    """
    rows = features(4000, 8, seed=8)
    found = kernel_distance(rows[:2000], rows[2000:], subsets=400, size=40, seed=1)
    assert abs(found["kid"]) < 5 * found["kid_std"] / 400**0.5
    assert kernel_distance(rows[:2000], rows[2000:], subsets=400, size=40, seed=1) == found
    assert kernel_distance(rows[:2000], rows[2000:], subsets=400, size=40, seed=2) != found


def test_too_few_features_are_refused():
    few = features(5, 3, seed=9)
    with pytest.raises(ValueError, match="subsets of 6 features"):
        kernel_distance(few, features(50, 3, seed=1), subsets=2, size=6, seed=0)
    with pytest.raises(ValueError, match="more than 5 features; there are 5 and 5"):
        precision_recall(few, few, k=5)


def overlapping() -> tuple[Tensor, Tensor]:
    return features(130, 5, seed=10), features(110, 5, seed=11) * 0.7 + 0.4


def test_precision_and_recall_are_those_of_torch_fidelity():
    real, fake = overlapping()
    fidelity = import_reference("torch_fidelity.metric_prc")
    theirs = fidelity.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    found = precision_recall(real, fake)
    assert found == {"precision": pytest.approx(theirs["precision"]), "recall": pytest.approx(theirs["recall"])}
    assert 0.1 < found["recall"] < 0.9 or 0.1 < found["precision"] < 0.9
    assert found["precision"] != found["recall"]


def test_precision_and_recall_of_points_on_a_line():
    """Real points 0, 1, 2, ..., 9: the third neighbors of 0 and 9 are 3 away, those of the others 2 (of 1 and 8: 2)."""
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([[-3.0], [-3.1], [4.5], [11.9], [12.1], [100.0], [101.0], [102.0]])
    found = precision_recall(real, fake)
    assert found["precision"] == 3 / 8
    # third neighbors of the fakes: 14.9 (-3 to 11.9), 15 (-3.1 to 11.9), 7.6, 15, 15.2, 87.9, ...: all reach the line
    assert found["recall"] == 1.0


def share_within(points: Tensor, centers: Tensor, k: int) -> float:
    """The definition, point by point."""
    radii = [sorted((center - other).norm().item() for other in centers)[k] for center in centers]
    within = [any((p - c).norm().item() <= radius for c, radius in zip(centers, radii, strict=True)) for p in points]
    return sum(within) / len(points)


@pytest.mark.parametrize("blocks", [(7, 9), (1000, 10000)])
def test_equal_sets_cover_each_other_and_blocks_change_nothing(blocks, monkeypatch):
    """With repeated features too, whose distances are rounding errors."""
    monkeypatch.setattr("pipeline.evaluation.precision_recall.ROWS", blocks[0])
    monkeypatch.setattr("pipeline.evaluation.precision_recall.COLUMNS", blocks[1])
    real, fake = overlapping()
    repeated = features(8, 300, seed=1, shift=5).repeat(6, 1)
    assert precision_recall(repeated, repeated.flip(0)) == {"precision": 1.0, "recall": 1.0}
    assert torch.equal(squared_distances(repeated, repeated.flip(0)) == 0, torch.cdist(repeated, repeated.flip(0)) < 1)
    expected = {"precision": share_within(fake, real, 3), "recall": share_within(real, fake, 3)}
    assert precision_recall(real, fake) == expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_work_and_get_equal_figures(world_size, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.precision_recall.ROWS", 20)
    real, fake = overlapping()

    def measure(share=range, total=lambda values: values) -> dict[str, float]:
        return precision_recall(real, fake, 3, share, total) | kernel_distance(real, fake, 7, 30, 5, share, total)

    for found in on_ranks(world_size, measure):
        assert found == measure()


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_of_ranks_give_the_moments_of_all(world_size):
    """To rounding: the order of addition differs."""
    rows = features(101, 12, seed=12, shift=3)

    def measure(share=range, total=lambda values: values) -> Moments:
        sums = FeatureMoments(12)
        for i in share(len(rows)):
            sums.add(rows[i : i + 1])
        return sums.reduce(total)

    alone = measure()
    for found in on_ranks(world_size, measure):
        assert found.count == alone.count
        torch.testing.assert_close(found.mean, alone.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(found.covariance, alone.covariance, rtol=0, atol=1e-12)
