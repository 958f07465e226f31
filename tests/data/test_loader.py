"""Batches for training and evaluation: the same for every number of ranks and workers."""

import contextlib
import multiprocessing
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.loader import Batch, Batches, DataConfig, build_eval_loader, build_train_loader, check_data
from pipeline.data.order import Order
from pipeline.data.preprocess import Preprocess
from pipeline.data.shards import TarShards, UnreadableShard
from shard_data import manifest
from tests.helpers.shard_sets import Samples, random_samples, write_set

BATCH = 840  # divides among 1 to 8 ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Samples]:
    samples = random_samples(1100, 3, 4, 1, attributes=2)
    splits = {"train": samples, "test": random_samples(37, 3, 4, 1, attributes=2, seed=5)}
    return write_set(tmp_path_factory.mktemp("loader") / "set", splits, [90, 41]), samples


def train_loader(root: Path, **changes) -> Batches:
    shards = TarShards(root, "train")
    arguments = {"micro_batch": BATCH, "start": 0, "stop": 3} | changes
    preprocess = Preprocess(seed=3, flip=True, binarize="dynamic", pad=1)
    return build_train_loader(shards, preprocess, Order(shards.shard_sizes, seed=3, window=4), **arguments)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*(batch[:6] for batch in batches), strict=True)))


