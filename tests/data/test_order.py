"""The order of samples: each once per epoch, never changing, and a function of (sizes, seed, window) alone."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lru_cache import LRUCache
from pipeline.data.order import Order
from pipeline.data.random_hash import Stream, hash64, mix64

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)
SEEDS = st.integers(-(2**63) + 1, 2**63 - 1)
WINDOWS = st.integers(1, 14)


def reference_mix(z: int) -> int:
    """SplitMix64's finalizer in plain integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_hash(*words: int) -> int:
    state = 0
    for word in words:
        state = reference_mix(((state + GAMMA) & MASK) ^ (word & MASK))
    return state


def reference_epoch(sizes: list[int], seed: int, window: int, epoch: int) -> list[int]:
    """An epoch's indices in order, restated without arrays."""
    shards = sorted(range(len(sizes)), key=lambda shard: reference_hash(seed, 1, epoch, shard))
    order = []
    for first in range(0, len(shards), window):
        members = [sum(sizes[:s]) + i for s in shards[first : first + window] for i in range(sizes[s])]
        order += sorted(members, key=lambda sample: reference_hash(seed, 2, epoch, sample))
    return order


def epoch_of(order: Order, epoch: int) -> list[int]:
    size = order.epoch_size
    epochs, indices = order.at(np.arange(epoch * size, (epoch + 1) * size))
    assert set(epochs.tolist()) == {epoch}
    return indices.tolist()


