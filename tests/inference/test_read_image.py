"""Image files and Pillow images as a model takes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.inference.read_image import crop_box, open_picture


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "x.png")
    found, done = open_picture(tmp_path / "x.png", (3, 16, 16))
    assert torch.equal(found, torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    assert done == "unchanged"


@pytest.mark.parametrize("channels", [1, 3])
def test_others_are_cut_in_the_middle_and_resized(tmp_path, channels):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    found, done = open_picture(tmp_path / "x.png", (channels, 16, 16))
    plain = (
        image.convert("L" if channels == 1 else "RGB").crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.BILINEAR)
    )
    expected = np.asarray(plain).reshape(16, 16, channels).transpose(2, 0, 1)
    assert torch.equal(found[0], torch.from_numpy(expected.copy()))
    assert done == "61x40: cropped to 40x40 at (10, 0), resized to 16x16 (bilinear)"


def test_aligned_faces_are_cut_as_the_set_was():
    celeba = {"crop": [15, 40, 163, 188], "size": 64, "filter": "bilinear"}
    assert crop_box((178, 218), celeba) == (15, 40, 163, 188)
    assert crop_box((178, 178), celeba) == (0, 0, 178, 178)
    assert crop_box((178, 218), {}) == (0, 20, 178, 198)


@pytest.mark.parametrize("crop", [None, 7, "abcd", [0, 0, 10**9, 10**9], [-5, 0, 9, 9], [9, 9, 3, 3], [0.5, 0, 9, 9]])
def test_a_crop_that_is_no_part_of_the_picture_is_not_used(crop):
    """A manifest of someone else could ask for a crop of any size, and any filter."""
    assert crop_box((178, 218), {"crop": crop}) == (0, 20, 178, 198)


def test_transparency_is_white_and_orientation_honoured(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    found, _ = open_picture(tmp_path / "clear.png", (3, 16, 16))
    assert int(found.min()) == 255
    sideways = Image.new("RGB", (16, 16), "black")
    sideways.paste("white", (0, 0, 16, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    found, _ = open_picture(tmp_path / "turned.jpg", (3, 16, 16))
    assert int(found[0, :, :, 12:].min()) > 200 > 50 > int(found[0, :, :, :10].max())


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png: cannot be used as a picture"):
        open_picture(tmp_path / "x.png", (3, 16, 16))


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="10000 x 9000 pixels; more than 80,000,000 are refused"):
        open_picture(tmp_path / "x.png", (3, 16, 16))
