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
        'f"validate/{draw}"',
        '"validate/0"',
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "log_px is the bound",
        "pipeline/evaluation/likelihood_bounds.py",
        'meter.add("log_px", first.log_px.sum(), count)',
        'meter.add("log_px", first.elbo.sum(), count)',
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "a batch counts as one image",
        "pipeline/evaluation/likelihood_bounds.py",
        'meter.add("elbo", first.elbo.sum(), count)',
        'meter.add("elbo", first.elbo.mean(), 1)',
        ("tests/scripts/test_evaluate.py",),
    ),
    Mutation(
        "bits per dimension of the wrong sign",
        "pipeline/evaluation/likelihood_bounds.py",
        'bits_per_dimension(-means["elbo"], num_dimensions)',
        'bits_per_dimension(means["elbo"], num_dimensions)',
        ("tests/scripts/test_evaluate.py",),
    ),
)
