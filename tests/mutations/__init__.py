"""The mistakes that `make mutate` makes, and the tests that must notice each of them. One module per folder of code,
and one each for VDVAE, for sample metrics, for what makes figures comparable, and for checkpoints of other
implementations.
"""

from tests.mutations import (
    conversion,
    data,
    distributed,
    evaluation,
    figures,
    models_and_layers,
    sample_metrics,
    storage,
    trainer,
    training,
    vdvae,
)
from tests.mutations.mutation import Mutation

MODULES = (
    conversion,
    data,
    distributed,
    evaluation,
    figures,
    models_and_layers,
    sample_metrics,
    storage,
    trainer,
    training,
    vdvae,
)
MUTATIONS: tuple[Mutation, ...] = tuple(mutation for module in MODULES for mutation in module.MUTATIONS)
