"""How many samples of a class-conditional model a classifier recognizes as the class that they were sampled for."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pipeline.evaluation.edit_metric import border_around
from pipeline.models.base import VAE, evaluating, without_border
from pipeline.models.classifier import Classifier
from pipeline.models.noise import draw_noise

IMAGES_PER_PASS = 250


@torch.no_grad()
def recognition(
    model: VAE,
    classifier: Classifier,
    per_class: int,
    temperature: float,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    shown: Callable[[Sequence[Tensor]], Iterable[Tensor]] = lambda passes: passes,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Shares in [0, 1] of `per_class` prior samples of each class: `recognized`, and `recognized/NAME` by class.

    The same on any number of processes: sample i is a function of (seed, i) and made on rank i mod world_size. The
    model keeps its mode. `shown` passes the batches on, and may show how far it is. `autocast` is for the model; the
    classifier computes in the precision of its input. Raises ValueError unless model and classifier have the same
    number of classes and take the same images.
    """
    num_classes = len(classifier.names)
    if classifier.kind != "classes" or model.condition_size != num_classes:
        raise ValueError(
            f"the classifier was trained with {num_classes} {classifier.kind}, the model with {model.condition_size} "
            "classes; train both on one set with classes"
        )
    reference = next(model.parameters())
    judge = classifier.to(reference.device, reference.dtype)
    border = border_around(model.image_shape, judge.image_shape)
    one_hot = torch.eye(num_classes, dtype=reference.dtype, device=reference.device)
    right = torch.zeros(num_classes, dtype=torch.float64, device=reference.device)
    with evaluating(model):
        for positions in shown(torch.arange(rank, num_classes * per_class, world_size).split(IMAGES_PER_PASS)):
            classes = (positions // per_class).to(reference.device)  # (b,)
            place = positions.tolist(), reference.device, reference.dtype
            noise = draw_noise(model.groups, seed, "recognition", *place)
            with autocast():
                images = model.sample(noise, temperature, one_hot[classes])
            predicted = judge(without_border(images, border).to(reference.dtype)).argmax(1)
            right.index_add_(0, classes, (predicted == classes).double())
    shares = (sum_over_ranks(right) / per_class).tolist()
    by_class = {f"recognized/{name}": share for name, share in zip(judge.names, shares, strict=True)}
    return {"recognized": sum(shares) / num_classes} | by_class
