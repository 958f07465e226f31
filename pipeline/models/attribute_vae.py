"""A convolutional VAE conditioned on attributes. Changing the condition edits a face.

A conditional VAE (Sohn et al. 2015, "Learning Structured Output Representation using Deep Conditional Generative
Models"). An embedding of the attributes is concatenated to the encoder's features. In the decoder it is either
concatenated to the latent, or sets the conditional batch norm of every block. An edit is decode(encode(x, a), a').

Four terms can be added to the loss. Each has a weight, 0 by default:

    classification  -log p(a' | image) by a frozen classifier, where the image is decoded with one attribute changed
                    (AttGAN, He et al. 2019, arXiv:1711.10678, eq. 2)
    adversary       -log p(a | z) by a predictor that is trained with the model. A gradient reversal makes the encoder
                    increase it (Ganin & Lempitsky 2015; Fader Networks, Lample et al. 2017, arXiv:1706.00409)
    independence    half the squared cross-covariance of the global and the local part of z (Cheung et al. 2014)
    pull            |z|^2 / 2

They are computed in training mode only. Evaluation needs no classifier.
Shape legend: vector_vae.py, and A attributes.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.models.base import LatentGroup, check_divisible, without_border
from pipeline.models.classifier import (
    FrozenClassifier,
    attribute_cross_entropy,
    check_image_shape,
    columns_of,
    is_known,
)
from pipeline.models.conditions import AttributeCondition, Condition
from pipeline.models.likelihoods import DiscretizedLogisticLikelihood, Likelihood
from pipeline.models.vector_vae import VectorVAE, VectorVAEConfig, concatenated
from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.conditional_norm import ConditionalBatchNorm2d
from pipeline.nn.distributions import at_least_float32
from pipeline.nn.gradient_reversal import reverse_gradient
from pipeline.nn.independence import cross_covariance
from pipeline.nn.posterior import Posterior, PosteriorSample
from pipeline.schema import Count

SMALLEST_MAP = 4
WIDEST = 8
Weight = Annotated[float, Field(ge=0)]


class AttributeVAEConfig(VectorVAEConfig):
    """Architecture of an attribute VAE, and the weights of the terms of its loss."""

    name: Literal["attribute_vae"] = "attribute_vae"
    latent_size: Count = 64
    """Units of the latent vector."""
    likelihood: Likelihood = DiscretizedLogisticLikelihood()
    """p(x | z)."""
    width: Count = 16
    """Channels at the resolution of the image. They double with every halving, up to eight times as many."""
    features: Count = 256
    """Size of the encoder's features, to which the attributes' embedding is concatenated."""
    embedding: Count = 64
    """Size of the attributes' embedding."""
    conditioning: Literal["join", "batch_norm"] = "batch_norm"
    """How the decoder is conditioned. `join`: the embedding is concatenated to the latent. `batch_norm`: it sets the
    scale and shift of every batch norm."""
    local_channels: Annotated[int, Field(ge=0)] = 0
    """Number of local latent channels. The last local_channels x H x W units of the latent are local: each is placed at
    one pixel of the feature map (H x W) of the lowest resolution. The other units are global. 0: all are global."""
    classification_weight: Weight = 0.0
    """Weight of the frozen classifier's cross-entropy on edited images, summed over the attributes."""
    classifier: str | None = None
    """Folder of the frozen classifier, made by pipeline/train_classifier.py. Only training needs it."""
    adversary_weight: Weight = 0.0
    """Weight of the adversary, which removes the attributes from the latent."""
    independence_weight: Weight = 0.0
    """Weight of the covariance penalty between the global and the local part of the latent."""
    pull_weight: Weight = 0.0
    """Weight of |z|^2 / 2, which pulls the latents to the mean of the prior."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.classification_weight and self.classifier is None:
            raise ValueError(
                "model.classification_weight needs model.classifier, a folder made with: "
                "python -m pipeline.train_classifier --data DIR --out FOLDER"
            )
        if self.independence_weight and not self.local_channels:
            raise ValueError(
                "model.independence_weight needs model.local_channels above 0: it compares local and global units"
            )
        return self

    @property
    def classifier_folder(self) -> str | None:
        return self.classifier if self.classification_weight else None

    def build(
        self,
        image_shape: tuple[int, int, int],
        border: int,
        bits: int,
        condition: Condition | None = None,
        classifier: FrozenClassifier | None = None,
    ) -> "AttributeVAE":
        """The model for padded images of this shape.

        Raises ValueError for a size that it cannot halve, for a condition that is not `attributes`, and for a
        classifier of other images or attributes.
        """
        if not isinstance(condition, AttributeCondition):
            raise ValueError("attribute_vae: set condition.name=attributes, and the names in condition.chosen")
        return AttributeVAE(self, image_shape, border, bits, condition, classifier)


class AttributeVAE(VectorVAE):
    """The model described at the top of this file.

    The image is halved down to a feature map of 4 to 7 pixels. Raises ValueError for a size that this does not divide.
    """

    config: AttributeVAEConfig

    def __init__(
        self,
        config: AttributeVAEConfig,
        image_shape: tuple[int, int, int],
        border: int,
        bits: int,
        condition: AttributeCondition,
        classifier: FrozenClassifier | None = None,
    ):
        super().__init__(config, image_shape, border, bits, condition.size)
        self.condition = condition
        halvings = max(1, (min(self.image_shape[1:]) // SMALLEST_MAP).bit_length() - 1)
        check_divisible(self.image_shape, 2**halvings, config.name)
        height, width = (side >> halvings for side in self.image_shape[1:])
        self.local_shape = (config.local_channels, height, width)
        self.local_size = config.local_channels * height * width
        if self.local_size >= config.latent_size:
            raise ValueError(
                f"model.local_channels={config.local_channels}: {self.local_size} local units leave no global unit "
                f"of model.latent_size={config.latent_size}"
            )
        self._build(config, [config.width * min(2**level, WIDEST) for level in range(halvings + 1)], height * width)
        self.edit_classifier = None
        if config.classification_weight:
            self.register_buffer("classifier_seen", torch.zeros((), dtype=torch.int64))  # its digest, or 0
            if classifier is not None:
                self.edit_classifier = EditClassifier(classifier, condition.chosen, self._shape_without_border())

    def _build(self, config: AttributeVAEConfig, widths: list[int], num_pixels: int) -> None:
        """`widths`: channels of each level, the image's first. `num_pixels`: of the feature map of the last level."""
        top = widths[-1]
        norm_size = config.embedding if config.conditioning == "batch_norm" else 0  # of the norms' condition
        concatenated_size = config.embedding - norm_size
        self.embedding = nn.Sequential(nn.Linear(self.condition_size, config.embedding), nn.ReLU())
        self.encoder = nn.Sequential(*(_down(*pair) for pair in pairwise([self.image_shape[0], *widths[1:]])))
        self.summary = nn.Sequential(nn.Linear(top * num_pixels, config.features), nn.ReLU())
        self.posterior = Posterior(config.features + config.embedding, config.latent_size, config.flows)
        self.start = nn.Linear(config.latent_size - self.local_size + concatenated_size, top * num_pixels)
        if config.local_channels:
            self.local_start = nn.Conv2d(config.local_channels, top, 1, bias=False)
        self.start_norm = ConditionalBatchNorm2d(top, norm_size)
        self.decoder = nn.ModuleList(UpBlock(*pair, norm_size) for pair in pairwise(widths[::-1]))
        self.output = nn.Conv2d(widths[0], self.num_outputs, 3, padding=1)
        if config.adversary_weight:
            hidden, size = config.features, self.condition_size
            self.adversary = nn.Sequential(nn.Linear(config.latent_size, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def _shape_without_border(self) -> tuple[int, int, int]:
        channels, height, width = self.image_shape
        return channels, height - 2 * self.border, width - 2 * self.border

    # ---- what VectorVAE leaves to its subclasses --------------------------------------------------------------------

    def _encode(self, x: Tensor, condition: Tensor | None) -> Tensor:
        summary = self.summary(self.encoder(2 * x - 1).flatten(1))  # (B, features)
        return concatenated(summary, self.embedding(condition))

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        embedding = self.embedding(condition)  # (B, embedding)
        whole, local = self._parts(z)
        start = self.start(concatenated(whole, embedding if self.config.conditioning == "join" else None))
        h = start.unflatten(1, (-1, *self.local_shape[1:]))  # (B, top, H_top, W_top)
        if self.config.local_channels:
            h = h + self.local_start(local.unflatten(1, self.local_shape))
        h = F.relu(self.start_norm(h, embedding))
        for block in self.decoder:
            h = block(h, embedding)
        return self.output(h)

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The global and the local part of latents (B, L)."""
        return z.split([z.shape[1] - self.local_size, self.local_size], dim=1)

    # ---- the terms of the loss --------------------------------------------------------------------------------------

    @property
    def noise_groups(self) -> tuple[LatentGroup, ...]:
        """With classification, one more number per image, which chooses the attribute to change."""
        return self.groups + ((LatentGroup("edit", (1, 1, 1)),) if self.config.classification_weight else ())

    def _decode_with_penalties(
        self, latent: PosteriorSample, noise: Sequence[Tensor], condition: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        config, z = self.config, latent.z
        if not self.training:
            return self._decode(z, condition), {}
        outputs, classification = self._decode_with_edits(z, noise, condition)
        terms = {
            "classification": (config.classification_weight, lambda: classification),
            "adversary": (config.adversary_weight, lambda: self._adversary(z, condition)),
            "independence": (config.independence_weight, lambda: self._independence(z)),
            "pull": (config.pull_weight, lambda: z.square().sum(1) / 2),
        }
        return outputs, {name: weight * term() for name, (weight, term) in terms.items() if weight}

    def _decode_with_edits(self, z: Tensor, noise: Sequence[Tensor], condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw decoder outputs, and (B,) nats: the cross-entropy of the classifier's prediction for the edited images
        against their conditions; None without that term.

        One pass decodes both, so that both are normalized by the same statistics of the batch, as in evaluation. With a
        pass each, the running statistics are a mixture that neither was trained with.
        """
        if not self.config.classification_weight:
            return self._decode(z, condition), None
        if self.edit_classifier is None:
            raise ValueError("attribute_vae: training with classification_weight needs a classifier: pass it to build")
        changed = self.with_one_attribute_changed(condition, noise[1].flatten())
        outputs, edited = self._decode(torch.cat([z, z]), torch.cat([condition, changed])).chunk(2)
        images = without_border(self.likelihood(edited).mean, self.border)
        logits = self.edit_classifier.logits(images, self.classifier_seen)
        return outputs, attribute_cross_entropy(logits, changed).sum(1)

    def with_one_attribute_changed(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Conditions (B, A) with one attribute per row changed from 0 to 1 or from 1 to 0, and its rivals cleared.

        The quantile of standard normal noise (B,), in steps of 1 / A, chooses the attribute. If its value is unknown,
        the row is not changed.
        """
        columns = (torch.special.ndtr(noise) * self.condition_size).long().clamp(max=self.condition_size - 1)
        rows = torch.arange(len(condition), device=condition.device)
        on, off = (
            torch.stack([self.condition.changed(condition, {name: value}) for name in self.condition.chosen])
            for value in (1.0, 0.0)
        )  # (A, B, A) each: attribute that is set or cleared, image, attribute
        before = condition[rows, columns]  # (B,)
        flipped = torch.where((before == 0)[:, None], on[columns, rows], off[columns, rows])
        return torch.where(is_known(before)[:, None], flipped, condition)

    def _adversary(self, z: Tensor, condition: Tensor) -> Tensor:
        return attribute_cross_entropy(self.adversary(reverse_gradient(z)), condition).sum(1)

    def _independence(self, z: Tensor) -> Tensor:
        return cross_covariance(*self._parts(z)).expand(len(z))


class EditClassifier:
    """The frozen classifier of edited images.

    Not an nn.Module, so that it is not part of the model's parameters, checkpoints or moving average. Raises ValueError
    for a classifier of other images or attributes.
    """

    def __init__(self, frozen: FrozenClassifier, chosen: Sequence[str], image_shape: tuple[int, int, int]):
        self.classifier, self.digest = frozen
        self.columns = columns_of(self.classifier, chosen)
        check_image_shape(self.classifier, image_shape)
        self.compared = False

    def logits(self, x: Tensor, seen: Tensor) -> Tensor:
        """(B, A), in the order of `chosen`, for images (B, C, H, W) in [0, 1].

        `seen` (), int64: the digest of the classifier that the run started with, or 0. It is set to this classifier's
        digest. Raises ValueError if the run started with another classifier.
        """
        if not self.compared:
            self._compare(int(seen))
        seen.fill_(self.digest)
        x = at_least_float32(x)
        return self.classifier.to(x.device, x.dtype)(x)[:, self.columns]

    def _compare(self, seen: int) -> None:
        if seen not in (0, self.digest):
            raise ValueError(
                "model.classifier: this folder holds another classifier than the one that the run started with; "
                "set model.classifier to that one, or start a new run with another --run-dir"
            )
        self.compared = True


class UpBlock(nn.Module):
    """A transposed convolution that doubles the resolution, then a residual 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, condition_size: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        self.up_norm = ConditionalBatchNorm2d(out_channels, condition_size)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv_norm = ConditionalBatchNorm2d(out_channels, condition_size)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        h = F.relu(self.up_norm(self.up(h), condition))
        return F.relu(h + self.conv_norm(self.conv(h), condition))


def _down(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, BatchNorm2d(out_channels), nn.ReLU())
