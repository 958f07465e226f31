"""Image files of any kind are decoded correctly or refused by name; simplejpeg and Pillow give the same pixels."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shard_data import decode, geometry
from shard_data.decode import read_rgb
from shard_data.errors import BadImage
from shard_data.file_kinds import describe_kind

RNG = np.random.default_rng(8)
PHOTO = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((40, 24), Image.Resampling.BICUBIC)
RGB = np.asarray(PHOTO)
GRAY = np.asarray(PHOTO.convert("L"))


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = read_rgb(data, "name.png")
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, depth: int, color: int, *extra: bytes) -> bytes:
    """A PNG file written from its description: `values` are big-endian rows of samples."""
    header = struct.pack(">2I5B", values.shape[1], values.shape[0], depth, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    body = chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_every_pixel(format):
    assert np.array_equal(pixels(saved(PHOTO, format, **({"lossless": True} if format == "WEBP" else {}))), RGB)


def test_gray_and_black_and_white_become_three_equal_channels():
    assert np.array_equal(pixels(saved(PHOTO.convert("L"))), GRAY[..., None].repeat(3, 2))
    bits = PHOTO.convert("1")
    assert np.array_equal(pixels(saved(bits)), 255 * np.asarray(bits, np.uint8)[..., None].repeat(3, 2))


def test_palettes_are_looked_up():
    image = PHOTO.quantize(17)
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.array_equal(pixels(saved(image)), palette[np.asarray(image)])
    assert np.array_equal(pixels(saved(image, "GIF")), palette[np.asarray(image)])


@given(values=st.lists(st.integers(0, 65535), min_size=6, max_size=6))
def test_sixteen_bit_gray_is_scaled_and_rounded(values):
    array = np.array(values, np.uint16).reshape(2, 3)
    expected = np.floor(array / 257 + 0.5).astype(np.uint8)
    for data in (png(array.astype(">u2"), 16, 0), saved(Image.fromarray(array), "TIFF")):
        assert np.array_equal(pixels(data), expected[..., None].repeat(3, 2))


def test_sixteen_bit_gray_with_a_transparent_value():
    array = np.array([[1000, 1001, 65535]], np.uint16)
    data = png(array.astype(">u2"), 16, 0, chunk(b"tRNS", struct.pack(">H", 1001)))
    assert pixels(data)[0, :, 0].tolist() == [4, 255, 255]


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return color * a + 255 * (1 - a)


def test_alpha_is_composited_over_white():
    alpha = RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    la = Image.fromarray(np.dstack([GRAY, alpha]))
    assert np.abs(pixels(saved(rgba)) - over_white(RGB, alpha)).max() <= 1
    assert np.abs(pixels(saved(la)) - over_white(GRAY[..., None].repeat(3, 2), alpha)).max() <= 1


def test_transparent_colors_become_white_and_others_stay():
    gray = np.array([[10, 20], [30, 20]], np.uint8)
    data = png(gray, 8, 0, chunk(b"tRNS", struct.pack(">H", 20)))
    assert pixels(data)[..., 0].tolist() == [[10, 255], [30, 255]]
    color = np.array([[1, 2, 3, 9, 9, 9]], np.uint8)
    data = png(np.ascontiguousarray(color).view("V3"), 8, 2, chunk(b"tRNS", struct.pack(">3H", 9, 9, 9)))
    assert pixels(data).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    index = np.array([[0, 1]], np.uint8)
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 100, 0])) + chunk(b"tRNS", b"\xff\x00")
    assert pixels(png(index, 8, 3, palette)).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_sixteen_bit_color_with_a_transparent_one_is_refused():
    values = np.zeros((1, 1), "V6")
    with pytest.raises(BadImage, match="transparent 16-bit color"):
        read_rgb(png(values, 16, 2, chunk(b"tRNS", struct.pack(">3H", 0, 300, 0))), "x.png")


def test_cmyk_is_what_pillow_makes_of_it():
    cmyk = PHOTO.convert("CMYK")
    assert np.abs(pixels(saved(cmyk, "TIFF")).astype(int) - RGB).max() <= 1
    data = saved(cmyk, "JPEG", quality=100)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_honored(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(PHOTO, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (expected.size == PHOTO.size) == (orientation < 5)
    assert np.array_equal(pixels(data), np.asarray(expected))


def test_broken_exif_has_no_orientation():
    data = saved(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_files_of_several_pages_are_refused(format):
    other = Image.fromarray(255 - RGB)
    with pytest.raises(BadImage, match=f"a.b: {format} with 2 frames or pages"):
        read_rgb(saved(PHOTO, format, save_all=True, append_images=[other]), "a.b")


def test_of_an_mpo_the_main_picture_is_taken():
    data = saved(PHOTO, "MPO", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


ONE_PIXEL, HUGE = png(np.zeros((1, 1), "u1"), 8, 0), (65535, 65535)
REFUSED = {
    "floats": lambda: saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    "32-bit integers": lambda: saved(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"),
    "Lab": lambda: saved(Image.new("LAB", (4, 4)), "TIFF"),
    "text": lambda: b"not an image at all",
    "empty": lambda: b"",
    "web page": lambda: b"<!DOCTYPE html><html></html>",
    "EPS": lambda: saved(PHOTO, "EPS"),
    "ICO": lambda: saved(PHOTO, "ICO"),
    "wide": lambda: ONE_PIXEL.replace(struct.pack(">2I", 1, 1), struct.pack(">2I", 10_000, 8_001)),
    "bomb": lambda: b"GIF89a" + struct.pack("<2H3B", *HUGE, 0, 0, 0) + b"," + struct.pack("<4HB", 0, 0, *HUGE, 0),
    "text bomb": lambda: png(np.zeros((1, 1), "u1"), 8, 0, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))),
    "zero width": lambda: b"GIF89a" + struct.pack("<2H3B", 0, 4, 0, 0, 0) + b";",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_files_are_refused_by_name(case):
    with pytest.raises(BadImage, match=r"^holiday\.jpg: ") as failure:
        read_rgb(REFUSED[case](), "holiday.jpg")
    assert "0x" not in str(failure.value)  # no address in memory: reasons go into the manifest


@given(cut=st.floats(0, 0.9), format=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]))
@settings(deadline=None)
def test_truncated_files_are_refused(cut, format):
    data = saved(PHOTO, format)
    with pytest.raises(BadImage):
        read_rgb(data[: int(cut * len(data))], "x")


@given(data=st.data(), format=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
@settings(deadline=None, max_examples=200)
def test_damaged_files_give_a_picture_or_are_refused(data, format):
    damaged = bytearray(saved(PHOTO, format))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read_rgb(bytes(damaged), "x").mode == "RGB"
    except BadImage:
        return


def by_pillow(data: bytes, monkeypatch) -> bytes | str:
    with monkeypatch.context() as patch:
        patch.setattr(decode, "simplejpeg", None)
        return outcome(data)


def outcome(data: bytes) -> bytes | str:
    try:
        image = read_rgb(data, "x")
    except BadImage as error:
        return str(error)
    return image.tobytes() + repr(image.size).encode()


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    seed=st.integers(0, 1000),
    cut=st.integers(0, 40),
    restart=st.sampled_from([0, 2]),
)
@settings(deadline=None, max_examples=150)
def test_both_jpeg_decoders_give_the_same_pixels_or_refusals(
    size, quality, subsampling, progressive, seed, cut, restart
):
    pytest.importorskip("simplejpeg")
    array = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    data = saved(image, "JPEG", restart_marker_blocks=restart, **options)
    with pytest.MonkeyPatch.context() as patch:
        assert outcome(data) == by_pillow(data, patch)
        damaged = data[: len(data) - cut]
        assert outcome(damaged) == by_pillow(damaged, patch)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_both_jpeg_decoders_agree_on_damaged_files(data):
    pytest.importorskip("simplejpeg")
    damaged = bytearray(saved(PHOTO, "JPEG"))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(2, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        assert outcome(bytes(damaged)) == by_pillow(bytes(damaged), patch)


def rgb_coded(header: str) -> bytes:
    """PHOTO as a JPEG of RGB components, which its Adobe marker, its component names or both say."""
    data = bytearray(saved(PHOTO, "JPEG", quality=100, subsampling=0, keep_rgb=True))
    frame, scan, adobe = data.find(b"\xff\xc0"), data.find(b"\xff\xda"), data.find(b"\xff\xee\0\x0eAdobe")
    assert (data[frame + 10 : frame + 19 : 3], data[adobe + 15]) == (b"RGB", 0)
    if header == "Adobe marker":
        data[frame + 10 : frame + 19 : 3] = data[scan + 5 : scan + 11 : 2] = b"\1\2\3"
    if header == "component names":
        del data[adobe : adobe + 16]
    return bytes(data)


@pytest.mark.parametrize("header", ["both", "Adobe marker", "component names"])
@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
def test_a_jpeg_of_rgb_components_is_not_converted_from_ycbcr(header, decoder, monkeypatch):
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decode, "simplejpeg", None)
    difference = np.abs(pixels(rgb_coded(header)).astype(int) - RGB)
    assert difference.max() <= 2  # of 255, at quality 100


def test_simplejpeg_is_used_where_it_is_installed(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    calls, real = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    pixels(saved(PHOTO, "JPEG"))
    assert calls == [1]


def test_conversion_works_without_simplejpeg(tmp_path):
    code = """
