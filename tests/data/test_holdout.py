"""data.holdout: a seeded share of the training split, which training never sees."""

import numpy as np
import pytest

from pipeline.data.holdout import (
    check_holdout,
    describe_holdout,
    held_out_indices,
    num_held_out,
    open_split,
    random_images,
)
from pipeline.data.loader import DataConfig, build_eval_loader, build_train_loader
from pipeline.data.order import Order
from pipeline.data.preprocess import Preprocess
from pipeline.data.shards import TarShards
from shard_data import manifest
from tests.helpers.shard_sets import random_samples, write_set

SEED = 3
CHOSEN = [4, 9, 16, 27, 32, 38]


@pytest.fixture(scope="module")
def samples():
    return random_samples(41, 8, 8, attributes=2)


@pytest.fixture(scope="module")
def root(samples, tmp_path_factory):
    """Shards of 10, 7, 7, 7, 7 and 3; no split val."""
    return write_set(tmp_path_factory.mktemp("set"), {"train": samples, "test": random_samples(5, 8, 8)}, [10, 7])


def opened(root, split: str, holdout: int | float = 12, seed: int = SEED) -> TarShards:
    return open_split(root, split, DataConfig(holdout=holdout, workers=0), seed, verify=True, origin=None)


def test_the_two_parts_are_the_training_split(root, samples):
    train, val = opened(root, "train"), opened(root, "val")
    assert (len(train), len(val), val.split, sum(train.shard_sizes)) == (29, 12, "val", 29)
    whole = TarShards(root, "train").keys(range(41))
    held_out = [whole.index(key) for key in val.keys(range(12))]
    assert held_out == sorted(held_out)
    assert sorted([*train.keys(range(29)), *val.keys(range(12))]) == whole
    np.testing.assert_array_equal(val.images(range(12)), samples.images[held_out])
    np.testing.assert_array_equal(val.labels(range(12)), samples.labels[held_out])
    np.testing.assert_array_equal(val.attributes([11, 0]), samples.attributes[[held_out[11], held_out[0]]])


def test_the_share_depends_on_seed_and_set_alone():
    shares = [held_out_indices(12, 41, seed).tolist() for seed in range(20)]
    assert shares[SEED] == [3, 6, 8, 10, 14, 15, 24, 26, 30, 31, 34, 36]  # written down once: later releases give these
    assert len({tuple(share) for share in shares}) == 20
    counts = np.bincount(np.concatenate([held_out_indices(0.25, 4000, seed) for seed in range(40)]))
    assert counts.sum() == 40 * 1000
    assert counts.max() < 26  # 10 expected of 40, with a standard deviation of 2.7


