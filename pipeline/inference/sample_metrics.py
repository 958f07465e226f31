"""FID, KID, precision and recall: how near a model's samples are to real images, in the features of a network."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.data.remote import default_cache
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.frechet import frechet_distance
from pipeline.evaluation.image_features import FeatureCollector, ImageFeatures, Rounding, sum_rows
from pipeline.evaluation.inception import Resize
from pipeline.evaluation.kernel_distance import kernel_distance
from pipeline.evaluation.precision_recall import precision_recall
from pipeline.inference.feature_cache import FeatureCache
from pipeline.inference.feature_weights import INCEPTION
from pipeline.inference.held_out_batches import HeldOutBatches
from pipeline.inference.readjust import readjusted_model
from pipeline.inference.trained import TrainedModel
from pipeline.models.base import VAE, without_border
from pipeline.models.likelihoods import SquaredErrorLikelihood
from pipeline.models.noise import draw_noise
from pipeline.models.pixel_samples import sample_pixels
from pipeline.run.data import RunData
from shard_data.terminal import Progress, with_progress

log = logging.getLogger("pipeline")

NEIGHBORS = 3
"""k of precision and recall."""


@dataclass(frozen=True)
class SampleOptions:
    """The protocol: what sample metrics depend on, beside the real images."""

    seed: int | None = None
    """Of the latent noise; None: the run's, as in its validation."""
    temperature: float = 1.0
    """Scale of the priors' sigmas."""
    readjust: int = 0
    """Batches that re-estimate batch norm's statistics for these samples."""
    samples: int = 50_000
    decoder: Literal["mean", "sample"] = "mean"
    """Of p(x | z)."""
    rounding: Rounding = "uint8"
    resize: Resize = "pytorch-fid"
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    feature_weights: Path | None = None
    """File of the feature network's weights; None: torch hub's."""


def sampled_model(
    trained: TrainedModel, options: SampleOptions, count: int, condition_of: Callable[[Tensor], Tensor | None]
) -> VAE:
    """The model, or a copy whose batch norm is re-estimated; see readjusted_model."""
    if not options.readjust:
        return trained.model
    return readjusted_model(trained, count, condition_of, options.temperature, options.seed, options.readjust)


