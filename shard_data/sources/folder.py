"""A folder of images, with classes by subfolder or without classes.

  python -m shard_data folder --source ~/photos --size 64 --out data/photos64
  python -m shard_data folder --source ~/photos --size 64 --val 0.1 --test 0 --no-classes --out data/photos64
  python -m shard_data folder --source ~/ffhq --size 256 --val 7000 --test 0 --no-classes --out data/ffhq256

If the folder has a subfolder train/ (and val/ or valid/ or validation/, and test/), these are the splits. Otherwise a
hash of each image's path and the split seed decides its split. With shares, an image stays in its split when others are
added or removed; numbers of images are exact. Within a split, the subfolders are the classes; images outside of
subfolders have no class. Every image is converted to RGB, turned upright by its EXIF orientation and made square: the
shorter side is resized and the center cropped, or the other way round."""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shard_data.decode import TRANSFORM, read_rgb
from shard_data.errors import BadImage, DataError
from shard_data.geometry import FILTERS, FITS, check_filter, check_size
from shard_data.source import Omission, Record, Sample
from shard_data.sources import hash_split
from shard_data.sources.hash_split import SPLITS, HashSplit
from shard_data.sources.image_files import read_file

GIVEN = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
OTHER_IMAGES = tuple(".heic .heif .avif .jxl .jp2 .psd .svg .eps .dng .cr2 .nef .tga .exr".split())
SIZES = (8, 1024)
LONGEST = 50  # times the shorter side; an image of one row would grow to gigabytes before its center is cropped


