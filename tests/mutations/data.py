"""Mistakes in pipeline/data."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "epochs repeat their order of shards",
        "pipeline/data/order.py",
        "keys = hash64(self.seed, Stream.SHARDS, epoch, np.arange(len(self._sizes)))",
        "keys = hash64(self.seed, Stream.SHARDS, 0, np.arange(len(self._sizes)))",
        ("tests/data/test_order.py",),
    ),
    Mutation(
        "epochs repeat their order of samples",
        "pipeline/data/order.py",
        "keys = hash64(self.seed, Stream.SAMPLES, epoch, samples)",
        "keys = hash64(self.seed, Stream.SAMPLES, 0, samples)",
        ("tests/data/test_order.py",),
    ),
    Mutation(
        "the seed does not matter for samples",
        "pipeline/data/order.py",
        "keys = hash64(self.seed, Stream.SAMPLES, epoch, samples)",
        "keys = hash64(0, Stream.SAMPLES, epoch, samples)",
        ("tests/data/test_order.py",),
    ),
    Mutation(
        "windows begin one sample late",
        "pipeline/data/order.py",
        'side="right") - 1',
        'side="left") - 1',
        ("tests/data/test_order.py",),
    ),
)
