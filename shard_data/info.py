"""Shows a shard set: a table of its splits, classes and attributes, and a contact sheet with labels.

Example: python -m shard_data info data/celeba64 --sheet faces.png"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shard_data import manifest as manifests
from shard_data.errors import Damaged, DataError
from shard_data.files import replacing
from shard_data.manifest import Manifest
from shard_data.shard import decode_image, read_index

NAMES_SHOWN = 10  # of the files skipped for one reason; the manifest lists all
TILE_WIDTH = 96  # pixels: small images are enlarged to about this
FONT_SIZE = 10
LINE_HEIGHT = 12
MARGIN = 4
ELLIPSIS = "..."


def describe(root: str | Path) -> str:
    """The table. Raises DataError if `root` holds no shard set."""
    root = Path(root)
    manifest = manifests.load(root)
    image = manifest["image"]
    lines = [
        f"{manifest['name']}: {image['height']} x {image['width']} x {image['channels']}, as .{manifest['encoding']}",
        f"fingerprint {manifest['fingerprint']}",
        f"{'split':<8}{'images':>10}{'shards':>8}{'MB':>9}",
    ]
    for split, entry in manifest["splits"].items():
        megabytes = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        lines.append(f"{split:<8}{entry['count']:>10,}{len(entry['shards']):>8}{megabytes:>9.1f}")
    if omitted := manifest.get("omitted"):
        lines += ["skipped when the set was made:", *describe_omitted(omitted)]
    return "\n".join([*lines, *_frequencies(root, manifest)])


def describe_omitted(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One line per entry: "  train: 2 files, no such image: 000001.jpg, 000002.jpg"."""
    lines = []
    for entry in entries:
        split = "no split" if entry["split"] == "none" else entry["split"]
        names, more = ", ".join(entry["names"][:NAMES_SHOWN]), entry["count"] - NAMES_SHOWN
        tail = f" and {more:,} more" if more > 0 else ""
        lines.append(f"  {split}: {num_files(entry['count'])}, {entry['reason']}: {names}{tail}")
    return lines


def num_files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def _frequencies(root: Path, manifest: Manifest) -> Iterator[str]:
    """How frequent each class and attribute is in the first split."""
    split = next(iter(manifest["splits"]))
    rows = np.concatenate([_index(root / shard["index"], manifest) for shard in manifest["splits"][split]["shards"]])
    if manifest["classes"]:
        yield f"classes in {split}:"
        labels = rows["label"]
        counts = np.bincount(labels[labels >= 0], minlength=len(manifest["classes"]))
        yield from (f"  {name:<24}{count:>8,}" for name, count in zip(manifest["classes"], counts, strict=True))
        if unlabeled := int((labels < 0).sum()):
            yield f"  {'(no label)':<24}{unlabeled:>8,}"
    if manifest["attributes"]:
        yield f"attributes in {split}, in percent:"
        shares = 100 * (rows["attributes"] == 1).mean(axis=0)
        yield from (f"  {name:<24}{share:>8.1f}" for name, share in zip(manifest["attributes"], shares, strict=True))


def contact_sheet(root: str | Path, path: str | Path, columns: int = 8, rows: int = 4) -> None:
    """Write the first images of the set as a PNG file, each above its class or its attributes."""
    root, path = Path(root), Path(path)
    manifest = manifests.load(root)
    samples = list(islice(_samples(root, manifest), columns * rows))
    captions = [_caption(row, manifest) for _, row in samples]
    text_width = max((_text_width(line) for caption in captions for line in caption), default=0)
    width = min(max(TILE_WIDTH, text_width), 2 * TILE_WIDTH)
    tiles = [_tile(image, caption, width) for (image, _), caption in zip(samples, captions, strict=True)]
    sheet = _table([tiles[i : i + columns] for i in range(0, len(tiles), columns)])
    try:
        with replacing(path) as file:
            sheet.save(file, "PNG", optimize=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another file for the sheet") from None


def _table(rows: list[list[Image.Image]]) -> Image.Image:
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (rows[0][0].width * len(rows[0]), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * tile.width, sum(heights[:number])))
    return sheet


def _samples(root: Path, manifest: Manifest) -> Iterator[tuple[np.ndarray, np.void]]:
    for shard in manifests.all_shards(manifest):
        rows = _index(root / shard["index"], manifest)
        with _reading(root / shard["file"]), open(root / shard["file"], "rb") as file:
            end = os.fstat(file.fileno()).st_size
            for row in rows:
                offset, size = int(row["offset"]), int(row["size"])
                if offset + size > end:
                    raise ValueError(f"its index places an image at bytes {offset} to {offset + size} of {end}")
                file.seek(offset)
                yield decode_image(file.read(size), manifest["encoding"]), row


def _index(path: Path, manifest: Manifest) -> np.ndarray:
    with _reading(path):
        return read_index(path, manifest)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise Damaged(f"{path}: cannot be read ({error}); `python -m shard_data verify` lists the errors") from None


def _caption(row: np.void, manifest: Manifest) -> list[str]:
    """The lines below an image: its class, or one line per attribute that is present."""
    if manifest["classes"]:
        return [manifest["classes"][row["label"]] if row["label"] >= 0 else "(no label)"]
    if manifest["attributes"]:
        return [name.replace("_", " ") for name in _present(row, manifest["attributes"])]
    return [row["key"].decode()]


def _present(row: np.void, names: list[str]) -> list[str]:
    """The attributes that are present; in brackets those that the image hides."""
    hidden = row["hidden"] if "hidden" in row.dtype.names else [False] * len(names)
    marked = zip(names, row["attributes"], hidden, strict=True)
    return [f"({name})" if is_hidden else name for name, value, is_hidden in marked if value == 1]


def _tile(image: np.ndarray, caption: list[str], width: int) -> Image.Image:
    """An image, enlarged by a whole number, above its caption."""
    factor = max(1, TILE_WIDTH // image.shape[1])
    picture = Image.fromarray(image.squeeze()).convert("RGB")
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width = max(picture.width, width)
    tile = Image.new("RGB", (width + 2 * MARGIN, picture.height + 2 * MARGIN + LINE_HEIGHT * len(caption)), "white")
    tile.paste(picture, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(tile)
    for number, line in enumerate(caption):
        place = (MARGIN, picture.height + MARGIN + LINE_HEIGHT * number)
        draw.text(place, _shortened(line, width), fill="black", font=_font())
    return tile


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)


def _text_width(line: str) -> int:
    return round(_font().getlength(line)) + 1


def _shortened(line: str, width: int) -> str:
    """The line, cut to the width in pixels."""
    if _text_width(line) <= width:
        return line
    while line and _text_width(line + ELLIPSIS) > width:
        line = line[:-1]
    return line + ELLIPSIS