def assert_equal(left: Batch, right: Batch) -> None:
    assert list(left.skipped) == list(right.skipped)
    for name, a, b in zip(Batch._fields[:6], left[:6], right[:6], strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def uninterrupted(made) -> list[Batch]:
    return list(train_loader(made[0]))


def test_a_batch_holds_what_the_order_says(made, uninterrupted):
    """Against the order and the original samples, three batches over two epochs."""
    root, samples = made
    order = Order(TarShards(root, "train").shard_sizes, seed=3, window=4)
    preprocess = Preprocess(seed=3, flip=True, binarize="dynamic", pad=1)
    for number, batch in enumerate(uninterrupted):
        positions = np.arange(number * BATCH, (number + 1) * BATCH)
        epochs, indices = order.at(positions)
        assert batch.images.shape == (BATCH, 1, 5, 6)
        assert batch.images.dtype == torch.uint8
        assert [column.dtype for column in batch[1:6]] == [torch.int64] * 4 + [torch.int8]
        np.testing.assert_array_equal(batch.positions, positions)
        np.testing.assert_array_equal(batch.epochs, epochs)
        np.testing.assert_array_equal(batch.indices, indices)
        np.testing.assert_array_equal(batch.images, preprocess(samples.images[indices], epochs, indices))
        np.testing.assert_array_equal(batch.labels, samples.labels[indices])
        np.testing.assert_array_equal(batch.attributes, samples.attributes[indices])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_global_batches_are_the_same_for_any_world_and_workers(made, uninterrupted, world_size, workers):
    ranks = [
        list(train_loader(made[0], rank=rank, world_size=world_size, workers=workers)) for rank in range(world_size)
    ]
    for expected, *shares in zip(uninterrupted, *ranks, strict=True):
        assert {len(share.images) for share in shares} == {BATCH // world_size}
        assert_equal(joined(shares), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_starting_later_gives_the_tail(made, uninterrupted, start, workers):
    tail = list(train_loader(made[0], start=start, workers=workers))
    assert len(tail) == 3 - start
    for batch, expected in zip(tail, uninterrupted[start:], strict=True):
        assert_equal(batch, expected)


def test_micro_batches_make_up_the_same_stream(made, uninterrupted):
    assert_equal(joined(list(train_loader(made[0], micro_batch=60, stop=42))), joined(uninterrupted))


def test_a_pickled_source_reads_the_same(made, uninterrupted):
    """As a worker gets it that is not forked."""
    source = pickle.loads(pickle.dumps(train_loader(made[0], stop=1)._source))  # noqa: S301 - our own object
    assert_equal(next(iter(Batches(source, range(1)))), uninterrupted[0])


def test_ranks_that_do_not_divide_the_batch_are_refused(made):
    with pytest.raises(ValueError, match="global micro-batch of 840 does not divide among 9 processes"):
        train_loader(made[0], world_size=9)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_missing_shard_is_named_by_any_worker(tmp_path, workers):
    root = write_set(tmp_path, {"train": random_samples(300, 3, 4, 1)}, [50])
    (root / "train-000003.tar").unlink()
    with pytest.raises(
        UnreadableShard, match=r"train-000003\.tar: sample 'train-s00\d+' at offset \d+: No such file"
    ) as caught:
        list(train_loader(root, micro_batch=30, stop=10, workers=workers))
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_the_error_comes_in_its_turn(tmp_path):
    """Not when a worker that reads ahead finds it: the steps before it are the same for any number of workers."""
    root = write_set(tmp_path, {"train": random_samples(300, 3, 4, 1)}, [50])
    (root / "train-000003.tar").unlink()
    before = [positions_before_the_error(root, workers) for workers in (0, 1, 3)]
    assert len(before[0]) > 3
    assert before[0] == before[1] == before[2]


def positions_before_the_error(root: Path, workers: int) -> list[int]:
    batches = iter(train_loader(root, micro_batch=2, stop=150, workers=workers))
    positions = []
    with contextlib.suppress(UnreadableShard):
        while True:
            positions += next(batches).positions.tolist()
    return positions


# ---------------------------------------------------------------------------------------------------------- evaluation


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 60), st.none() | st.integers(1, 60))
def test_evaluation_sees_each_sample_on_exactly_one_rank(made, world_size, batch_size, limit):
    shards = TarShards(made[0], "test")
    preprocess = Preprocess(seed=3, binarize="dynamic")
    batches = []
    for rank in range(world_size):
        mine = list(build_eval_loader(shards, preprocess, batch_size, rank, world_size, limit))
        assert all(0 < len(batch.images) <= max(1, batch_size // world_size) for batch in mine)
        batches += mine
    everything = joined(batches)
    count = min(limit or 37, 37)
    assert everything.indices.tolist() == everything.positions.tolist() == list(range(count))
    assert everything.epochs.tolist() == [0] * count
    assert_equal(everything, next(iter(build_eval_loader(shards, preprocess, 100, limit=count))))


def test_evaluation_is_the_same_each_time_and_with_workers(made):
    shards = TarShards(made[0], "test")
    preprocess = Preprocess(seed=3, binarize="dynamic")
    first = list(build_eval_loader(shards, preprocess, 10))
    assert [len(batch.images) for batch in first] == [10, 10, 10, 7]
    for workers in (0, 2):
        again = list(build_eval_loader(shards, preprocess, 10, workers=workers))
        for a, b in zip(first, again, strict=True):
            assert_equal(a, b)


# ------------------------------------------------------------------------------------------------- unreadable samples


def unreadable_copy(root: Path, to: Path, *indices: int) -> Path:
    """A copy of the set in which the .npy headers of these training samples are wrong."""
    shutil.copytree(root, to)
    shards = TarShards(to, "train")
    starts = np.cumsum((0, *shards.shard_sizes))
    for index in indices:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        offset = np.load(to / f"train-{number:06d}.index.npy")["offset"][index - starts[number]]
        with (to / f"train-{number:06d}.tar").open("r+b") as file:
            file.seek(int(offset))
            file.write(b"?")
    return to


UNREADABLE = (0, 95, 96, 1099)


@pytest.fixture(scope="module")
def unreadable(made, tmp_path_factory) -> Path:
    return unreadable_copy(made[0], tmp_path_factory.mktemp("unreadable") / "set", *UNREADABLE)


@pytest.fixture(scope="module")
def skipping(unreadable) -> list[Batch]:
    return list(train_loader(unreadable, on_error="skip"))


def test_others_take_the_places_of_unreadable_samples(made, uninterrupted, skipping):
    """All else is as in the whole set; the skipped samples are reported with their places, in both epochs."""
    _, samples = made
    preprocess = Preprocess(seed=3, flip=True, binarize="dynamic", pad=1)
    skipped = [sample for batch in skipping for sample in batch.skipped]
    drawn = [index for batch in uninterrupted for index in batch.indices.tolist()]
    assert sorted(sample.index for sample in skipped) == sorted(index for index in drawn if index in UNREADABLE)
    assert len(skipped) >= 2 * len(UNREADABLE)
    for batch, expected in zip(skipping, uninterrupted, strict=True):
        places = [int(sample.position - batch.positions[0]) for sample in batch.skipped]
        assert set(expected.indices[places].tolist()) <= set(UNREADABLE)
        assert not set(batch.indices.tolist()) & set(UNREADABLE)
        assert batch.indices[places].tolist() == [sample.replaced_by for sample in batch.skipped]
        indices, epochs = batch.indices.numpy(), batch.epochs.numpy()
        np.testing.assert_array_equal(batch.images, preprocess(samples.images[indices], epochs, indices))
        np.testing.assert_array_equal(batch.labels, samples.labels[indices])
        others = np.setdiff1d(np.arange(BATCH), places)
        for name in Batch._fields[:6]:
            assert torch.equal(getattr(batch, name)[others], getattr(expected, name)[others])
        assert torch.equal(batch.positions, expected.positions)
    for sample in skipped:
        assert re.search(rf"train-0000\d\d\.tar: sample 'train-s{sample.index:05d}' at offset \d+: ", sample.problem)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 1), (7, 0)])
def test_replacements_are_the_same_for_any_world_and_workers(unreadable, skipping, world_size, workers):
    ranks = [
        list(train_loader(unreadable, rank=rank, world_size=world_size, workers=workers, on_error="skip"))
        for rank in range(world_size)
    ]
    for expected, *shares in zip(skipping, *ranks, strict=True):
        skipped = [sample for share in shares for sample in share.skipped]
        assert_equal(joined(shares)._replace(skipped=skipped), expected)


