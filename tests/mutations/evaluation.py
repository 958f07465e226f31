"""Mistakes in pipeline/evaluation."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "importance weights without their number",
        "pipeline/evaluation/likelihood_bounds.py",
        "return total - log(draws)",
        "return total",
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "the weight forgets the prior",
        "pipeline/evaluation/likelihood_bounds.py",
        "(out.log_px + out.log_pz - out.log_qz)",
        "(out.log_px - out.log_qz)",
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "draws share their noise",
        "pipeline/evaluation/likelihood_bounds.py",
        'f"validate/{draw}{which}"',
        'f"validate/0{which}"',
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "log_px is the bound",
        "pipeline/evaluation/likelihood_bounds.py",
        "[first.elbo.double(), first.log_px.double()]",
        "[first.elbo.double(), first.elbo.double()]",
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "active units count batches",
        "pipeline/evaluation/likelihood_bounds.py",
        "torch.cat(list(first.kl_units)).double() * count",
        "torch.cat(list(first.kl_units)).double()",
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "the standard error is that of an image",
        "pipeline/evaluation/bound_totals.py",
        "(squares / (count - 1) / count).sqrt()",
        "(squares / (count - 1)).sqrt()",
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "bits per dimension of the wrong sign",
        "pipeline/evaluation/bound_totals.py",
        "sign = 1 if ending else -1",
        "sign = 1",
        ("tests/scripts/test_evaluate.py",),
    ),
)
