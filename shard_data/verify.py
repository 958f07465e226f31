"""Compares a shard set with its manifest: hashes, counts, index and tars; on request every decoded sample."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shard_data import manifest as manifests
from shard_data.files import sha256
from shard_data.manifest import Manifest, Shard
from shard_data.shard import decode_image
from shard_data.terminal import Progress


def verify(root: str | Path, decode: bool = False, progress: bool = False) -> list[str]:
    """Check the set in `root`. Returns one line per fault, each naming the file; no lines for an intact set.

    With `decode`, also reads every sample with stock webdataset and compares image, label and attributes with what the
    index gives. Raises DataError where the folder holds no shard set, Damaged where its manifest is invalid.
    """
    root = Path(root)
    manifest = manifests.load(root)
    faults, keys = [], set()
    total = sum(split["count"] for split in manifest["splits"].values())
    with Progress("verify", total, "images", shown=progress) as bar:
        for shard in manifests.all_shards(manifest):
            faults += check_shard(root, shard, manifest, decode, keys)
            bar.update(shard["count"])
    return faults


def check_shard(root: Path, shard: Shard, manifest: Manifest, decode: bool, keys: set[str]) -> list[str]:
    """The faults of one shard; `keys` collects the keys seen so far, to find one that occurs twice."""
    faults = [
        *_check_file(root / shard["file"], shard["sha256"]),
        *_check_file(root / shard["index"], shard["index_sha256"]),
    ]
    if faults:
        return faults  # the content of corrupt files is not looked at
    try:
        return _check_content(root, shard, manifest, decode, keys)
    except Exception as error:  # numpy, tarfile, Pillow and webdataset raise many kinds for files of no valid content
        return [f"{shard['file']}: cannot be read with its index ({_one_line(error)})"]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(filter(str.isprintable, text))[:200]


def _check_content(root: Path, shard: Shard, manifest: Manifest, decode: bool, keys: set[str]) -> list[str]:
    rows = np.lib.format.open_memmap(root / shard["index"], mode="r")  # unlike np.load, no archives and no pickles
    if rows.ndim != 1 or not {"key", "offset", "size"} <= set(rows.dtype.names or ()):
        return [f"{shard['index']}: holds {rows.dtype} {rows.shape}, not rows with key, offset and size"]
    faults = [*_check_index(root / shard["file"], rows, manifest, keys)]
    if len(rows) != shard["count"]:
        faults.append(f"{shard['index']}: {len(rows)} rows, the manifest says {shard['count']}")
    if decode and not faults:
        faults += _check_samples(root / shard["file"], rows, manifest)
    return faults


def _check_file(path: Path, digest: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name}: missing"
    elif sha256(path) != digest:
        yield f"{path.name}: corrupt ({path.stat().st_size} bytes whose sha256 is not the manifest's)"


def _check_index(path: Path, rows: np.ndarray, manifest: Manifest, keys: set[str]) -> Iterator[str]:
    """Every row leads to its image member, every image member has its row, and no key occurs twice."""
    members = _image_members(path, manifest["encoding"])
    listed = [(row["key"].decode(), int(row["offset"]), int(row["size"])) for row in rows]
    if members != listed:
        place = next((i for i, (a, b) in enumerate(zip(members, listed, strict=False)) if a != b), len(listed))
        counts = f"{len(members)} samples in the tar, {len(listed)} in the index"
        yield f"{path.name}: tar and index differ from sample {place} on; {counts}"
    for key, _, _ in listed:
        if key in keys:
            yield f"{path.name}: key {key} occurs twice in this set"
        keys.add(key)


def _image_members(path: Path, encoding: str) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        members = [(*member.name.rsplit(".", 1), member.offset_data, member.size) for member in tar]
    return [(key, offset, size) for key, extension, offset, size in members if extension == encoding]


def _check_samples(path: Path, rows: np.ndarray, manifest: Manifest) -> Iterator[str]:
    samples = _stock_samples(path, manifest["image"]["channels"])
    image = manifest["image"]
    shape = (image["height"], image["width"], image["channels"])
    with open(path, "rb") as file:
        for row in rows:
            sample, key = next(samples, None), row["key"].decode()
            file.seek(int(row["offset"]))
            ours = decode_image(file.read(int(row["size"])), manifest["encoding"])
            for what in _differences(sample, key, row, ours, shape, manifest):
                yield f"{path.name}: sample {key}: {what}"


def _stock_samples(path: Path, channels: int) -> Iterator[dict[str, Any]]:
    import webdataset  # here, as it imports torch, which conversion has no need of

    return iter(webdataset.WebDataset([str(path)], shardshuffle=False).decode("pill" if channels == 1 else "pil"))


def _differences(
    sample: dict | None, key: str, row: np.void, ours: np.ndarray, shape: tuple[int, ...], manifest: Manifest
) -> Iterator[str]:
    if sample is None or sample["__key__"] != key:
        yield f"webdataset finds {sample and sample['__key__']} in its place"
        return
    theirs = np.asarray(sample[manifest["encoding"]])
    if ours.shape != shape or ours.dtype != np.uint8:
        yield f"is {ours.dtype} {ours.shape}, the manifest says uint8 {shape}"
    elif not np.array_equal(theirs.reshape(*theirs.shape[:2], -1), ours):
        yield "its image differs between webdataset and the index"
    if "label" in row.dtype.names and sample["cls"] != row["label"]:
        yield f"label {sample['cls']} in the tar, {row['label']} in the index"
    yield from _attribute_differences(sample, row, manifest)


def _attribute_differences(sample: dict, row: np.void, manifest: Manifest) -> Iterator[str]:
    if "attributes" in row.dtype.names:
        listed = dict(zip(manifest["attributes"], row["attributes"].tolist(), strict=True))
        if sample["json"]["attributes"] != listed:
            yield "its attributes differ between tar and index"
    if "hidden" in row.dtype.names:
        listed = [name for name, gone in zip(manifest["attributes"], row["hidden"], strict=True) if gone]
        if sample["json"]["hidden"] != listed:
            yield "what is hidden differs between tar and index"
    if "identity" in row.dtype.names and sample["json"]["identity"] != row["identity"]:
        yield "its identity differs between tar and index"
