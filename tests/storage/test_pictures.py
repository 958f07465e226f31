"""Animations are complete or absent, and are what plain Pillow reads."""

import numpy as np
import pytest
from PIL import Image, features

from pipeline.storage.pictures import save_animation

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_is_complete_or_absent(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"morph{suffix}"
    save_animation(path, FRAMES, [10, 20, 30])
    before = path.read_bytes()
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.size) == (3, (10, 8))

    def half(image, file, **options):
        file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    for other in (path, tmp_path / f"new{suffix}"):
        with pytest.raises(OSError, match="No space left"):
            save_animation(other, FRAMES, [10, 20, 30])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_pillow_without_webp_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match="built without WebP; write a .gif"):
        save_animation(tmp_path / "a.webp", FRAMES, [10, 20, 30])
    assert list(tmp_path.iterdir()) == []
