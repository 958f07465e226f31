"""The lines of a run: aligned, with the time that is left at the pace of the whole interval."""

import math
import re

import pytest

from pipeline.run.interval_lines import IntervalLines, clock_time

SCALARS = {
    "train/loss": 17460.04, "train/elbo": -18880.5, "train/bpd": 8.8661, "train/kl": 1454.2, "train/lr": 0.006,
    "perf/images_per_second": 45.5, "kl/4x4_group00": 3.0,
}  # fmt: skip


def test_numbers_stand_below_each_other():
    lines = IntervalLines(1600, 8)
    later = {"train/loss": 9.5, "train/elbo": -0.25, "train/bpd": 0.0831, "train/kl": 0.0, "train/lr": 1e-5}
    texts = [lines.training(20, SCALARS), lines.training(1600, later | {"perf/images_per_second": 10_381.0})]
    assert [text.partition("  lr ")[0] for text in texts] == [
        "step   20/1600    1 %  loss  17460.0  elbo -18880.5  bpd 8.8661  kl  1454.2",
        "step 1600/1600  100 %  loss   9.5000  elbo  -0.2500  bpd 0.0831  kl  0.0000",
    ]
    assert [text.partition("  lr ")[2][:8] for text in texts] == ["6.00e-03", "1.00e-05"]
    assert len({len(text) for text in texts}) == 1
    assert len(texts[0]) <= 120
    labels = [[match.start() for match in re.finditer("loss|elbo|bpd|kl|lr|images|left", text)] for text in texts]
    assert labels[0] == labels[1]
    assert "group" not in texts[0]


def test_what_is_not_finite_or_missing_is_shown_so():
    text = IntervalLines(10, 8).training(5, {"train/loss": math.nan, "train/elbo": -math.inf, "train/kl": 1e7})
    assert text == "step  5/10   50 %  loss      nan  elbo     -inf  kl 1.00e+07"


def test_the_time_left_counts_validation_and_pictures():
    """The first line has the speed of training alone: 16 images/s, 8 images in a step. Then 10 steps take 100 s, of
    which training takes 5 s.
    """
    now = iter([1000.0, 1100.0, 1200.0])
    lines = IntervalLines(100, 8, clock=lambda: next(now))
    left = [lines.training(step, {"perf/images_per_second": 16.0}).split()[-2] for step in (50, 60, 70)]
    assert left == ["0:00:25", "0:06:40", "0:05:00"]


def test_validation_is_aligned_with_training():
    lines = IntervalLines(1600, 8)
    text = lines.validation(20, {"val/elbo": -8871.33, "val/kl": 646.3367, "val/bpd": 4.16622})
    assert text == "step   20/1600  val    elbo  -8871.3  kl  646.34  bpd 4.1662"
    assert text.index("elbo") == lines.training(20, SCALARS).index("loss")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (4e5, "111:06:40")]
)
def test_times(seconds, text):
    assert clock_time(seconds) == text
