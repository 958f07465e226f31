"""Random numbers as a pure function of integers, for everything random in the data pipeline.

This is not a library's generator because the order of samples must never change, and NumPy promises that only for
single bit generators, not for its permutations. The mixing function is the finalizer of SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; variant 13 of Stafford's constants).
"""

from enum import IntEnum

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """What a random number is for: equal integers in different streams give unrelated numbers. Never renumber."""

    SHARDS = 1
    SAMPLES = 2
    FLIP = 3
    BINARIZE = 4
    REPLACE = 5
    HOLDOUT = 6
    CHOICE = 7


def mix64(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of 64-bit integers: uint64 array -> uint64 array of the same shape."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers (|word| < 2^63) and integer arrays that broadcast together into a uint64 array (1-D or more).

    Bijective in the last word: with the others fixed, different last words give different hashes.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        # At least one dimension: NumPy warns when scalars overflow and lets arrays wrap, which is intended here.
        state = mix64((state + GOLDEN_GAMMA) ^ np.atleast_1d(word).astype(np.uint64))
    return state
