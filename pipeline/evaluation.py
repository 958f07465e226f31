"""Figures on held-out images: the evidence lower bound and the importance-weighted likelihood, exact on any number of
processes."""

from collections.abc import Callable, Iterable, Sequence
from math import log

import torch
from pydantic import Field
from torch import Tensor

from pipeline.data.damage import LeftOut
from pipeline.data.loader import Batch
from pipeline.data.shards import DamagedShard
from pipeline.metrics import Meter, bits_per_dimension
from pipeline.models.base import VAE, VAEOutput, evaluating
from pipeline.noise import draw_noise
from pipeline.schema import Section


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
    """Draws per image for the importance-weighted bound (Burda et al. 2016, eq. 8), `val/nll`; 0: not computed."""


class Evaluator:
    """Validation of one model on this rank's share of a split.

    Sums and counts are reduced rather than means, so that a ragged tail is exact. Noise is a function of (seed, image,
    draw): the figures of one model are the same at every validation and on any world size.
    """

    def __init__(
        self,
        config: ValidationConfig,
        batches: Callable[[], Iterable[Batch]],
        inputs: Callable[[Batch], tuple[Tensor, Tensor | None]],
        seed: int,
        device: torch.device,
        autocast: Callable,
        sum_over_ranks: Callable[[Tensor], Tensor],
        settle_damage: Callable[[Sequence[LeftOut], DamagedShard | None], int],
    ):
        """`settle_damage` is told on every rank what could not be read; it gives the number of samples left out on all
        ranks, or raises on all.
        """
        self.config = config
        self.batches = batches
        self.inputs = inputs
        self.seed = seed
        self.device = device
        self.autocast = autocast
        self.sum_over_ranks = sum_over_ranks
        self.settle_damage = settle_damage

    @torch.no_grad()
    def run(self, model: VAE) -> dict[str, float]:
        """`val/elbo` and, with importance samples, `val/nll` in nats per image; each in bits per dimension too. Where
        images could not be read, `val/skipped_samples` is their number, and the others' figures are given.

        The model is left in its mode.
        """
        meter = Meter(self.device, self._names())
        left_out, error = [], None
        try:
            with evaluating(model):
                for batch in self.batches():
                    left_out += batch.left_out
                    if len(batch.images):
                        self._add(meter, model, batch)
        except DamagedShard as damaged:
            error = damaged
        skipped = self.settle_damage(left_out, error)
        figures = self._figures(meter.reduce(self.sum_over_ranks), model.num_dimensions)
        return figures | ({"val/skipped_samples": float(skipped)} if skipped else {})

    def _add(self, meter: Meter, model: VAE, batch: Batch) -> None:
        x, condition = self.inputs(batch)
        count = len(x)
        with self.autocast():
            features = model.features(x, condition)

        def bound(draw: int) -> VAEOutput:
            stream, positions = f"validate/{draw}", batch.positions.tolist()
            noise = draw_noise(model.noise_groups, self.seed, stream, positions, x.device, x.dtype)
            with self.autocast():
                return model.bound(x, features, noise, condition)

        first = bound(0)
        meter.add("elbo", first.elbo.sum(), count)
        meter.add("log_px", first.log_px.sum(), count)
        meter.add("kl", first.kl.sum(), count)
        if self.config.importance_samples:
            weights = [_log_weight(first)]
            weights += [_log_weight(bound(draw)) for draw in range(1, self.config.importance_samples)]
            log_px = torch.stack(weights).logsumexp(dim=0) - log(self.config.importance_samples)  # (B,)
            meter.add("nll", -log_px.sum(), count)

    def _names(self) -> list[str]:
        """Every rank brings these to the reduction, also one that had no image."""
        return ["elbo", "log_px", "kl"] + (["nll"] if self.config.importance_samples else [])

    @staticmethod
    def _figures(means: dict[str, float], num_dimensions: int) -> dict[str, float]:
        figures = {f"val/{name}": value for name, value in means.items()}
        figures["val/bpd"] = bits_per_dimension(-means["elbo"], num_dimensions)
        if "nll" in means:
            figures["val/bpd_nll"] = bits_per_dimension(means["nll"], num_dimensions)
        return figures


def _log_weight(out: VAEOutput) -> Tensor:
    """(B,) log p(x, z) - log q(z | x), nats."""
    return out.log_px + out.log_pz - out.log_qz
