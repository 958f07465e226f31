"""A shard set at a glance: a table, and a contact sheet with labels."""

import contextlib
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shard_data import manifest as manifests
from shard_data.errors import Damaged, DataError
from shard_data.files import replacing
from shard_data.manifest import Manifest
from shard_data.shard import decode_image

TILE = 96  # small pictures are enlarged to about this
TEXT = 10


def describe(root: str | Path) -> str:
    """The table. Raises DataError where `root` holds no shard set."""
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
    lines += [f"left out of {o['split']}: {o['count']:,}, {o['reason']}" for o in manifest["omitted"]]
    return "\n".join([*lines, *_frequencies(root, manifest)])


def _frequencies(root: Path, manifest: Manifest) -> Iterator[str]:
    """How often each class and attribute comes in the first split."""
    split = next(iter(manifest["splits"]))
    rows = np.concatenate([_index(root / shard["index"]) for shard in manifest["splits"][split]["shards"]])
    if manifest["classes"]:
        yield f"classes in {split}:"
        counts = np.bincount(rows["label"], minlength=len(manifest["classes"]))
        yield from (f"  {name:<24}{count:>8,}" for name, count in zip(manifest["classes"], counts, strict=True))
    if manifest["attributes"]:
        yield f"attributes in {split}, in percent:"
        shares = 100 * (rows["attributes"] == 1).mean(axis=0)
        yield from (f"  {name:<24}{share:>8.1f}" for name, share in zip(manifest["attributes"], shares, strict=True))


def contact_sheet(root: str | Path, path: str | Path, columns: int = 8, rows: int = 4) -> None:
    """Write the first pictures of the set, each over its class or attributes, as a PNG file."""
    root, path = Path(root), Path(path)
    manifest = manifests.load(root)
    tiles = [_tile(image, _caption(row, manifest)) for image, row in islice(_samples(root, manifest), columns * rows)]
    sheet = _table([tiles[i : i + columns] for i in range(0, len(tiles), columns)])
    try:
        with replacing(path) as file:
            sheet.save(file, "PNG", optimize=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another place for the sheet") from None


def _table(rows: list[list[Image.Image]]) -> Image.Image:
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (rows[0][0].width * len(rows[0]), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * tile.width, sum(heights[:number])))
    return sheet


def _samples(root: Path, manifest: Manifest) -> Iterator[tuple[np.ndarray, np.void]]:
    for shard in manifests.all_shards(manifest):
        rows = _index(root / shard["index"])
        with _reading(root / shard["file"]), open(root / shard["file"], "rb") as file:
            for row in rows:
                file.seek(int(row["offset"]))
                yield decode_image(file.read(int(row["size"])), manifest["encoding"]), row


def _index(path: Path) -> np.ndarray:
    with _reading(path):
        return np.load(path, allow_pickle=False)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise Damaged(f"{path}: cannot be read ({error}); python -m shard_data verify tells more") from None


def _caption(row: np.void, manifest: Manifest) -> str:
    if manifest["classes"]:
        return manifest["classes"][row["label"]]
    if manifest["attributes"]:
        return ", ".join(_present(row, manifest["attributes"])).replace("_", " ")
    return row["key"].decode()


def _present(row: np.void, names: list[str]) -> list[str]:
    """The attributes that are there; in brackets those that the picture hides."""
    hidden = row["hidden"] if "hidden" in row.dtype.names else [False] * len(names)
    marked = zip(names, row["attributes"], hidden, strict=True)
    return [f"({name})" if gone else name for name, value, gone in marked if value == 1]


def _tile(image: np.ndarray, caption: str) -> Image.Image:
    """A picture, enlarged by a whole number, over its caption."""
    factor = max(1, TILE // image.shape[1])
    picture = Image.fromarray(image.squeeze()).convert("RGB")
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    lines = textwrap.wrap(caption, max(8, picture.width // 6))
    tile = Image.new("RGB", (picture.width + 4, picture.height + 6 + (TEXT + 2) * len(lines)), "white")
    tile.paste(picture, (2, 2))
    draw = ImageDraw.Draw(tile)
    for number, line in enumerate(lines):
        place = (3, picture.height + 3 + (TEXT + 2) * number)
        draw.text(place, line, fill="black", font=ImageFont.load_default(TEXT))
    return tile
