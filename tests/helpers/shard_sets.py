"""Writes shard sets by docs/architecture.md, without shard_data, so that the reader is tested against the format, and
makes them unreadable.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.shards import TarShards, UnreadableShard


@dataclass
class Samples:
    """The samples of one split: images (n, H, W, C) uint8, labels (n,), attributes and hidden (n, A), or None."""

    images: np.ndarray
    labels: np.ndarray | None = None
    attributes: np.ndarray | None = None
    hidden: np.ndarray | None = None


def random_samples(
    count: int, height: int = 4, width: int = 5, channels: int = 3, attributes: int = 0, seed: int = 0
) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples(
        rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8),
        rng.integers(0, 10, count),
        rng.integers(-1, 2, (count, attributes)) if attributes else None,
    )


def write_set(root: Path, splits: dict[str, Samples], shard_sizes: list[int], encoding: str = "npy") -> Path:
    """Write a complete set. Each split is cut into shards of `shard_sizes`; the last size repeats as needed."""
    root.mkdir(parents=True, exist_ok=True)
    first = next(iter(splits.values()))
    height, width, channels = first.images.shape[1:]
    names = None if first.attributes is None else [f"Attribute_{i}" for i in range(first.attributes.shape[1])]
    manifest = {
        "format": "webdataset-shards",
        "version": 1,
        "name": "made",
        "image": {"height": height, "width": width, "channels": channels},
        "encoding": encoding,
        "transform": {},
        "classes": None if first.labels is None else [f"class {i}" for i in range(10)],
        "attributes": names,
        "splits": {
            name: _write_split(root, name, samples, shard_sizes, encoding, names) for name, samples in splits.items()
        },
    }
    manifest |= {"source": {}, "omitted": []}
    (root / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint_of(manifest)}))
    return root


def fingerprint_of(manifest: dict) -> str:
    """By docs/architecture.md: sha256 of the canonical JSON, without three of the keys."""
    content = {key: manifest[key] for key in sorted(manifest.keys() - {"fingerprint", "source", "omitted"})}
    text = json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def edit_manifest(root: Path, change, sign: bool = True) -> None:
    """Apply `change` to the parsed manifest and write it back, with the fingerprint of its new content if `sign`."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign and "fingerprint" in manifest:
        manifest["fingerprint"] = fingerprint_of(manifest)
    path.write_text(json.dumps(manifest))


def rewrite_index(root: Path, stem: str, change, split: str = "train") -> None:
    """Replace a shard's index by `change(index)`, hash in the manifest included, as a faulty writer would."""
    path = root / f"{stem}.index.npy"
    np.save(path, change(np.load(path)))

    def update(manifest):
        for shard in manifest["splits"][split]["shards"]:
            if shard["index"] == path.name:
                shard["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    edit_manifest(root, update)


def setting(*path, value):
    """A change for `edit_manifest`: this value at this path."""

    def change(manifest):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def set_field(index: np.ndarray, row: int, field: str, value) -> np.ndarray:
    """The index with this value changed, for `rewrite_index`."""
    index[field][row] = value
    return index


def flip_byte(path: Path, place: int, mask: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def place_of(root: Path, index: int) -> tuple[Path, str, int]:
    """(tar, key, offset of the image) of a sample of the small sets, from the index files."""
    for number, size in enumerate((10, 8, 5)):
        if index < size:
            row = np.load(root / f"train-{number:06d}.index.npy")[index]
            return root / f"train-{number:06d}.tar", row["key"].decode(), int(row["offset"])
        index -= size
    raise AssertionError


def assert_unreadable(root: Path, index: int, message: str, asked=range(23)) -> None:
    """Reading raises UnreadableShard naming tar, key and offset of sample `index`, also the second time."""
    tar, key, offset = place_of(root, index)
    shards = TarShards(root, "train")
    for _ in range(2):
        with pytest.raises(UnreadableShard, match=message) as caught:
            shards.images(asked)
        text = str(caught.value)
        assert f"{tar}: sample '{key}' at offset {offset}: " in text
        assert f"python -m shard_data verify {root}" in text


def _write_split(root: Path, split: str, samples: Samples, shard_sizes: list[int], encoding: str, names) -> dict:
    shards, start = [], 0
    while start < len(samples.images):
        size = shard_sizes[min(len(shards), len(shard_sizes) - 1)]
        rows = range(start, min(start + size, len(samples.images)))
        shards.append(_write_shard(root, f"{split}-{len(shards):06d}", split, samples, rows, encoding, names))
        start += size
    return {"count": len(samples.images), "shards": shards}


def _write_shard(root: Path, stem: str, split: str, samples: Samples, rows: range, encoding: str, names) -> dict:
    tar_path, index_path = root / f"{stem}.tar", root / f"{stem}.index.npy"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for extension, content in _members(samples, row, encoding, names):
                info = tarfile.TarInfo(f"{split}-s{row:05d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    np.save(index_path, _index(tar_path, samples, rows, encoding))
    return {
        "file": tar_path.name,
        "sha256": hashlib.sha256(tar_path.read_bytes()).hexdigest(),
        "bytes": tar_path.stat().st_size,
        "count": len(rows),
        "index": index_path.name,
        "index_sha256": hashlib.sha256(index_path.read_bytes()).hexdigest(),
    }


def _members(samples: Samples, row: int, encoding: str, names):
    buffer = io.BytesIO()
    image = samples.images[row]
    if encoding == "npy":
        np.save(buffer, image)
    else:
        Image.fromarray(image if image.shape[2] > 1 else image[..., 0]).save(buffer, "PNG")
    yield encoding, buffer.getvalue()
    if samples.labels is not None:
        yield "cls", str(samples.labels[row]).encode()
    if samples.attributes is not None:
        known = {name: int(value) for name, value in zip(names, samples.attributes[row], strict=True) if value >= 0}
        yield "json", json.dumps({"attributes": known}).encode()


def _index(tar_path: Path, samples: Samples, rows: range, encoding: str) -> np.ndarray:
    """Offsets as the tar reader of the standard library finds them."""
    fields = [("key", "S32"), ("offset", "<u8"), ("size", "<u4")]
    if samples.labels is not None:
        fields.append(("label", "<i4"))
    if samples.attributes is not None:
        fields.append(("attributes", "<i1", (samples.attributes.shape[1],)))
    if samples.hidden is not None:
        fields.append(("hidden", "?", (samples.hidden.shape[1],)))
    with tarfile.open(tar_path) as tar:
        images = [member for member in tar if member.name.endswith(f".{encoding}")]
    index = np.zeros(len(images), fields)
    index["key"] = [member.name.partition(".")[0] for member in images]
    index["offset"] = [member.offset_data for member in images]
    index["size"] = [member.size for member in images]
    if samples.labels is not None:
        index["label"] = samples.labels[rows.start : rows.stop]
    if samples.attributes is not None:
        index["attributes"] = samples.attributes[rows.start : rows.stop]
    if samples.hidden is not None:
        index["hidden"] = samples.hidden[rows.start : rows.stop]
    return index