def test_a_missing_shard_is_skipped_too(made, tmp_path):
    root = unreadable_copy(made[0], tmp_path / "set")
    for name in ("train-000001.tar", "train-000004.index.npy"):
        (root / name).unlink()
    lost = {*range(90, 131), *range(213, 254)}
    batches = list(train_loader(root, on_error="skip", stop=2))
    seen = {index for batch in batches for index in batch.indices.tolist()}
    assert seen <= set(range(1100)) - lost
    assert {sample.index for batch in batches for sample in batch.skipped} == lost


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_a_readable_sample_ends_the_run(made, tmp_path, workers):
    root = unreadable_copy(made[0], tmp_path / "set")
    for path in root.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(UnreadableShard, match=r"at offset .*100 samples tried in its place are unreadable as well"):
        list(train_loader(root, on_error="skip", workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_skips_unreadable_samples(unreadable, workers):
    shards = TarShards(unreadable, "train")
    loader = build_eval_loader(shards, Preprocess(seed=3), 1, limit=100, workers=workers, on_error="skip")
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [int(i not in UNREADABLE) for i in range(100)]
    assert joined(batches).indices.tolist() == [i for i in range(100) if i not in UNREADABLE]
    skipped = [sample for batch in batches for sample in batch.skipped]
    assert [(sample.index, sample.replaced_by) for sample in skipped] == [(0, None), (95, None), (96, None)]


def test_a_batch_without_a_readable_sample_is_empty(unreadable):
    batch = build_eval_loader(
        TarShards(unreadable, "train"),
        Preprocess(seed=3, binarize="dynamic", flip=True, pad=2),
        1,
        limit=1,
        on_error="skip",
    )
    (batch,) = batch
    assert batch.images.shape == (0, 1, 7, 8)
    assert [len(column) for column in batch] == [0] * 6 + [1]


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> tuple[Path, Samples]:
    samples = random_samples(60, 6, 6)
    return write_set(tmp_path_factory.mktemp("victim"), {"train": samples}, [10], "png"), samples


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_changes_neither_hang_nor_change_a_sample(victim, data):
    """Cuts and byte flips: the samples that come are right, the others are reported with the file that was changed."""
    root, samples = victim
    path = data.draw(st.sampled_from(sorted(path for path in root.iterdir() if path.name != "manifest.json")))
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    path.write_bytes(data.draw(st.sampled_from([whole[:place], flipped])))
    on_error, workers = data.draw(st.sampled_from(["raise", "skip"])), data.draw(st.sampled_from([0, 0, 0, 1]))
    problems = []
    try:
        for batch in train_loader(root, micro_batch=15, stop=4, on_error=on_error, workers=workers):
            indices, epochs = batch.indices.numpy(), batch.epochs.numpy()
            expected = Preprocess(seed=3, flip=True, binarize="dynamic", pad=1)(
                samples.images[indices], epochs, indices
            )
            np.testing.assert_array_equal(batch.images, expected)
            np.testing.assert_array_equal(batch.labels, samples.labels[indices])
            problems += [sample.problem for sample in batch.skipped]
    except UnreadableShard as error:
        problems += [str(error)] if on_error == "raise" else ["none is readable"]
    finally:
        path.write_bytes(whole)
    assert all(path.name in problem for problem in problems)


# ------------------------------------------------------------------------------------------------------------ settings


def test_data_that_fits_the_recipe_passes(made):
    config = DataConfig(size=28, channels=1)
    square = write_set(made[0].parent / "square", {"train": random_samples(2, 28, 28, 1)}, [2])
    check_data(config, manifest.load(square)["image"], "square")


def test_data_of_another_size_or_channels_is_refused(made):
    square = manifest.load(write_set(made[0].parent / "rgb", {"train": random_samples(2, 8, 8, 3)}, [2]))["image"]
    with pytest.raises(ValueError, match=r"data\.size is 32, but .* images of 8x8; .*of 32x32 images with --data"):
        check_data(DataConfig(size=32, channels=3), square, "rgb")
    with pytest.raises(ValueError, match=r"data\.channels is 1, but .* images of 3 channels; .*--data"):
        check_data(DataConfig(size=8, channels=1), square, "rgb")
    with pytest.raises(ValueError, match="3x4"):
        check_data(DataConfig(size=3, channels=1), manifest.load(made[0])["image"], "made")


@pytest.mark.parametrize(
    "bad", [{"bits": 9}, {"bits": 0}, {"pad": -1}, {"window": 0}, {"workers": -1}, {"binarize": "yes"}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DataConfig(**bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_pinned_for_a_gpu(made, uninterrupted):
    batch = next(iter(train_loader(made[0], workers=1, pin_memory=True)))
    assert isinstance(batch, Batch)
    assert batch.images.is_pinned()
    assert_equal(batch, uninterrupted[0])