import sys
sys.modules["simplejpeg"] = None
from shard_data import decode
assert decode.simplejpeg is None
decode.read_rgb(open(sys.argv[1], "rb").read(), "x")"""
    (tmp_path / "x.jpg").write_bytes(saved(PHOTO, "JPEG"))
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.jpg"], check=True)


@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(8, 64))
@settings(deadline=None, max_examples=50)
def test_both_fits_give_squares_out_of_the_middle(width, height, size):
    gradient = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, width, 3))
    image = Image.fromarray(np.ascontiguousarray(gradient))
    for fit in geometry.FITS.values():
        if max(width, height) <= 50 * min(width, height):
            assert fit(image, size, "bilinear").size == (size, size)


def test_resize_crop_and_crop_resize_against_plain_pillow():
    image = Image.fromarray(RNG.integers(0, 256, (30, 51, 3), dtype=np.uint8))
    first = image.resize((27, 16), Image.Resampling.BICUBIC).crop((6, 0, 22, 16))
    second = image.crop((10, 0, 40, 30)).resize((16, 16), Image.Resampling.BICUBIC)
    assert geometry.FITS["resize-crop"](image, 16, "bicubic").tobytes() == first.tobytes()
    assert geometry.FITS["crop-resize"](image, 16, "bicubic").tobytes() == second.tobytes()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><title>Drive - Quota\n exceeded</title>", "a web page titled 'Drive - Quota exceeded'"),
        (b"\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"../.git/annex/objects/ZX", "a git-annex pointer"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"\x1f\x8b....", "gzip data"),
        (b"\x00\x01\x02", "data that begins with 00 01 02"),
    ],
)  # fmt: skip
def test_a_file_is_described_by_its_first_bytes(head, words):
    assert describe_kind(head).startswith(words)


@pytest.fixture
def hostile() -> Path:
    if "REAL_DATA_DIR" not in os.environ:
        pytest.skip("REAL_DATA_DIR is not set: the odd and broken images are needed")
    return Path(os.environ["REAL_DATA_DIR"]) / "hostile"


BROKEN = """\
truncated_jpeg.jpg truncated_image.png truncated_end_chunk.png broken.png broken_data_stream.png
unknown_compression_method.png png_decompression_dos.png decompression_bomb.gif zero_width.gif
hopper_unknown_pixel_mode.tif"""
SEVERAL = """\
apng_mode_16bit.png apng_delay.png apng_chunk_no_fdat.png dispose_bgnd_rgba.gif transparent_dispose.gif
decompression_bomb_extents.gif"""


def test_the_real_odd_images(hostile, monkeypatch):
    images = [path for path in hostile.iterdir() if path.suffix in (".jpg", ".png", ".gif", ".tif", ".webp", ".mpo")]
    refused = {path.name for path in images if isinstance(outcome(path.read_bytes()), str)}
    assert refused == {*BROKEN.split(), *SEVERAL.split(), "lab.tif"}
    for path in images:
        assert outcome(path.read_bytes()) == by_pillow(path.read_bytes(), monkeypatch), path.name
    plain, inserted = (np.asarray(read_rgb(path.read_bytes(), path.name)) for path in same_face(hostile))
    assert np.array_equal(plain, inserted)


def same_face(hostile: Path) -> tuple[Path, Path]:
    name = "celeba_000001_178x218_exif_inserted.jpg"
    return hostile.parent / "celeba" / "img_align_celeba" / "000001.jpg", hostile / "bad_downloads" / name
