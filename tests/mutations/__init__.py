"""The mistakes that `make mutate` makes, and the tests that must notice each of them. One module per folder of code,
and one for sample metrics."""

from tests.mutations import data, distributed, evaluation, models_and_layers, sample_metrics, storage, trainer, training
from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = tuple(
    mutation
    for module in (data, distributed, evaluation, models_and_layers, sample_metrics, storage, trainer, training)
    for mutation in module.MUTATIONS
)
