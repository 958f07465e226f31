"""Figures on held-out images: the evidence lower bound and the importance-weighted likelihood, exact on any number of
processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from math import log
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.data.shards import UnreadableShard
from pipeline.data.training_data import TrainingData
from pipeline.data.unreadable import SkippedSample
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.bound_totals import BatchBounds, BoundTotals
from pipeline.models.base import VAE, VAEOutput, evaluating
from pipeline.models.noise import draw_noise
from pipeline.schema import Section

MAX_PASSES = 50
"""Per batch of images: with many importance samples, fewer images are a batch, so that little is lost by a kill."""


class ValidationConfig(Section):
    """When and on what the model is validated."""

    every: int = Field(1000, ge=0)
    """Steps between validations; also after the last step. 0: never."""
    split: str = "test"
    """Split of the shard set that is read."""
    images: int | None = Field(None, gt=0)
    """Only so many images of the split; all by default."""
    images_seed: int | None = Field(None, ge=0, lt=2**63)
    """Which they are: chosen at random with this seed; by default the first ones. MNIST's first 5,000 test images, for
    one, are easier than the others."""
    batch_size: int = Field(100, gt=0)
    """Images per forward pass over all processes. Does not change the figures."""
    importance_samples: int = Field(0, ge=0)
    """Latent samples per image for the importance-weighted bound (Burda et al. 2016, eq. 8), `val/nll`; 0: none."""


class Journal(Protocol):
    """Where the results of this rank's batches are kept until the evaluation is complete."""

    records: Sequence[Any]
    """JSON values, from an evaluation that was interrupted, in the order in which they were added."""

    def add(self, record: Any) -> None:
        """Keeps one more."""


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
        detailed: bool = False,
        binarizations: int = 1,
        journal: Journal | None = None,
    ):
        """`detailed`: also standard errors, and the KL and the active units of each latent group; and ranks that finish
        early wait for the others without a timeout, as long measurements need. `binarizations`: the figures are means
        over so many binarizations of the images. Batches whose results are in the `journal` are not computed again.
        """
        self.config = config
        self.data = data
        self.runtime = runtime
        self.seed = seed
        self.detailed = detailed
        self.binarizations = binarizations
        self.journal = journal
        self.rows_per_pass = max(1, config.batch_size // runtime.world_size)  # images times draws
        in_few_passes = config.batch_size * MAX_PASSES // max(1, config.importance_samples)
        self.images_per_batch = max(1, min(config.batch_size, in_few_passes))  # over all processes

    @torch.no_grad()
    def run(self, model: VAE, step: int) -> dict[str, float]:
        """`val/elbo`, `val/log_px`, `val/kl` and, with importance samples, `val/nll` in nats per image; `val/bpd` and
        `val/bpd_nll` in bits per dimension. If `detailed`, all figures of `BoundTotals.figures`. If images could not be
        read, `val/skipped_samples` is their number, and the figures are those of the others.

        `step` is that of the model, for the list of unreadable samples. The model keeps its mode.
        """
        totals = BoundTotals(model.groups, self.config.importance_samples > 0, self.runtime.device, self.binarizations)
        recorded = self._recorded(totals)
        skipped, error = [], None
        try:
            with evaluating(model):
                for binarization in range(self.binarizations):
                    skipped = self._add_all(totals, model, binarization, recorded)
        except UnreadableShard as unreadable:
            error = unreadable
        if self.detailed:
            self.runtime.barrier()
        num_skipped = self.data.report_unreadable(step, skipped, error, split="held_out")
        figures = totals.figures(self.runtime.sum, model.num_dimensions)
        if not self.detailed:
            figures = {name: value for name, value in figures.items() if "/" not in name and not name.endswith("_se")}
        figures |= {"skipped_samples": float(num_skipped)} if num_skipped else {}
        return {f"val/{name}": value for name, value in figures.items()}

    def _recorded(self, totals: BoundTotals) -> list[BatchBounds]:
        """Of the batches that the journal holds. Raises ValueError, on every rank, for other records."""
        if self.journal is None:
            return []
        read = partial(
            BatchBounds.from_json, columns=len(totals.names), sums=totals.num_sums, device=self.runtime.device
        )
        return self.runtime.run_on_all(lambda: [read(record) for record in self.journal.records])

    def _add_all(
        self, totals: BoundTotals, model: VAE, binarization: int, recorded: Iterable[BatchBounds]
    ) -> list[SkippedSample]:
        """Adds this rank's images. Returns the samples that could not be read."""
        done = [bounds for bounds in recorded if bounds.binarization == binarization]
        skipped = []
        for bounds in chain(done, self._measured(model, binarization, len(done))):
            totals.add(bounds)
            skipped += bounds.skipped
        return skipped

    def _measured(self, model: VAE, binarization: int, first: int) -> Iterator[BatchBounds]:
        """From batch `first` on. Each is in the journal before it is returned."""
        for batch in self.data.held_out_batches(first, binarization, self.images_per_batch):
            bounds = self._bounds(model, batch, binarization)
            if self.journal is not None:
                self.journal.add(bounds.as_json())
            yield bounds

    def _bounds(self, model: VAE, batch: Batch, binarization: int) -> BatchBounds:
        count, columns = len(batch.images), 2 + (self.config.importance_samples > 0)
        if not count:
            sums = sum(1 + group.shape[0] for group in model.groups)
            zeros = torch.zeros(0, columns), torch.zeros(sums)
            return BatchBounds(binarization, *(part.double().to(self.runtime.device) for part in zeros), batch.skipped)
        x, condition = self.data.model_inputs(batch)
        positions = batch.positions.tolist()
        which = f"/binarization {binarization}" if binarization else ""

        def noise(draw: int) -> list[Tensor]:
            return draw_noise(model.noise_groups, self.seed, f"validate/{draw}{which}", positions, x.device, x.dtype)

        draws = Draws(model, x, condition, noise, self._start_pass)
        first = draws.bound(range(1))
        images = [first.elbo.double(), first.log_px.double()]
        if self.config.importance_samples:
            images.append(-draws.log_likelihood(self.config.importance_samples, self.rows_per_pass, first))
        sums = torch.cat([first.kl.double().sum(dim=0), torch.cat(list(first.kl_units)).double() * count])
        return BatchBounds(binarization, torch.stack(images, dim=1), sums, batch.skipped)

    def _start_pass(self) -> AbstractContextManager:
        """Each pass is progress for the ranks that wait for this one."""
        self.runtime.advance()
        return self.runtime.autocast()


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
