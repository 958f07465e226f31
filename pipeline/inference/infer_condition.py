"""The condition of an image of unknown class or attributes: the one under which the model finds it most likely.

Maximum likelihood by the model's own bound. Attributes are found by coordinate ascent: they are changed one at a time,
exclusive ones with it, if that raises log p(x | condition). All candidates are compared under the same noise.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pipeline.evaluation.likelihood_bounds import Draws
from pipeline.inference.passes import IMAGES_PER_PASS
from pipeline.inference.trained import TrainedModel
from pipeline.models.conditions import AttributeCondition, ClassCondition
from pipeline.models.noise import draw_noise

LATENT_SAMPLES = 16
"""For each candidate."""
SWEEPS = 4
"""Over all attributes, at most."""


def infer_class(trained: TrainedModel, image: Tensor) -> int:
    """The class under which an image (1, C, H, W) is most likely."""
    condition = trained.recipe.condition
    assert isinstance(condition, ClassCondition)
    candidates = torch.eye(condition.num_classes)
    return int(log_likelihoods(trained, image, candidates).argmax())


def infer_attributes(trained: TrainedModel, image: Tensor, known: Mapping[str, float]) -> dict[str, float]:
    """All attributes of the model's condition, for an image (1, C, H, W): the known ones, and 1 or 0 for the others."""
    condition = trained.recipe.condition
    assert isinstance(condition, AttributeCondition)
    current = condition.changed(torch.zeros(1, condition.size), known)
    best = log_likelihoods(trained, image, current)[0]
    for _ in range(SWEEPS):
        before = current
        for candidates in alternatives(condition, current, known):
            values = log_likelihoods(trained, image, candidates)
            if values.max() > best:
                best, current = values.max(), candidates[values.argmax()][None]
        if torch.equal(before, current):
            break
    return dict(zip(condition.chosen, current[0].tolist(), strict=True))


def alternatives(condition: AttributeCondition, current: Tensor, known: Mapping[str, float]) -> Iterator[Tensor]:
    """For each free attribute, (n, K) rows that differ from `current` (1, K) in it: flipped, with its rivals cleared.

    Known attributes are not changed, and an attribute whose rival is known to be present is not free.
    """
    for name in condition.chosen:
        rivals = [condition.chosen[column] for column in condition.rivals(name)]
        if name in known or any(known.get(rival, 0) > 0.5 for rival in rivals):
            continue
        column = condition.chosen.index(name)
        yield condition.changed(current, {name: 1.0 - float(current[0, column])})


@torch.no_grad()
def log_likelihoods(trained: TrainedModel, image: Tensor, candidates: Tensor) -> Tensor:
    """(n,) float64 log p(image | candidate) for candidates (n, K), nats, with one noise for all."""
    count = len(candidates)
    x = trained.input(image).expand(count, -1, -1, -1)
    condition = candidates.to(trained.device, trained.dtype)

    def noise(draw: int) -> list[Tensor]:
        one = draw_noise(trained.model.noise_groups, 0, f"infer/{draw}", [0], trained.device, trained.dtype)
        return [group.expand(count, *group.shape[1:]) for group in one]

    return Draws(trained.model, x, condition, noise).log_likelihood(LATENT_SAMPLES, rows=IMAGES_PER_PASS)
