"""Pictures and histograms as W&B takes them, within the limits that it states for fast pages.

Source: "Experiments limits and performance" in W&B's documentation: at most 50,000 pictures and 10,000 histograms of
one key.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.tracking.wandb_metrics import KL_BY_GROUP

MAX_PICTURES = 50_000
"""Of one key in one run."""
MAX_HISTOGRAMS = 10_000
"""Of one key in one run."""
MAX_SIDE = 8192
"""Pixels. Larger pictures are scaled down; the files in the run folder keep their size."""
GROUP = re.compile(r"kl/(\d+)x\d+_group(\d+)")


class Thinning:
    """Selects at most `limit` of the steps up to `total_steps`, evenly. A restart may add one.

    Without `total_steps` (0: unknown) every step is selected.
    """

    def __init__(self, limit: int, total_steps: int):
        self._limit = limit
        self._total_steps = total_steps
        self._last: dict[str, int] = {}

    def selects(self, key: str, step: int) -> bool:
        """Whether the value of `key` at `step` is logged. Steps ascend."""
        if not self._total_steps:
            return True
        interval = step * self._limit // (self._total_steps + 1)
        if self._last.get(key) == interval:
            return False
        self._last[key] = interval
        return True


class Media:
    """The pictures and the histogram of one run."""

    def __init__(self, total_steps: int):
        """`total_steps` of the run; 0 if unknown."""
        self._pictures = Thinning(MAX_PICTURES, total_steps)
        self._histograms = Thinning(MAX_HISTOGRAMS, total_steps)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray | Path]) -> dict[str, Any]:
        """What is logged of the pictures of `step`: arrays uint8 (height, width, 3), or PNG files.

        Raises OSError or ValueError for a picture that cannot be read.
        """
        return {key: picture_of(value) for key, value in pictures.items() if self._pictures.selects(key, step)}

    def histograms(self, step: int, scalars: Mapping[str, float]) -> dict[str, Any]:
        """The KL by group of `step`, if it is logged."""
        histogram = kl_histogram(scalars)
        if histogram is None or not self._histograms.selects(KL_BY_GROUP, step):
            return {}
        return {KL_BY_GROUP: histogram}


def picture_of(picture: np.ndarray | Path) -> Any:
    """A wandb.Image. The content of a file that is small enough is sent as it is."""
    import wandb

    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            if max(opened.size) <= MAX_SIDE:
                return wandb.Image(str(picture))
            picture = np.asarray(opened.convert("RGB"))
    if max(picture.shape[:2]) > MAX_SIDE:
        scaled = Image.fromarray(picture)
        scaled.thumbnail((MAX_SIDE, MAX_SIDE))
        picture = np.asarray(scaled)
    return wandb.Image(picture)


def kl_histogram(scalars: Mapping[str, float]) -> Any | None:
    """A wandb.Histogram whose bar i is the KL (nats) of latent group i, in the order of sampling.

    None without two groups at least, for more groups than W&B takes bars, and where a KL is not finite. A KL that is
    negative, as estimates by sampling can be, counts as 0.
    """
    import wandb

    groups = sorted((int(found[1]), int(found[2]), key) for key in scalars if (found := GROUP.fullmatch(key)))
    values = [max(float(scalars[key]), 0.0) for *_, key in groups]
    if not 2 <= len(values) <= wandb.Histogram.MAX_LENGTH or not all(map(math.isfinite, values)):
        return None
    return wandb.Histogram(np_histogram=(np.array(values), np.arange(len(values) + 1)))
