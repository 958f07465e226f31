"""A small convolutional classifier of classes or attributes.

`pipeline/train_classifier.py` trains it and `pipeline.run.classifier_folder` stores it. It has two uses: a term in the
loss of `attribute_vae`, and the metrics of a trained model. These need two classifiers, trained with different seeds.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.schema import Section

SMALLEST_MAP = 4  # side in pixels of the feature map that the hidden layer takes
HIDDEN = 128

Kind = Literal["classes", "attributes"]


class ClassifierConfig(Section):
    """What a classifier predicts, for which images. Its folder holds this section and the weights."""

    kind: Kind
    """`classes`: an image has one of `names`. `attributes`: an image has each of `names` or not."""
    names: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Of the classes or attributes, in the order of the output's columns."""
    image_shape: Annotated[tuple[int, int, int], Field(strict=False)]
    """(C, H, W)."""
    width: Annotated[int, Field(ge=1)] = 32
    """Channels of the first stage. The second has twice, all later ones have four times as many."""


class Classifier(nn.Module):
    """Stages of a 3x3 convolution, batch norm, ReLU and 2x2 max pooling; then a hidden and an output layer.

    There are as many stages as leave a feature map of at least 4x4. The map is pooled to 4x4 for the hidden layer, not
    to one pixel, because the position of an attribute matters.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        channels, height, width = config.image_shape
        side, stages = min(height, width), []
        while side >= 2 * SMALLEST_MAP:
            out_channels = config.width * min(2 ** len(stages), 4)
            stages.append(_stage(channels, out_channels))
            channels, side = out_channels, side // 2
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(SMALLEST_MAP), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(channels * SMALLEST_MAP**2, HIDDEN), nn.ReLU(), nn.Dropout(0.25))
        self.output = nn.Linear(HIDDEN, len(config.names))

    @property
    def kind(self) -> Kind:
        return self.config.kind

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of the output."""
        return self.config.names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.config.image_shape

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, len(names)) for images (B, C, H, W) in [0, 1]."""
        return self.output(self.hidden(self.stages(2 * x - 1)))

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (), nats per image, summed over the known attributes. `target`: as in `correct`."""
        logits = self(x)
        if self.kind == "classes":
            return F.cross_entropy(logits, target)
        return attribute_cross_entropy(logits, target).sum(1).mean()

    def correct(self, x: Tensor, target: Tensor) -> Tensor:
        """1 if right, 0 if wrong, NaN if the target is unknown: (B, 1) for classes, (B, A) for attributes.

        `target`: labels (B,) int64, or attributes (B, A): 1 present, 0 absent, anything else unknown.
        """
        logits = self(x)
        if self.kind == "classes":
            return (logits.argmax(1) == target).double()[:, None]
        right = ((logits > 0) == (target == 1)).double()
        return right.masked_fill(~is_known(target), torch.nan)

    @torch.no_grad()
    def present(self, x: Tensor) -> Tensor:
        """(B, A) bool: the attributes that the images are predicted to have."""
        if self.kind != "attributes":
            raise ValueError("a classifier of attributes is needed; this one predicts classes")
        return self(x) > 0


class FrozenClassifier(NamedTuple):
    """A classifier used in the training of a model, without being changed."""

    network: Classifier
    """In eval mode, and its parameters do not require a gradient."""
    digest: int
    """A 63-bit hash of its weights and settings."""


def _stage(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2))


def is_known(attributes: Tensor) -> Tensor:
    """True for attributes that are 1 or 0; unknown ones are -1 in the data and 1/2 in a condition."""
    return (attributes == 0) | (attributes == 1)


def attribute_cross_entropy(logits: Tensor, attributes: Tensor) -> Tensor:
    """Cross-entropy of each attribute (B, A), nats; 0 for unknown attributes."""
    known = is_known(attributes).to(logits.dtype)
    return known * F.binary_cross_entropy_with_logits(logits, known * attributes, reduction="none")


def columns_of(classifier: Classifier, chosen: Sequence[str]) -> list[int]:
    """The classifier's columns for these attributes. Raises ValueError for attributes that it does not have."""
    if classifier.kind != "attributes":
        raise ValueError("the classifier predicts classes; train one on a set with attributes")
    missing = [name for name in chosen if name not in classifier.names]
    if missing:
        known = ", ".join(classifier.names)
        raise ValueError(f"the classifier was not trained on {', '.join(missing)}; its attributes: {known}")
    return [classifier.names.index(name) for name in chosen]


def check_image_shape(classifier: Classifier, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the classifier takes images (C, H, W) of this shape."""
    if tuple(image_shape) != tuple(classifier.image_shape):
        shapes = " and ".join("x".join(map(str, shape)) for shape in (classifier.image_shape, image_shape))
        raise ValueError(f"the classifier and the model take different images: {shapes} (channels, height, width)")
