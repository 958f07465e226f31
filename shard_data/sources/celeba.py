"""CelebA: 202,599 aligned faces with 40 attributes, from the folder of JPEGs or from its ZIP file.

  python -m shard_data celeba --source ~/celeba --out data/celeba64 --size 64
  python -m shard_data celeba --source ~/celeba --out data/celeba128 --size 128 --crop center178 --filter lanczos

Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild, ICCV 2015. The splits are the official partition. The
source is the folder with img_align_celeba (or img_align_celeba.zip), list_attr_celeba.txt and list_eval_partition.txt,
or Kaggle's .csv files; the subfolders Anno/, Eval/ and Img/ are searched as well. If identity_CelebA.txt is there,
identities are included. The ZIP file is read without unpacking it."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shard_data import downloads
from shard_data.decode import Crop, read_rgb
from shard_data.errors import DataError
from shard_data.files import sha256
from shard_data.geometry import FILTERS, Box, center_box, check_filter, check_size, resize
from shard_data.source import Omission, Record, Sample
from shard_data.sources.celeba_lists import Table, find_list, read_attributes, read_column
from shard_data.sources.image_files import ImageFolder, ImageZip

WIDTH, HEIGHT = 178, 218
SPLITS = ("train", "val", "test")  # 0, 1 and 2 of the partition
SIZES = (32, 256)
BOX148 = (15, 40, 163, 188)
IMAGES = "img_align_celeba"


@dataclass(frozen=True)
class CelebA:
    """Faces as uint8 (size, size, 3) with binary attributes and, if their list exists, identities.

    `crop` is "box148" (left 15, top 40, which most papers use), "center108", "center140", "center178" or any other
    centered square, or "LEFT,TOP,RIGHT,BOTTOM" in pixels of the 178 x 218 original.
    """

    folder: Path
    size: int = 64
    crop: str = "box148"
    filter: str = "bilinear"
    omissions: list[Omission] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "celeba"
    classes: ClassVar[None] = None
    splits: ClassVar[tuple[str, ...]] = SPLITS

    def __post_init__(self):
        check_size(self.size, *SIZES)
        check_filter(self.filter)
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "box", parse_crop(self.crop))

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: not the lists, since each record has its image's name, attributes and identity."""
        return {name: getattr(self, name) for name in ("size", "filter", "box", "_images")}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, 3)

    @property
    def attributes(self) -> tuple[str, ...]:
        return self._attributes.columns

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"attributes"} | ({"identity"} if self._identities is not None else set()))

    def transform(self) -> dict[str, Any]:
        return {"crop": list(self.box), "size": self.size, "filter": self.filter}

    def description(self) -> dict[str, Any]:
        self._splits  # noqa: B018  reads all lists, and sets the omissions
        lists = {"attributes": self._attributes, "partition": self._partition, "identity": self._identities}
        return {"images": self._images.path.name} | {
            kind: {"file": table.path.name, "sha256": sha256(table.path)} for kind, table in lists.items() if table
        }

    def records(self, split: str) -> Sequence[Record]:
        return self._splits[split]

    def load(self, record: Record) -> Sample:
        name, place, attributes, identity = record.where
        image = read_rgb(self._images.read(name, place), name, Crop((WIDTH, HEIGHT), self.box))
        pixels = np.asarray(resize(image, (self.size, self.size), self.filter))
        return Sample(pixels, attributes=tuple(attributes), identity=identity)

    @cached_property
    def _images(self) -> ImageFolder | ImageZip:
        return find_images(self.folder)

    @cached_property
    def _attributes(self) -> Table:
        return read_attributes(find_list(self.folder, "list_attr_celeba"), self._images.names)

    @cached_property
    def _partition(self) -> Table:
        return read_column(find_list(self.folder, "list_eval_partition"), largest=len(SPLITS) - 1)

    @cached_property
    def _identities(self) -> Table | None:
        path = find_list(self.folder, "identity_CelebA", required=False)
        return path and read_column(path, 2**31 - 1, self._images.names)

    @cached_property
    def _splits(self) -> dict[str, list[Record]]:
        splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
        self.omissions.clear()
        rows, people, there = self._attributes.rows, self._identities, self._images.names
        for name, number in zip(self._partition.rows, self._partition.values[:, 0].tolist(), strict=True):
            split = SPLITS[number]
            if name not in there:
                self.omissions.append(Omission(split, name, "no such image"))
            elif name not in rows:
                self.omissions.append(Omission(split, name, f"no row in {self._attributes.path.name}"))
            else:
                attributes = self._attributes.values[rows[name]].tobytes()
                person = people.values[people.rows[name], 0] if people and name in people.rows else -1
                splits[split].append(Record(Path(name).stem, (name, self._images.place(name), attributes, int(person))))
        unlisted = sorted(there - self._partition.rows.keys())
        self.omissions.extend(Omission("none", name, f"no row in {self._partition.path.name}") for name in unlisted)
        return splits


def find_images(folder: Path) -> ImageFolder | ImageZip:
    """The aligned JPEGs: img_align_celeba/ (Kaggle nests two of them), Img/img_align_celeba/, or the .zip."""
    for place in (Path(IMAGES, IMAGES), Path(IMAGES), Path("Img", IMAGES)):
        if (folder / place).is_dir() and next((folder / place).glob("*.jpg"), None):
            return ImageFolder(folder / place)
    for place in (Path(f"{IMAGES}.zip"), Path("Img", f"{IMAGES}.zip")):
        if (folder / place).is_file():
            return ImageZip(folder / place, suffix=".jpg")
    raise downloads.not_found(folder, f"{IMAGES}/ with JPEGs or {IMAGES}.zip")


def parse_crop(crop: str) -> Box:
    """(left, top, right, bottom) in the 178 x 218 original. Raises DataError for another syntax or a box outside it."""
    if crop == "box148":
        return BOX148
    if named := re.fullmatch(r"center(\d{1,3})", crop):
        box = center_box(WIDTH, HEIGHT, int(named[1]))
    elif re.fullmatch(r"\d{1,3}(,\d{1,3}){3}", crop):
        box = tuple(map(int, crop.split(",")))
    else:
        raise DataError(f"crop {crop!r}: must be box148, center108, center140, center178 ... or LEFT,TOP,RIGHT,BOTTOM")
    left, top, right, bottom = box
    if not (0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT):
        raise DataError(f"crop {crop!r}: the box {box} is not inside the {WIDTH} x {HEIGHT} pixels of an original")
    return box


def add_arguments(parser: argparse.ArgumentParser) -> None:
    downloads.add_arguments(parser, "folder with img_align_celeba (or the .zip) and the lists")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, 32 to 256 (default %(default)s)")
    crop = "box148 (left 15, top 40), center108, center140, center178 or LEFT,TOP,RIGHT,BOTTOM (default %(default)s)"
    parser.add_argument("--crop", default="box148", metavar="BOX", help=crop)
    parser.add_argument(
        "--filter", choices=FILTERS, default="bilinear", help="of the resize, as Pillow names it (default %(default)s)"
    )


def from_arguments(arguments: argparse.Namespace) -> CelebA:
    return CelebA(downloads.from_arguments("celeba", arguments), arguments.size, arguments.crop, arguments.filter)
