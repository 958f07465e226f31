"""A trained model behind a plain interface: images in, images and nats out; recipe, padding and noise are handled.

    model = pipeline.load("runs/nvae")
    images = model.sample(16, temperature=0.7, seed=1)        # (16, C, H, W) in [0, 1]
    latents = model.encode(images)                            # one tensor per latent group
    again = model.decode(latents)
    others = model.sample(16, fixed=latents[:2])              # the first two groups as they are, the others resampled
    nats = model.log_likelihood(images, importance_samples=100)

B images, C channels, H x W pixels of the data set, without the padding that a recipe adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.preprocess import to_model_input
from pipeline.evaluation.images import to_uint8
from pipeline.evaluation.likelihood_bounds import Draws
from pipeline.inference.latent_groups import TemperatureLike, resolve_temperature
from pipeline.inference.parse_condition import ConditionLike, to_condition
from pipeline.inference.passes import IMAGES_PER_PASS, in_passes
from pipeline.inference.read_image import Images, to_tensor
from pipeline.models.base import VAE, Temperature, without_border
from pipeline.models.noise import draw_noise
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class TrainedModel:
    """A trained model. Images go in as uint8 or as floats in [0, 1], and come out as floats in [0, 1], on `device`.

    Methods of a conditional model need a condition: a class for all images or one for each, by number or name;
    {attribute: 1 or 0}, where attributes that are not named are unknown; or a float tensor (B, K). Random numbers are a
    function of (seed, position in the batch). Raises ValueError for images of another shape; for unknown classes and
    attributes, with the list of the known ones.
    """

    model: VAE = field(repr=False)
    recipe: Recipe = field(repr=False)
    step: int
    """Optimizer step of the checkpoint."""
    path: Path
    """The checkpoint's folder."""
    place: str
    """The location that names exactly this checkpoint: its folder, or hf-hub:OWNER/NAME@COMMIT."""
    facts: dict = field(repr=False)
    """What else the checkpoint states about its run."""
    averaged: bool
    """Whether the weights are their moving average."""
    weights_sha256: str
    """Of the checkpoint's file of weights, in hexadecimal."""
    classes: tuple[str, ...]
    """Names of the classes that the model is conditioned on; empty for other models."""
    device: torch.device
    dtype: torch.dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the data set's images, without padding."""
        data = self.recipe.data
        return data.channels, data.size, data.size

    @torch.no_grad()
    def encode(self, x: Images, condition: ConditionLike = None, seed: int | None = 0) -> list[Tensor]:
        """Samples of the posteriors, one (B, *group.shape) per group.

        With `seed` None no noise is added: the posteriors' means, each given the means of the groups before it.
        """
        x = to_tensor(x, self.image_shape)
        condition = self.condition(condition, len(x))

        def work(here: slice) -> list[Tensor]:
            return self.model.encode(self.input(x[here]), self._noise("encode", here, seed), rows_of(condition, here))

        parts = in_passes(work, len(x), self.device)
        return [torch.cat(group) for group in zip(*parts, strict=True)]

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor], condition: ConditionLike = None) -> Tensor:
        """Images (B, C, H, W): the decoder's mean for these latents, one (B, *group.shape) per group."""
        count = self._check_latents(latents)
        condition = self.condition(condition, count)

        def work(here: slice) -> Tensor:
            return self.model.decode(self._rows(latents, here), rows_of(condition, here))

        return self._output(in_passes(work, count, self.device))

    def sample(
        self,
        count: int,
        temperature: TemperatureLike = 1.0,
        seed: int = 0,
        condition: ConditionLike = None,
        first: int = 0,
        fixed: Sequence[Tensor] = (),
    ) -> Tensor:
        """Images (count, C, H, W) from the prior, whose sigmas are scaled by `temperature`: the decoder's mean.

        Every seed has a sequence of samples without end; these are the samples `first`, `first` + 1, ... On a GPU a
        model that was trained in bf16 samples in bf16.

        `temperature`: one number; {"4x4": 1.0, "8x8": 0.7} by resolution or group, 1 for those that are not named; or a
        sequence with a number for each group. `fixed`: latents of the first groups, (count, *group.shape) each or
        (1, *group.shape) for all samples; only the other groups are sampled, from their priors given these.
        """
        return self._sample(count, temperature, seed, condition, first, fixed, latents=False)[0]

    def sample_with_latents(
        self,
        count: int,
        temperature: TemperatureLike = 1.0,
        seed: int = 0,
        condition: ConditionLike = None,
        first: int = 0,
        fixed: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """`sample`, and the latents that its images are decoded from: one (count, *group.shape) per group."""
        return self._sample(count, temperature, seed, condition, first, fixed, latents=True)

    @torch.no_grad()
    def _sample(
        self,
        count: int,
        temperature: TemperatureLike,
        seed: int,
        condition: ConditionLike,
        first: int,
        fixed: Sequence[Tensor],
        latents: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        if count < 1:
            raise ValueError(f"count {count}: must be at least 1")
        temperatures, condition = resolve_temperature(temperature, self.model.groups), self.condition(condition, count)
        fixed = self._check_fixed(fixed, count)

        def work(here: slice) -> list[Tensor]:
            noise = self._noise("sample", slice(first + here.start, first + here.stop), seed)
            images, made = self._generate(noise, temperatures, rows_of(condition, here), [z[here] for z in fixed])
            return [images, *made] if latents else [images]

        images, *made = zip(*in_passes(work, count, self.device), strict=True)
        return self._output(images), [torch.cat(group) for group in made]

    def _generate(
        self, noise: Sequence[Tensor], temperature: Temperature, condition: Tensor | None, given: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The model's own samples, border included."""
        in_bf16 = self.device.type == "cuda" and self.recipe.train.precision == "bf16" and self.dtype == torch.float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16):
            images, latents = self.model.sample_with_latents(noise, temperature, condition, given)
        return images.to(self.dtype), latents

    def reconstruct(
        self,
        x: Images,
        condition: ConditionLike = None,
        seed: int | None = 0,
        groups: int | None = None,
        temperature: TemperatureLike = 0.0,
    ) -> Tensor:
        """Images (B, C, H, W): `decode` of `encode`.

        `groups`: how many of the first latent groups are those of `encode`. The others are the means of their priors
        given these; or, with a `temperature` above 0, samples from them.
        """
        latents = self.encode(x, condition, seed)
        if groups is None:
            return self.decode(latents, condition)
        if not 0 <= groups <= len(latents):
            raise ValueError(f"groups {groups}: must be from 0 to {len(latents)}, the number of latent groups")
        return self.sample(len(latents[0]), temperature, seed or 0, condition, fixed=latents[:groups])

    @torch.no_grad()
    def to_noise(self, latents: Sequence[Tensor], condition: ConditionLike = None) -> list[Tensor]:
        """The noise for which the prior gives these latents, one (B, *group.shape) per group: (z - mu) / sigma, with mu
        and sigma of the group's prior given the groups before it. `from_noise` is the inverse.
        """
        count = self._check_latents(latents)
        condition = self.condition(condition, count)

        def work(here: slice) -> list[Tensor]:
            return self.model.prior_noise(self._rows(latents, here), rows_of(condition, here))

        parts = in_passes(work, count, self.device)
        return [torch.cat(group) for group in zip(*parts, strict=True)]

    @torch.no_grad()
    def from_noise(
        self, noise: Sequence[Tensor], temperature: TemperatureLike = 1.0, condition: ConditionLike = None
    ) -> Tensor:
        """Images (B, C, H, W): `sample` for this noise, one (B, *group.shape) per group."""
        count = self._check_latents(noise)
        temperatures, condition = resolve_temperature(temperature, self.model.groups), self.condition(condition, count)

        def work(here: slice) -> Tensor:
            return self._generate(self._rows(noise, here), temperatures, rows_of(condition, here))[0]

        return self._output(in_passes(work, count, self.device))

    @torch.no_grad()
    def log_likelihood(
        self, x: Images, condition: ConditionLike = None, importance_samples: int = 1, seed: int = 0
    ) -> Tensor:
        """(B,) float64 estimate of log p(x | condition), nats: a lower bound on average, tighter with more samples.

        Burda et al. 2016, eq. 8; with one sample an estimate of the evidence lower bound. Discrete likelihoods expect
        the values that the model was trained on (binary pixels for one of binarized images).
        """
        if importance_samples < 1:
            raise ValueError(f"importance_samples {importance_samples}: must be at least 1")
        x = to_tensor(x, self.image_shape)
        condition = self.condition(condition, len(x))

        def work(here: slice) -> Tensor:
            def noise(draw: int) -> list[Tensor]:
                return self._noise(f"validate/{draw}", here, seed, self.model.noise_groups)

            draws = Draws(self.model, self.input(x[here]), rows_of(condition, here), noise)
            return draws.log_likelihood(importance_samples, rows=max(IMAGES_PER_PASS, here.stop - here.start))

        return torch.cat(in_passes(work, len(x), self.device))

    def condition(self, condition: ConditionLike, count: int) -> Tensor | None:
        """The model's condition (count, K) on the device, or None. Raises as the class says."""
        rows = to_condition(condition, self.recipe.condition, self.classes, count)
        return None if rows is None else rows.to(self.device, self.dtype)

    def input(self, x: Tensor) -> Tensor:
        """The model's input: (B, C, H + 2 pad, W + 2 pad) in [0, 1] on the device."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images are (B, {', '.join(map(str, self.image_shape))}), not {tuple(x.shape)}")
        bits = self.recipe.data.bits
        check_values(x)
        if x.is_floating_point() and bits == 8:
            x = x.to(self.device, self.dtype)
        else:
            x = to_model_input(to_uint8(x).to(self.device), bits, self.dtype)
        x = F.pad(x, [self.recipe.data.pad] * 4)
        return x.contiguous(memory_format=torch.channels_last) if self.recipe.train.channels_last else x

    def _output(self, parts: Sequence[Tensor]) -> Tensor:
        return without_border(torch.cat(list(parts)), self.recipe.data.pad).contiguous()

    def _noise(self, stream: str, here: slice, seed: int | None, groups: Sequence | None = None) -> list[Tensor]:
        groups = self.model.groups if groups is None else groups
        if seed is None:
            count = here.stop - here.start
            return [torch.zeros(count, *group.shape, device=self.device, dtype=self.dtype) for group in groups]
        return draw_noise(groups, seed, stream, range(here.start, here.stop), self.device, self.dtype)

    def _rows(self, latents: Sequence[Tensor], here: slice) -> list[Tensor]:
        return [group[here].to(self.device, self.dtype) for group in latents]

    def _check_fixed(self, fixed: Sequence[Tensor], count: int) -> list[Tensor]:
        """(count, *group.shape) each, on the device."""
        shapes, groups = [tuple(latent.shape) for latent in fixed], self.model.groups[: len(fixed)]
        wanted = [[(rows, *group.shape) for rows in (1, count)] for group in groups]
        if len(shapes) != len(wanted) or not all(a in b for a, b in zip(shapes, wanted, strict=True)):
            known = [group.shape for group in self.model.groups]
            raise ValueError(f"fixed latents are ({count} or 1, ...) each, of the first of {known}; these are {shapes}")
        return [z.to(self.device, self.dtype).expand(count, -1, -1, -1) for z in fixed]

    def _check_latents(self, latents: Sequence[Tensor]) -> int:
        shapes, wanted = [tuple(group.shape) for group in latents], [group.shape for group in self.model.groups]
        if [shape[1:] for shape in shapes] != wanted or len({shape[0] for shape in shapes}) != 1:
            raise ValueError(f"latents are one tensor per group, (B, ...) each of {wanted}; these are {shapes}")
        return shapes[0][0]


def rows_of(condition: Tensor | None, here: slice) -> Tensor | None:
    """These rows of a condition, if there is one."""
    return None if condition is None else condition[here]


def check_values(x: Tensor) -> None:
    """Raises ValueError for values that an image cannot have."""
    floats = x.is_floating_point()
    if not floats and x.dtype != torch.uint8:
        raise ValueError(f"images are uint8, or floats in [0, 1], not {x.dtype}")
    if floats and not bool(((x >= 0) & (x <= 1)).all()):  # NaN is not either
        raise ValueError("images as floats are in [0, 1]; give uint8 for 0 to 255")