@pytest.mark.parametrize(("holdout", "count"), [(1, 1), (40, 40), (0.25, 10), (0.001, 1), (0.97, 40)])
def test_numbers_and_fractions(holdout, count):
    assert num_held_out(holdout, 41) == len(held_out_indices(holdout, 41, 0)) == count


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_goes_over_the_others_alone_whatever_the_world_size(root, world_size, workers):
    """Two epochs of 29 in micro-batches of 6: each of the others exactly twice, in one order."""
    train, held_out = opened(root, "train"), set(opened(root, "val").keys(range(12)))
    order = Order(train.shard_sizes, SEED, window=2)
    ranks = [
        build_train_loader(train, Preprocess(SEED), order, micro_batch=6, start=0, stop=10, rank=rank,
                           world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]  # fmt: skip
    indices = [index for batches in zip(*ranks, strict=True) for batch in batches for index in batch.indices.tolist()]
    assert indices == order.at(range(60))[1].tolist()
    keys = train.keys(indices)
    assert not held_out & set(keys)
    assert sorted(keys[:58]) == sorted(2 * train.keys(range(29)))


def test_validation_reads_the_share_in_its_order(root):
    val = opened(root, "val")
    found = [build_eval_loader(val, Preprocess(0), batch_size=5, rank=rank, world_size=2) for rank in range(2)]
    indices = [index for loader in found for batch in loader for index in batch.indices.tolist()]
    assert indices == list(range(12))


def test_other_splits_and_recipes_without_it_are_whole(root):
    assert len(opened(root, "test")) == 5
    assert len(opened(root, "train", holdout=0)) == 41
    with pytest.raises(ValueError, match="no split 'val'"):
        opened(root, "val", holdout=0)


def test_indices_outside_a_part_are_refused(root):
    with pytest.raises(IndexError, match=r"12\.\.12 are outside split 'val' with 12"):
        opened(root, "val").images([12])
    with pytest.raises(IndexError):
        opened(root, "val").subset(np.array([12]))


def test_random_images_are_a_function_of_the_seed_and_keep_the_order(root, samples):
    whole = TarShards(root, "train")
    part = random_images(whole, 6, seed=2)
    chosen = [whole.keys(range(41)).index(key) for key in part.keys(range(6))]
    assert chosen == CHOSEN  # written down once: later releases give these
    np.testing.assert_array_equal(part.images(range(6)), samples.images[CHOSEN])
    assert part.split == "train"
    assert random_images(whole, 6, seed=None) is whole
    assert random_images(whole, None, seed=2) is whole
    assert random_images(whole, 41, seed=2) is whole


def test_every_image_is_chosen_equally_often(root):
    whole = TarShards(root, "train")
    keys = [key for seed in range(400) for key in random_images(whole, 10, seed).keys(range(10))]
    counts = np.array([keys.count(key) for key in whole.keys(range(41))])
    assert counts.sum() == 4000
    assert (abs(counts - 4000 / 41) < 40).all()  # 97.6 expected, with a standard deviation of 8.6


def test_random_images_of_the_held_out_share_are_of_it(root):
    val = opened(root, "val")
    part = random_images(val, 5, seed=0)
    keys = part.keys(range(5))
    assert (len(set(keys)), set(keys) <= set(val.keys(range(12))), part.split) == (5, True, "val")


def test_the_record_names_the_samples(root, tmp_path):
    def record(folder, holdout=12, seed=SEED):
        return describe_holdout(DataConfig(holdout=holdout), seed, opened(folder, "train", holdout, seed))

    other = write_set(tmp_path, {"train": random_samples(41, 8, 8, seed=9)}, [10])
    assert (record(root)["count"], record(root)["of"]) == (12, 41)
    assert record(root, 0) is None
    assert record(root) == record(root)
    different = [record(root), record(root, 11), record(root, seed=4), record(other)]
    assert len({str(one) for one in different}) == 4


@pytest.mark.parametrize(
    ("holdout", "split", "message"),
    [
        (5, "test", r"data\.holdout=5: validation\.split is 'test', .* set validation\.split=val"),
        (41, "val", r"data\.holdout=41: the training split has 41 images; hold out fewer"),
        (0.999, "val", r"data\.holdout=0\.999: the training split has 41 images"),
    ],
)
def test_what_cannot_be_held_out_is_refused(root, holdout, split, message):
    with pytest.raises(ValueError, match=message):
        check_holdout(DataConfig(holdout=holdout), split, manifest.load(root), "here")


def test_a_set_with_a_validation_split_refuses(tmp_path):
    root = write_set(tmp_path, {"train": random_samples(9), "val": random_samples(3)}, [5])
    with pytest.raises(ValueError, match=r"data\.holdout=5: here has a split 'val' already; set data\.holdout=0"):
        check_holdout(DataConfig(holdout=5), "val", manifest.load(root), "here")


@pytest.mark.parametrize("value", [1.0, 5000.0, -1, -0.1, True, "5", float("nan")])
def test_values_that_are_neither_number_nor_fraction(value):
    with pytest.raises(ValueError, match="holdout"):
        DataConfig(holdout=value)
