"""Copies one batch ahead: the same items in the same order, errors in their turn. On a GPU: the same batches."""

import pytest
import torch

from pipeline.data.device_copies import on_device, one_ahead
from pipeline.data.loader import Batch


def make_batches(count: int):
    for number in range(count):
        columns = [torch.full((4,), number) for _ in range(4)]
        images = torch.full((4, 3, 8, 8), number, dtype=torch.uint8)
        yield Batch(images.pin_memory() if torch.cuda.is_available() else images, *columns, torch.zeros(4, 0))


def logged(events: list):
    """`start` and `finish` that note what they get."""

    def start(item):
        events.append(("start", item))
        return item

    def finish(item):
        events.append(("finish", item))
        return item

    return start, finish


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_next_copy_is_under_way_before_an_item_is_handed_over(count):
    events = []
    events.extend(("use", item) for item in one_ahead(range(count), *logged(events)))
    expected = [("start", 0)] if count else []
    for item in range(count):
        following = [("start", item + 1)] if item + 1 < count else []
        expected += [*following, ("finish", item), ("use", item)]
    assert events == expected


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_error_comes_in_its_turn(good):
    def items():
        yield from range(good)
        raise OSError("unreadable")

    iterator = one_ahead(items(), *logged([]))
    assert [next(iterator) for _ in range(good)] == list(range(good))
    with pytest.raises(OSError, match="unreadable"):
        next(iterator)


def test_the_source_is_closed_with_the_iterator():
    """Workers end when training stops early."""
    closed = []

    def items():
        try:
            yield from range(10)
        finally:
            closed.append(True)

    iterator = one_ahead(items(), *logged([]))
    assert next(iterator) == 0
    iterator.close()
    del iterator
    assert closed == [True]


def test_on_a_cpu_nothing_is_between_the_loader_and_training():
    batches = make_batches(1)
    assert on_device(batches, torch.device("cpu")) is batches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_images_arrive(monkeypatch):
    for number, batch in enumerate(on_device(make_batches(50), torch.device("cuda"))):
        assert batch.images.is_cuda
        assert not batch.positions.is_cuda
        assert bool((batch.images == number).all())