class Folder:
    """Images as uint8 (size, size, 3), with class labels if they lie in subfolders.

    `fit` is "resize-crop" or "crop-resize"; `val` and `test` are shares in [0, 1), or numbers of
    images, of the split by hash.
    """

    attributes: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = SPLITS

    def __init__(
        self,
        folder: str | Path,
        size: int = 64,
        *,
        fit: str = "resize-crop",
        filter: str = "bilinear",
        use_classes: bool = True,
        val: float = 0.05,
        test: float = 0.05,
        split_seed: int = 0,
        name: str = "folder",
    ):
        self.folder, self.size, self.fit, self.filter = Path(folder), size, fit, filter
        self.use_classes, self.hash_split, self.name = use_classes, HashSplit(val, test, split_seed), name
        self._check_options()
        self.omissions: list[Omission] = []
        self.classes: tuple[str, ...] | None = None
        self._found: dict[str, list[str]] = {}
        self._given = False

    def _check_options(self) -> None:
        check_size(self.size, *SIZES)
        check_filter(self.filter)
        if self.fit not in FITS:
            raise DataError(f"fit {self.fit!r}: must be one of {', '.join(FITS)}")
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; --source must be the folder of the images")

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("folder", "size", "fit", "filter")}

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"label"} if self.classes else ())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, 3)

    def transform(self) -> dict[str, Any]:
        return {"fit": self.fit, "size": self.size, "filter": self.filter, **TRANSFORM}

    def description(self) -> dict[str, Any]:
        """Lists the folder. Files that are no images by their suffix are counted by suffix."""
        self.omissions.clear()
        self._given = any((self.folder / name).is_dir() for name in ("train", "Train"))
        self._found = {split: [] for split in SPLITS}
        files = sorted(self._files())
        images = [(path, size) for path, size in files if _suffix(path) in (*IMAGES, *OTHER_IMAGES)]
        ignored = Counter(suffix for path, _ in files if (suffix := _suffix(path)) not in (*IMAGES, *OTHER_IMAGES))
        digest = hashlib.sha256()
        for (path, size), split in zip(images, self._splits([path for path, _ in images]), strict=True):
            if reason := _skip_reason(path):
                self.omissions.append(Omission(split, printable(path), reason))
                continue
            self._found[split].append(path)
            digest.update(f"{path}\0{size}\n".encode())
        if not any(self._found.values()) and not self.omissions:
            raise DataError(f"{self.folder}: no images found; --source must be the folder of the images")
        self.classes = self._classes()
        splits = "given" if self._given else self.hash_split.description()
        return {"splits": splits, "listing_sha256": digest.hexdigest(), "ignored_files": dict(sorted(ignored.items()))}

    def records(self, split: str) -> Sequence[Record]:
        numbers = {name: number for number, name in enumerate(self.classes or ())}
        return [
            Record(f"{split}-{i:07d}", (path, numbers[self._class(path)] if numbers else -1))
            for i, path in enumerate(self._found[split])
        ]

    def load(self, record: Record) -> Sample:
        path, label = record.where
        image = read_rgb(read_file(self.folder / path, path), path)
        if max(image.size) > LONGEST * min(image.size):
            raise BadImage(path, f"{image.width} x {image.height} pixels, too elongated for a square crop")
        pixels = np.asarray(FITS[self.fit](image, self.size, self.filter))
        return Sample(pixels, label=label, facts={"file": path})

    def _files(self) -> Iterator[tuple[str, int]]:
        """(path in the folder, bytes) of every file that is not hidden. Links to folders are added to the omissions."""
        for place, folders, files in os.walk(self.folder, onerror=_cannot_list):
            here = Path(place)
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
            for name in [name for name in folders if (here / name).is_symlink()]:
                path = (here / name).relative_to(self.folder).as_posix()
                self.omissions.append(Omission("none", printable(path), "a link to a folder; links are not followed"))
            for name in files:
                if not name.startswith("."):
                    size = (here / name).stat().st_size if (here / name).exists() else 0
                    yield (here / name).relative_to(self.folder).as_posix(), size

    def _splits(self, paths: list[str]) -> list[str]:
        if self._given:
            return [self._given_split(path) for path in paths]
        return self.hash_split.assign([printable(path) for path in paths], str(self.folder))

    def _given_split(self, path: str) -> str:
        top = path.partition("/")[0].lower()
        if top not in GIVEN or "/" not in path:
            raise DataError(
                f"{self.folder / printable(path)}: outside of train, val and test; "
                "move it, or give the folder of the classes as --source"
            )
        return GIVEN[top]

    def _class(self, path: str) -> str | None:
        """The folder that is the class: the first below the split, or below the source."""
        folders = path.split("/")[int(self._given) : -1]
        return folders[0] if folders else None

    def _classes(self) -> tuple[str, ...] | None:
        if not self.use_classes:
            return None
        found = {self._class(path): path for paths in self._found.values() for path in paths}
        if None in found and len(found) > 1:
            some = next(name for name in found if name is not None)
            raise DataError(
                f"{self.folder}: {printable(found[None])} is in no subfolder, but {printable(found[some])} is, "
                "so the classes are ambiguous; move one of them, or add --no-classes"
            )
        if None in found or not found:
            return None
        for name in found:
            if not name.isprintable():
                raise DataError(
                    f"{self.folder}: the class folder {printable(name)!r} has control characters; rename it"
                )
        return tuple(sorted(found))


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away")


def printable(path: str) -> str:
    """A path as UTF-8 can write it; bytes of another encoding as \\x escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _skip_reason(path: str) -> str | None:
    """Why an image is skipped before it is read, or None."""
    if (suffix := _suffix(path)) in OTHER_IMAGES:
        return f"{suffix} images are not supported; convert them to PNG or JPEG"
    return None if printable(path) == path else "its name is not UTF-8; rename it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the folder of the images")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, 8 to 1024 (default %(default)s)")
    fit = "resize the shorter side to --size and crop the center, or crop first (default %(default)s)"
    parser.add_argument("--fit", choices=FITS, default="resize-crop", help=fit)
    parser.add_argument(
        "--filter", choices=FILTERS, default="bilinear", help="of the resize, as Pillow names it (default %(default)s)"
    )
    parser.add_argument("--no-classes", action="store_true", help="do not take subfolders as classes")
    hash_split.add_arguments(parser, ", if there are no split folders")
    parser.add_argument("--name", default="folder", help="name of the set in its manifest (default %(default)s)")
    parser.set_defaults(shuffle=0)  # folders are sorted by class


def from_arguments(arguments: argparse.Namespace) -> Folder:
    return Folder(
        arguments.source,
        arguments.size,
        fit=arguments.fit,
        filter=arguments.filter,
        use_classes=not arguments.no_classes,
        val=arguments.val,
        test=arguments.test,
        split_seed=arguments.split_seed,
        name=arguments.name,
    )
