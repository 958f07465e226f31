"""Figures on held-out images: the evidence lower bound and the importance-weighted likelihood, exact on any number of
processes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import log
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.data.shards import UnreadableShard
from pipeline.data.training_data import TrainingData
from pipeline.distributed.runtime import Runtime
from pipeline.models.base import VAE, VAEOutput, evaluating
from pipeline.models.noise import draw_noise
from pipeline.schema import Section
from pipeline.tracking.meters import ActiveUnits, Meter, bits_per_dimension


class ValidationConfig(Section):
    """When and on what the model is validated."""

    every: int = Field(1000, ge=0)
    """Steps between validations; also after the last step. 0: never."""
    split: str = "test"
    """Split of the shard set that is read."""
    images: int | None = Field(None, gt=0)
    """Only the first so many images of the split; all by default."""
    batch_size: int = Field(100, gt=0)
    """Images per forward pass over all processes. Does not change the figures."""
    importance_samples: int = Field(0, ge=0)
    """Latent samples per image for the importance-weighted bound (Burda et al. 2016, eq. 8), `val/nll`; 0: none."""


class Evaluator:
    """Validation of one model on this rank's share of a split.

    Sums and counts are reduced rather than means, so that a smaller last batch is exact. Noise is a function of (seed,
    image, draw): the figures of one model are the same at every validation and on any world size.
    """

    def __init__(
        self,
        config: ValidationConfig,
        data: TrainingData,
        runtime: Runtime,
        seed: int,
        by_group: bool = False,
        wait_for_ranks: bool = False,
    ):
        """`by_group`: also the KL and the active units of each latent group. `wait_for_ranks`: ranks that finish early
        wait for the others without a timeout, as long measurements need.
        """
        self.config = config
        self.data = data
        self.runtime = runtime
        self.seed = seed
        self.by_group = by_group
        self.wait_for_ranks = wait_for_ranks
        self.rows_per_pass = max(1, config.batch_size // runtime.world_size)  # images times draws

    @torch.no_grad()
    def run(self, model: VAE, step: int) -> dict[str, float]:
        """`val/elbo` and, with importance samples, `val/nll` in nats per image; each also in bits per dimension. By
        group, `val/kl/GROUP` in nats and `val/active_units/GROUP`. If images could not be read, `val/skipped_samples`
        is their number, and the figures are those of the others.

        `step` is that of the model, for the list of unreadable samples. The model keeps its mode.
        """
        meter = Meter(self.runtime.device, self._names(model))
        active = ActiveUnits(group.name for group in model.groups)
        active.add([torch.zeros(group.shape[0], device=self.runtime.device) for group in model.groups], count=0)
        skipped, error = [], None
        try:
            with evaluating(model):
                for batch in self.data.held_out_batches():
                    skipped += batch.skipped
                    if len(batch.images):
                        self._add(meter, active, model, batch)
        except UnreadableShard as unreadable:
            error = unreadable
        if self.wait_for_ranks:
            self.runtime.barrier()
        num_skipped = self.data.report_unreadable(step, skipped, error, split="held_out")
        figures = self._figures(meter.reduce(self.runtime.sum), model.num_dimensions)
        if self.by_group:
            figures |= {f"val/{name}": number for name, number in active.reduce(self.runtime.sum).items()}
        return figures | ({"val/skipped_samples": float(num_skipped)} if num_skipped else {})

    def _add(self, meter: Meter, active: ActiveUnits, model: VAE, batch: Batch) -> None:
        x, condition = self.data.model_inputs(batch)
        count = len(x)
        positions = batch.positions.tolist()

        def noise(draw: int) -> list[Tensor]:
            return draw_noise(model.noise_groups, self.seed, f"validate/{draw}", positions, x.device, x.dtype)

        draws = Draws(model, x, condition, noise, self.runtime.autocast)
        first = draws.bound(range(1))
        meter.add("elbo", first.elbo.sum(), count)
        meter.add("log_px", first.log_px.sum(), count)
        meter.add("kl", first.kl.sum(), count)
        if self.by_group:
            meter.add_all(dict(zip(_kl_names(model), first.kl.double().sum(dim=0), strict=True)), count)
            active.add(first.kl_units, count)
        if self.config.importance_samples:
            log_px = draws.log_likelihood(self.config.importance_samples, self.rows_per_pass, first)  # (B,)
            meter.add("nll", -log_px.sum(), count)

    def _names(self, model: VAE) -> list[str]:
        """All ranks reduce these names, including ranks without an image."""
        by_group = _kl_names(model) if self.by_group else []
        return ["elbo", "log_px", "kl", *by_group] + (["nll"] if self.config.importance_samples else [])

    @staticmethod
    def _figures(means: dict[str, float], num_dimensions: int) -> dict[str, float]:
        figures = {f"val/{name}": value for name, value in means.items()}
        figures["val/bpd"] = bits_per_dimension(-means["elbo"], num_dimensions)
        if "nll" in means:
            figures["val/bpd_nll"] = bits_per_dimension(means["nll"], num_dimensions)
        return figures


class Draws:
    """The bounds of one batch of images for any number of latent draws. The features, which no draw changes, are
    computed once.
    """

    def __init__(
        self,
        model: VAE,
        x: Tensor,
        condition: Tensor | None,
        noise: Callable[[int], Sequence[Tensor]],
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """x (B, C, H, W); `noise(i)` is the noise of draw i, for `model.noise_groups`."""
        self.model, self.x, self.condition, self.noise, self.autocast = model, x, condition, noise, autocast
        with autocast():
            self.features = model.features(x, condition)

    def bound(self, draws: range) -> VAEOutput:
        """Of n draws in one pass: n B rows, draw by draw."""
        n = len(draws)
        noise = [torch.cat(group) for group in zip(*map(self.noise, draws), strict=True)]  # (n B, *group.shape)
        x, features, condition = (repeated(value, n) for value in (self.x, self.features, self.condition))
        with self.autocast():
            return self.model.bound(x, features, noise, condition)

    def log_likelihood(self, draws: int, rows: int, first: VAEOutput | None = None) -> Tensor:
        """(B,) float64 importance-weighted estimate of log p(x) from draws 0 .. draws - 1, nats.

        Burda et al. 2016, eq. 8. A pass has about `rows` rows: small batches take several draws at once. `first` is
        `bound(range(1))`, if it was computed before. The memory needed does not grow with the number of draws.
        """
        per_pass = max(1, rows // len(self.x))
        total = _log_weight(self.bound(range(1)) if first is None else first)  # (B,) log of the sum of weights
        for start in range(1, draws, per_pass):
            weights = _log_weight(self.bound(range(start, min(start + per_pass, draws))))  # (n B,)
            total = torch.logaddexp(total, weights.view(-1, len(self.x)).logsumexp(dim=0))
        return total - log(draws)


def _kl_names(model: VAE) -> list[str]:
    return [f"kl/{group.name}" for group in model.groups]


def repeated(value: Any, times: int) -> Any:
    """Tensors (B, ...), alone or in lists, tuples and dicts, made (times B, ...): all rows, then all rows again."""
    if times == 1 or value is None:
        return value
    if isinstance(value, Tensor):
        return torch.cat([value] * times)  # unlike `repeat`, it keeps channels_last
    if isinstance(value, Mapping):
        return {name: repeated(part, times) for name, part in value.items()}
    assert isinstance(value, list | tuple), f"features of an unknown kind: {type(value)}"
    parts = [repeated(part, times) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _log_weight(out: VAEOutput) -> Tensor:
    """(B,) float64 log p(x, z) - log q(z | x), nats."""
    return (out.log_px + out.log_pz - out.log_qz).double()
