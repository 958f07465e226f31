"""The pictures of a run as WebP, thinned evenly over its steps until they fit a number of bytes."""

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipeline.reporting.thinning import evenly
from shard_data.files import read_bounded

MAX_STEPS = 60
"""Of the slider."""
MAX_FILE_BYTES = 2**26
MAX_PIXELS = 2**26
MAX_SIDE = 1024
"""Larger pictures are made smaller."""
MIN_SIDE = 64
QUALITY = 82


@dataclass
class Gallery:
    """Pictures for a page."""

    steps: list[int]
    """Those that are shown, ascending."""
    num_steps: int
    """Those that the run folder has."""
    pictures: dict[str, dict[int, str]]
    """{kind: {step: address of its content, `data:image/webp...`}}."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """{kind: (width, height) in pixels}."""
    notes: list[str] = field(default_factory=list)


def build_gallery(pictures: Mapping[str, Mapping[int, Path]], max_bytes: int) -> Gallery:
    """At most `max_bytes` of WebP. Pictures that cannot be read are named in the notes."""
    encoder = _Encoder()
    all_steps = sorted({step for by_step in pictures.values() for step in by_step})
    num_steps = min(len(all_steps), MAX_STEPS)
    while True:
        steps = evenly(all_steps, num_steps)
        found = {
            kind: {step: encoder.encode(path) for step in steps if (path := by_step.get(step))}
            for kind, by_step in pictures.items()
        }
        size = sum(len(content) for by_step in found.values() for content in by_step.values())
        if size <= max_bytes or encoder.max_side <= MIN_SIDE:
            break
        if num_steps > 1:
            num_steps = max(1, min(num_steps - 1, int(num_steps * max_bytes / size)))
        else:
            encoder = _Encoder(encoder.max_side // 2)
    shown = {
        kind: {step: data_address(content) for step, content in by_step.items() if content}
        for kind, by_step in found.items()
    }
    shown = {kind: by_step for kind, by_step in shown.items() if by_step}
    sizes = {kind: encoder.sizes[pictures[kind][max(by_step)]] for kind, by_step in shown.items()}
    steps = sorted({step for by_step in shown.values() for step in by_step})
    return Gallery(steps, len(all_steps), shown, sizes, encoder.notes)


def data_address(content: bytes) -> str:
    """A WebP picture as an address that holds it."""
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


class _Encoder:
    """Encodes each file once. What cannot be read is no bytes, and a sentence."""

    def __init__(self, max_side: int = MAX_SIDE):
        self.max_side = max_side
        self.sizes: dict[Path, tuple[int, int]] = {}
        self.notes: list[str] = []
        self._encoded: dict[Path, bytes] = {}

    def encode(self, path: Path) -> bytes:
        if path not in self._encoded:
            try:
                changed = path.lstat().st_mtime_ns
                self._encoded[path], self.sizes[path] = _file_to_webp(path, changed, self.max_side)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                problem = getattr(error, "strerror", None) or str(error)
                self.notes.append(f"{path.parent.name}/{path.name} cannot be shown ({problem[:200]}); the others are.")
                self._encoded[path] = b""
        return self._encoded[path]


@functools.lru_cache(maxsize=500)
def _file_to_webp(path: Path, changed: int, max_side: int) -> tuple[bytes, tuple[int, int]]:
    """Kept for a page that is made again and again; `changed` is when the file was."""
    return to_webp(read_bounded(path, MAX_FILE_BYTES), max_side)


def to_webp(content: bytes, max_side: int = MAX_SIDE) -> tuple[bytes, tuple[int, int]]:
    """A PNG file as WebP, and its width and height. Raises OSError, ValueError or SyntaxError where it is none, and
    ValueError for one of too many pixels.
    """
    with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are more than a report reads")
        picture = picture.convert("RGB")
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, method=4)
    return file.getvalue(), picture.size
