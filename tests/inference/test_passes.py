"""Batches in passes: every row once and in order, halved where memory is short."""

import pytest
import torch

from pipeline.inference import passes
from pipeline.inference.passes import in_passes

CPU = torch.device("cpu")


def limited(fits: int, tried: list[int]):
    """Returns the rows of a pass, of which at most `fits` fit into memory."""

    def work(here: slice) -> list[int]:
        tried.append(here.stop - here.start)
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(here.start, here.stop))

    return work


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("fits", [1, 3, 8, 100])
def test_every_row_is_computed_once_and_in_order(monkeypatch, count, fits):
    monkeypatch.setattr(passes, "IMAGES_PER_PASS", 8)
    tried: list[int] = []
    parts = in_passes(limited(fits, tried), count, CPU)
    assert sum(parts, []) == list(range(count))
    assert max(map(len, parts)) <= min(fits, 8)
    too_large = [size for size in tried if size > fits]
    assert too_large == sorted(set(too_large), reverse=True)  # a size that did not fit is not tried again


def test_an_image_that_does_not_fit_and_an_empty_batch_are_errors():
    with pytest.raises(torch.OutOfMemoryError):
        in_passes(limited(0, []), 5, CPU)
    with pytest.raises(ValueError, match="no images"):
        in_passes(limited(1, []), 0, CPU)


def test_a_gpu_starts_with_larger_passes():
    assert passes.images_per_pass(torch.device("cuda")) > passes.images_per_pass(CPU) == passes.IMAGES_PER_PASS