def test_mixing_gives_the_published_sequence_of_splitmix64():
    """The first outputs for seed 1234567, as listed with the reference implementation and on Rosetta Code."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GAMMA)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.lists(SEEDS, min_size=1, max_size=5))
def test_hash_equals_plain_integers(words):
    assert hash64(*words).tolist() == [reference_hash(*words)]
    *head, last = words
    assert hash64(*head, np.array([last, 7])).tolist() == [reference_hash(*head, last), reference_hash(*head, 7)]


def test_hashes_of_a_million_neighbours_are_all_different():
    assert len(np.unique(hash64(5, Stream.SAMPLES, 0, np.arange(1_000_000)))) == 1_000_000


@settings(deadline=None)
@given(SIZES, SEEDS, WINDOWS, st.integers(0, 2**40))
def test_an_epoch_equals_the_plain_restatement(sizes, seed, window, epoch):
    indices = epoch_of(Order(sizes, seed, window), epoch)
    assert indices == reference_epoch(sizes, seed, window, epoch)
    assert sorted(indices) == list(range(sum(sizes)))


def test_the_order_is_frozen():
    """Literal numbers: a change here changes the data of every run that is resumed."""
    order = Order([3, 5, 4, 2], seed=7, window=2)
    assert epoch_of(order, 0) == [7, 4, 9, 10, 6, 5, 11, 3, 8, 1, 0, 2, 13, 12]
    assert epoch_of(order, 1) == [6, 3, 5, 7, 0, 1, 4, 2, 12, 11, 9, 13, 8, 10]
    assert hash64(1, 2, 2).tolist() == [16082309311974572754]


@settings(deadline=None)
@given(SIZES, SEEDS, WINDOWS, st.lists(st.integers(0, 400), min_size=1, max_size=60))
def test_any_positions_in_any_sequence_agree_with_the_whole_stream(sizes, seed, window, positions):
    """Straddling epochs, repeats, backward jumps: earlier calls do not matter."""
    stream = Order(sizes, seed, window).at(np.arange(401))
    order = Order(sizes, seed, window)
    for some in (positions, positions[::-1], positions[:1]):
        epochs, indices = order.at(some)
        assert epochs.dtype == indices.dtype == np.int64
        assert epochs.tolist() == stream[0][some].tolist()
        assert indices.tolist() == stream[1][some].tolist()


@settings(deadline=None)
@given(SIZES, SEEDS, WINDOWS, st.integers(1, 40), st.integers(0, 9))
def test_resuming_at_any_step_gives_the_rest_of_the_uninterrupted_run(sizes, seed, window, batch, step):
    uninterrupted = Order(sizes, seed, window)
    batches = [uninterrupted.at(np.arange(s * batch, (s + 1) * batch))[1].tolist() for s in range(10)]
    resumed = pickle.loads(pickle.dumps(Order(sizes, seed, window)))  # noqa: S301 - our own object, as a worker gets it
    tail = [resumed.at(np.arange(s * batch, (s + 1) * batch))[1].tolist() for s in range(step, 10)]
    assert tail == batches[step:]


@settings(deadline=None)
@given(SIZES, SEEDS, WINDOWS, st.integers(1, 9), st.integers(1, 5))
def test_shares_of_any_world_make_up_the_same_stream_exactly_once(sizes, seed, window, world, per_rank):
    """Contiguous shares, read by separate objects; three epochs hold each sample three times."""
    batch = world * per_rank
    ranks = [Order(sizes, seed, window) for _ in range(world)]
    total = 3 * sum(sizes)
    seen = []
    for first in range(0, total, batch):
        for rank, order in enumerate(ranks):
            seen += order.at(first + rank * per_rank + np.arange(per_rank))[1].tolist()
    assert seen[:total] == Order(sizes, seed, window).at(np.arange(total))[1].tolist()
    assert set(Counter(seen[:total]).values()) == {3}


def test_epochs_and_seeds_differ():
    epochs = [tuple(epoch_of(Order([10] * 5, seed, 2), epoch)) for seed in (0, 1, -1, 2**62) for epoch in range(5)]
    assert len(set(epochs)) == 20


@pytest.mark.parametrize("window", [1, 2, 3, 7, 20])
def test_a_window_reads_no_more_shards_than_it_says(window):
    sizes = [6, 1, 9, 4, 4, 8, 2]
    shard_of = np.repeat(np.arange(7), sizes)
    shards = shard_of[epoch_of(Order(sizes, 3, window), 4)]
    start, groups = 0, []
    while start < len(shards):
        members = set()
        while start < len(shards) and (len(members) < window or shards[start] in members):
            members.add(shards[start])
            start += 1
        groups.append(members)
    assert sum(map(len, groups)) == 7  # no shard comes back once its window is over


def test_a_window_over_all_shards_is_a_uniform_shuffle():
    """Every sample is equally likely in every slot: chi-square over 4,000 epochs, and all 24 orders of four samples."""
    order = Order([3, 1, 4], seed=11, window=3)
    slots = np.array([epoch_of(order, epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(column, minlength=8) for column in slots.T])
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert 20 < chi_square < 90  # 49 degrees of freedom: mean 49, deviation 10
    small = Order([2, 2], seed=12, window=2)
    orders = Counter(tuple(epoch_of(small, epoch)) for epoch in range(2400))
    assert len(orders) == 24
    assert sum((n - 100) ** 2 / 100 for n in orders.values()) < 60  # 23 degrees of freedom


def test_an_epoch_of_a_hundred_million_samples_opens_one_window_only():
    """What a window costs does not grow with the set: only the windows that are used are made."""
    order = Order([2000] * 50_000, seed=0, window=32)
    epochs, indices = order.at(np.arange(2**40, 2**40 + 512))
    assert epochs.tolist() == [2**40 // 10**8] * 512
    assert len(np.unique(indices)) == 512
    assert 0 <= indices.min() <= indices.max() < 10**8
    assert len(np.unique(indices // 2000)) <= 32
    assert len(order._windows) == 1


@pytest.mark.parametrize(
    ("sizes", "window", "message"),
    [([], 1, "at least one shard"), ([3, 0], 1, "at least one sample"), ([3], 0, "window is 0")],
)
def test_wrong_arguments_are_refused(sizes, window, message):
    with pytest.raises(ValueError, match=message):
        Order(sizes, 0, window)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="position -1: positions count from 0"):
        Order([3], 0, 1).at([0, -1])


def test_the_cache_keeps_the_last_used_values_and_its_copy_is_empty():
    made = []
    recent = LRUCache(2)
    for key in "aabacab":
        assert recent.get(key, lambda key=key: made.append(key) or key.upper()) == key.upper()
    assert made == ["a", "b", "c", "b"]
    assert len(recent) == 2
    assert len(pickle.loads(pickle.dumps(recent))) == 0  # noqa: S301 - our own object
