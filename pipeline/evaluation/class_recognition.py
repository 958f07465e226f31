"""How many samples a classifier recognises as the class that was asked for."""

from collections.abc import Callable

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
) -> dict[str, float]:
    """Shares in [0, 1] of `per_class` prior samples of each class: `recognised`, and `recognised/NAME` by class.

    The same on any number of processes: sample i is drawn by (seed, i), on rank i mod world_size. The model is left in
    its mode. Raises ValueError unless model and classifier have the same number of classes and the same images.
    """
    num_classes = len(classifier.names)
    if classifier.kind != "classes" or model.condition_size != num_classes:
        raise ValueError(
            f"the classifier tells {num_classes} {classifier.kind}, the model is told {model.condition_size} classes; "
            "both must be trained on one set with classes"
        )
    reference = next(model.parameters())
    judge = classifier.to(reference.device, reference.dtype)
    border = border_around(model.image_shape, judge.image_shape)
    one_hot = torch.eye(num_classes, dtype=reference.dtype, device=reference.device)
    right = torch.zeros(num_classes, dtype=torch.float64, device=reference.device)
    with evaluating(model):
        for positions in torch.arange(rank, num_classes * per_class, world_size).split(IMAGES_PER_PASS):
            asked = (positions // per_class).to(reference.device)  # (b,)
            place = positions.tolist(), reference.device, reference.dtype
            images = model.sample(draw_noise(model.groups, seed, "recognition", *place), temperature, one_hot[asked])
            seen = judge(without_border(images, border)).argmax(1)
            right.index_add_(0, asked, (seen == asked).double())
    shares = (sum_over_ranks(right) / per_class).tolist()
    by_class = {f"recognised/{name}": share for name, share in zip(judge.names, shares, strict=True)}
    return {"recognised": sum(shares) / num_classes} | by_class
