"""Pictures and histograms stay within what W&B takes."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.tracking import wandb_media
from pipeline.tracking.wandb_media import Media, Thinning, kl_histogram


@pytest.mark.parametrize(("limit", "total", "every"), [(10, 1000, 1), (10, 1000, 7), (100, 1000, 50), (7, 5, 1)])
def test_thinned_steps_are_few_even_and_a_function_of_the_step(limit, total, every):
    steps = range(0, total + 1, every)
    thinning = Thinning(limit, total)
    chosen = [step for step in steps if thinning.selects("samples", step)]
    assert min(limit, len(steps)) - 1 <= len(chosen) <= limit
    gaps = np.diff(chosen)
    assert max(gaps) <= max(every, total / limit) + every
    resumed = Thinning(limit, total)
    middle = chosen[len(chosen) // 2]
    again = [step for step in steps if step >= middle and resumed.selects("samples", step)]
    assert again == chosen[len(chosen) // 2 :]


def test_keys_are_thinned_apart_and_an_unknown_length_is_not():
    thinning = Thinning(1, 100)
    assert [thinning.selects(key, 1) for key in ("a", "b", "a")] == [True, True, False]
    assert all(Thinning(1, 0).selects("a", step) for step in range(5))


def test_pictures_of_one_run_are_at_most_the_limit(monkeypatch):
    monkeypatch.setattr(wandb_media, "MAX_PICTURES", 3)
    monkeypatch.setattr(wandb_media, "MAX_HISTOGRAMS", 4)
    media = Media(total_steps=100)
    picture, kl = np.zeros((4, 4, 3), np.uint8), {"kl/4x4_group00": 1.0, "kl/8x8_group00": 2.0}
    assert sum(len(media.pictures(step, {"reconstructions": picture})) for step in range(1, 101)) == 3
    assert sum(len(media.histograms(step, kl)) for step in range(1, 101)) == 4


def test_a_large_picture_is_scaled_down_and_a_small_one_is_sent_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(wandb_media, "MAX_SIDE", 20)
    large, small = np.full((10, 40, 3), 9, np.uint8), np.full((10, 20, 3), 9, np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    Image.fromarray(small).save(tmp_path / "small.png", compress_level=0)
    for picture in (large, tmp_path / "large.png"):
        assert wandb_media.picture_of(picture).image.size == (20, 5)
    assert wandb_media.picture_of(small).image.size == (20, 10)
    sent = wandb_media.picture_of(tmp_path / "small.png")._path
    assert Path(sent).read_bytes() == (tmp_path / "small.png").read_bytes()


def test_kl_by_group_is_in_the_order_of_sampling():
    """By resolution as numbers, not as text."""
    names = ["1x1_group00", "4x4_group00", "4x4_group01", "4x4_group10", "16x16_group00", "128x128_group02"]
    kl = {f"kl/{name}": float(number) for number, name in enumerate(names)}
    histogram = kl_histogram({**dict(reversed(kl.items())), "train/kl": 7.0, "kl/other": 9.0})
    assert histogram.to_json() == {"_type": "histogram", "values": [0, 1, 2, 3, 4, 5], "bins": list(range(7))}


def test_kl_that_cannot_be_a_histogram_is_left_to_the_curves():
    assert kl_histogram({"kl/4x4_group00": -0.25, "kl/8x8_group00": 1.0}).histogram == [0.0, 1.0]
    assert kl_histogram({"kl/4x4_group00": math.nan, "kl/8x8_group00": 1.0}) is None
    assert kl_histogram({"kl/4x4_group00": 1.0}) is None
    assert kl_histogram({f"kl/4x4_group{number:03d}": 1.0 for number in range(513)}) is None
    assert len(kl_histogram({f"kl/4x4_group{number:03d}": 1.0 for number in range(512)}).histogram) == 512
