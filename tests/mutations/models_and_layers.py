"""Mistakes in pipeline/models and pipeline/nn."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "shapes are not compared",
        "pipeline/models/weights.py",
        "if found.shape != expected.shape:",
        "if False:",
        ("tests/training/test_state.py",),
    ),
    Mutation(
        "non-finite weights are loaded",
        "pipeline/models/weights.py",
        "if not bool(torch.isfinite(found).all()):",
        "if False:",
        ("tests/training/test_state.py",),
    ),
    Mutation(
        "gradients of batch norm by the moments of this rank alone",
        "pipeline/nn/batch_norm.py",
        "dy_mean, covariance = collectives.all_reduce(sums) / count",
        "dy_mean, covariance = sums / count",
        ("tests/nn/test_layers.py",),
    ),
)
