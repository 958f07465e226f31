"""Features of images that ranks share: those of one rank, to the bit, with the Inception graph too."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.evaluation.image_features import FeatureCollector, ImageFeatures, to_pixels
from pipeline.evaluation.inception import Inception, network_input
from tests.helpers.feature_networks import SmallNetwork, inception_state

CPU = torch.device("cpu")


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def collector(network: nn.Module, count: int, per_pass: int) -> FeatureCollector:
    made = FeatureCollector(network, CPU, torch.float32, count, "pytorch-fid", "float", keep_rows=True)
    made.images_per_pass = per_pass
    return made


def collected(network: nn.Module, shares: list[list[int]], count: int = 6, per_pass: int = 4) -> ImageFeatures:
    """Of `count` images on ranks that have these, added one after the other; the last rank's result."""
    ranks = [collector(network, count, per_pass) for _ in shares]
    for rank, share in zip(ranks, shares, strict=True):
        for i in share:
            rank.add(images(count)[i : i + 1], [i])
        while rank._images:
            rank._pass()
    summed = iter([[rank.sums._sums for rank in ranks], [rank.rows for rank in ranks], [rank.seen for rank in ranks]])
    return ranks[-1].finish(lambda _own: torch.stack(next(summed)).sum(0))


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3], [4, 5]], [[5, 3, 1], [4, 2, 0]], [[0, 1, 2, 3, 4, 5], []]])
def test_ranks_have_the_rows_of_one_to_the_bit(shares):
    alone = collected(SmallNetwork(), [[0, 1, 2, 3, 4, 5]])
    found = collected(SmallNetwork(), shares)
    assert torch.equal(found.rows, alone.rows)
    torch.testing.assert_close(found.moments.covariance, alone.moments.covariance, rtol=1e-12, atol=1e-14)
    assert found.moments.count == 6
    expected = SmallNetwork()(network_input(images(6) * 255, "pytorch-fid"))
    torch.testing.assert_close(alone.rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rows_of_inception_do_not_depend_on_the_other_images_of_a_pass():
    network = Inception()
    network.load_state_dict(inception_state(2))
    alone = collected(network, [[0, 1, 2, 3, 4, 5]])
    found = collected(network, [[5, 3, 1], [4, 2, 0]])
    assert alone.rows.std() > 0.01
    assert torch.equal(found.rows, alone.rows)


def test_images_that_nobody_added_are_absent():
    found = collected(SmallNetwork(), [[4, 0], [1]])
    alone = collected(SmallNetwork(), [[0, 1, 2, 3, 4, 5]])
    assert torch.equal(found.rows, alone.rows[[0, 1, 4]])
    assert found.moments.count == 3


def test_rounding_is_to_the_nearest_level():
    values = torch.tensor([-0.1, 0.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 1.0, 1.2])
    assert to_pixels(values, "uint8").tolist() == [0, 0, 0, 1, 255, 255]
    assert to_pixels(values, "float").tolist() == pytest.approx([0, 0, 0.4745, 0.5255, 255, 255], abs=1e-4)
