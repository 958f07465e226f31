"""The images of one shard, read at the offsets that its index gives."""

import io
from math import prod

import numpy as np
from PIL import Image

from pipeline.data.read_files import OpenFile, ShortFile, raise_fault
from shard_data.manifest import Manifest, Shard

Image.preinit()  # loads the decoders now, since that needs free file descriptors

# A shard with one unreadable sample, even if it is the first, gives the others.
HEADERS_TRIED = 8
PNG_MODES = {1: "L", 3: "RGB"}


def image_shape(manifest: Manifest) -> tuple[int, int, int]:
    """(H, W, C) of every image."""
    image = manifest["image"]
    return image["height"], image["width"], image["channels"]


class UnreadableSample(ValueError):
    """The sample in this row is not what the manifest and the index say."""

    def __init__(self, row: int, problem: str):
        super().__init__(row, problem)
        self.row = int(row)
        self.problem = problem


class TarImages:
    """Reads the images of an open shard. Its methods raise UnreadableSample, and OSError for faults of the system."""

    def __init__(self, file: OpenFile, entry: Shard, index: np.ndarray, manifest: Manifest, wanted: int):
        """`wanted` is the row that an error names when the whole file is unusable."""
        self.file = file
        self.entry = entry
        self.index = index
        self.encoding = manifest["encoding"]
        self.image_shape = image_shape(manifest)
        if file.size() != entry["bytes"]:
            raise UnreadableSample(wanted, f"the file has {file.size()} bytes, the manifest says {entry['bytes']}")
        if self.encoding == "npy":
            self._header = self._npy_header()

    def has_hash(self) -> bool:
        """Whether the file's sha256 is the manifest's."""
        return self.file.sha256() == self.entry["sha256"]

    def read_into(self, images: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
        """Writes the images of the samples in these rows (k,) to these places (k,) of `images` (n, H, W, C) uint8."""
        if self.encoding == "npy":
            self._read_npy(images, places, rows)
            return
        for place, row in zip(places, rows, strict=True):
            images[place] = self._png_image(row)

    def _record(self, row: int) -> bytes:
        """The image member's data as they are in the tar."""
        try:
            return self.file.read(int(self.index["offset"][row]), int(self.index["size"][row])).tobytes()
        except ShortFile as error:
            raise self._short(row, error) from error

    def _short(self, row: int, error: ShortFile) -> UnreadableSample:
        return UnreadableSample(row, f"{error}, the manifest says {self.entry['bytes']}")

    def _npy_header(self) -> np.ndarray:
        """The .npy header that every sample of the shard must begin with: the first that fits."""
        problems = []
        for row in range(min(HEADERS_TRIED, len(self.index))):
            record = self._record(row)
            try:
                header = _parse_header(record, self.image_shape)
            except Exception as error:  # NumPy's parser raises many kinds, each for a wrong header
                raise_fault(error)
                problems.append(error)
                continue
            self._check_equal_sizes(len(header) + prod(self.image_shape))
            return header
        raise UnreadableSample(0, f"not the .npy that it should be ({problems[0]})") from problems[0]

    def _check_equal_sizes(self, size: int) -> None:
        odd = np.flatnonzero(self.index["size"] != size)
        if odd.size:
            found, row = self.index["size"][odd[0]], odd[0]
            raise UnreadableSample(
                row, f"the index gives it {found} bytes; as .npy of {self.image_shape} it has {size}"
            )

    def _read_npy(self, images: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
        """Straight from the file to their places. The headers are compared, not parsed."""
        headers = np.empty((len(rows), len(self._header)), np.uint8)
        pixels, offsets = images.reshape(len(images), -1), self.index["offset"][rows].tolist()
        records = ([header, pixels[place]] for header, place in zip(headers, places.tolist(), strict=True))
        try:
            self.file.read_all(records, offsets, int(self.index["size"][0]))
        except ShortFile as error:
            raise self._short(rows[0], error) from error
        wrong = np.flatnonzero((headers != self._header).any(axis=1))
        if wrong.size:
            raise UnreadableSample(rows[wrong[0]], "not the .npy that it should be (its header is wrong)")

    def _png_image(self, row: int) -> np.ndarray:
        height, width, channels = self.image_shape
        record = self._record(row)
        try:
            with Image.open(io.BytesIO(record), formats=["PNG"]) as image:
                if image.size != (width, height) or image.mode != PNG_MODES[channels]:
                    raise ValueError(f"{image.mode} {image.size}, the manifest says {self.image_shape}")
                return np.asarray(image).reshape(self.image_shape)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoder raises many kinds, each for a wrong file
            raise_fault(error)
            raise UnreadableSample(row, f"not the PNG that it should be ({error})") from error


def _parse_header(record: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The bytes of the .npy header. Raises many kinds of errors where it is not that of such an image."""
    stream = io.BytesIO(record)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version of the format")
    found = np.lib.format.read_array_header_1_0(stream)
    if found != (image_shape, False, np.uint8) or stream.tell() + prod(image_shape) != len(record):
        raise ValueError(f"{found}, the manifest says {image_shape}")
    return np.frombuffer(record, np.uint8, stream.tell())