class SampleSets:
    """The features of a model's samples and of real images, computed once for all metrics of a command.

    Sample i is a function of (seed, i): the one that `TrainedModel.sample` gives, with the condition of real image
    i mod their number. Real images are those of the split as the model is trained on them: binarized, in its bits.
    """

    def __init__(
        self,
        trained: TrainedModel,
        runtime: Runtime,
        options: SampleOptions,
        data: RunData,
        network: nn.Module,
        metrics: Sequence[str],
    ):
        """Raises ValueError, on every rank, where a metric of `metrics` wants more images or another likelihood."""
        self.trained, self.runtime, self.options, self.data, self.network = trained, runtime, options, data, network
        self.num_real = min(data.recipe.validation.images or len(data.held_out), len(data.held_out))
        self.keep_rows = bool({"kid", "precision_recall"} & set(metrics))
        self.skipped: dict[str, float] = {}
        """The figure `skipped_samples`, where real images could not be read."""
        runtime.run_on_all(lambda: self._check(metrics))

    def at(self, options: SampleOptions) -> "SampleSets":
        """The same real images, and samples by other options."""
        other = copy.copy(self)
        other.options = options
        for name in ("samples", "model"):
            vars(other).pop(name, None)
        return other

    def _check(self, metrics: Sequence[str]) -> None:
        if self.options.decoder == "sample" and isinstance(
            getattr(self.trained.recipe.model, "likelihood", None), SquaredErrorLikelihood
        ):
            raise ValueError(
                "--decoder sample: likelihood squared_error is not a probability distribution; use --decoder mean"
            )
        size = self.options.kid_subset_size
        least = {"fid": 2, "kid": size, "precision_recall": NEIGHBORS + 1}
        smaller = {"kid": f", or take smaller subsets than {size:,} with --kid-subset-size"}
        for name in least.keys() & set(metrics):
            for found, what, option in (
                (self.num_real, "real images", "--split or --images"),
                (self.options.samples, "samples", "--samples"),
            ):
                if found < least[name]:
                    fix = f"take more with {option}{smaller.get(name, '')}"
                    raise ValueError(f"--metrics {name}: needs at least {least[name]:,} {what}, has {found:,}; {fix}")

    # ---- the metrics ---------------------------------------------------------------------------------------------

    def frechet(self) -> dict[str, float]:
        """`fid`: the Frechet distance of the features' normal distributions (Heusel et al. 2017)."""
        real, samples = self.real.moments, self.samples.moments
        for what, count in (("real images", real.count), ("samples", samples.count)):
            if count <= self.network.size:
                log.warning(
                    "fid: the covariance of %d %s has no full rank in %d dimensions: the distance is computed, but "
                    "is far too large; take more than %d, and 50,000 to compare with others",
                    *(count, what, self.network.size, self.network.size),
                )
        distance = self.runtime.run_on_main(lambda: frechet_distance(real, samples), "computing the distance")
        return {"fid": self.runtime.from_main(distance)} | self.skipped

    def kernel(self) -> dict[str, float]:
        """`kid` and `kid_std`, see kernel_distance."""
        options = self.options
        subsets = options.kid_subsets, options.kid_subset_size, options.seed
        figures = kernel_distance(self.real.rows, self.samples.rows, *subsets, self._share, self._total)
        return figures | self.skipped

    def precision_recall(self) -> dict[str, float]:
        """`precision` and `recall`, see precision_recall."""
        figures = precision_recall(self.real.rows, self.samples.rows, NEIGHBORS, self._share, self._total)
        return figures | self.skipped

    def _share(self, count: int, what: str = "distances", unit: str = "parts") -> Iterator[int]:
        """This rank's numbers below `count`; the main process shows how far it is."""
        numbers = range(self.runtime.rank, count, self.runtime.world_size)
        shown = Progress(what, len(numbers), unit, write=log.info, shown=self.runtime.is_main)
        for number in with_progress(numbers, shown):
            self.runtime.advance()
            yield number

    def _total(self, values: Tensor) -> Tensor:
        """The sum over ranks, which may finish minutes apart."""
        self.runtime.barrier()
        return self.runtime.sum(values)

    # ---- the samples ---------------------------------------------------------------------------------------------

    @cached_property
    def samples(self) -> ImageFeatures:
        """Of the model's samples. Blocks of them are computed whole on one rank, so that they do not depend on the
        number of ranks.
        """
        collector, size = self._collector(self.options.samples), self.data.recipe.validation.batch_size
        count = -(-self.options.samples // size)
        for number in self._share(count, "samples", "batches"):
            positions = range(number * size, min((number + 1) * size, self.options.samples))
            collector.add(self._sample(positions), positions)
        return collector.finish(self._total)

    @cached_property
    def model(self) -> VAE:
        """The one that is sampled from."""
        with self.runtime.autocast():
            return sampled_model(self.trained, self.options, self.options.samples, self._condition)

    def _collector(self, count: int) -> FeatureCollector:
        runtime, options = self.runtime, self.options
        how = options.resize, options.rounding, self.keep_rows
        return FeatureCollector(self.network, runtime.device, runtime.dtype, count, *how)

    @torch.no_grad()
    def _sample(self, positions: range) -> Tensor:
        """Images (b, C, H, W) in [0, 1], without padding."""
        runtime, options, model = self.runtime, self.options, self.model
        noise = draw_noise(model.groups, options.seed, "sample", positions, runtime.device, runtime.dtype)
        condition = self._condition(torch.tensor(positions))
        with runtime.autocast():
            images, latents = model.sample_with_latents(noise, options.temperature, condition)
            if options.decoder == "sample":
                images = sample_pixels(model.pixel_distribution(latents, condition), options.seed, positions)
        return without_border(images.to(runtime.dtype), self.data.recipe.data.pad)

    def _condition(self, numbers: Tensor) -> Tensor | None:
        """(b, K): those of real images, in their order, of the samples of these numbers."""
        condition, shards = self.trained.recipe.condition, self.data.held_out
        if condition is None:
            return None
        indices = (numbers % self.num_real).tolist()
        labels, attributes = torch.from_numpy(shards.labels(indices)), torch.from_numpy(shards.attributes(indices))
        return condition.encode(labels, attributes, shards.attribute_names).to(self.runtime.device, self.runtime.dtype)

    # ---- the real images -----------------------------------------------------------------------------------------

    @cached_property
    def real(self) -> ImageFeatures:
        """Of the split's images, from the cache if it has them."""
        runtime, cache = self.runtime, self._cache()
        found = runtime.run_on_main(lambda: cache.load(self.keep_rows), "reading features")
        if runtime.from_main(found is not None):
            return self._from_main(found)
        features, num_skipped = self._compute_real()
        if num_skipped:
            self.skipped = {"skipped_samples": float(num_skipped)}
        else:
            runtime.run_on_main(lambda: cache.save(features), "keeping features")
        return features

    def _compute_real(self) -> tuple[ImageFeatures, int]:
        """And how many images could not be read."""
        collector, batches = self._collector(self.num_real), HeldOutBatches(self.data)
        for batch in batches:
            if len(batch.images):
                x, _ = self.data.model_inputs(batch)
                collector.add(without_border(x, self.data.recipe.data.pad), batch.positions.tolist())
            self.runtime.advance()
        self.runtime.barrier()
        num_skipped = batches.report(self.trained.step)
        return collector.finish(self._total), num_skipped

    def _from_main(self, found: ImageFeatures | None) -> ImageFeatures:
        """The main process's features, on every rank."""
        runtime = self.runtime
        moments, rows = runtime.from_main(found and found.moments), None
        if self.keep_rows:
            rows = torch.zeros(self.num_real, self.network.size, dtype=runtime.dtype, device=runtime.device)
            if found is not None:
                rows.copy_(found.rows)
            sum_rows(rows, runtime.sum)
        return ImageFeatures(moments, rows)

    def _cache(self) -> FeatureCache:
        config, shards = self.data.recipe.data, self.data.held_out
        facts = {
            "version": 1,
            "fingerprint": shards.fingerprint,
            "split": shards.split,
            "holdout": self.data.holdout,
            "images": self.num_real,
            "images_seed": self.data.recipe.validation.images_seed,
            "binarize": config.binarize,
            "binarization_seed": self.data.recipe.train.seed if config.binarize == "dynamic" else None,
            "bits": config.bits,
            "resize": self.options.resize,
            "rounding": self.options.rounding,
            "network_sha256": INCEPTION.sha256,
        }
        place = Path(config.cache) if config.cache else default_cache()
        return FeatureCache(place, facts, self.num_real, self.network.size, self.runtime.dtype)
