"""The settings of VDVAE that are strings: the blocks of its encoder and decoder, and the widths of resolutions.

Each is a comma-separated list, as in the reference release:

    R        one block at resolution R (feature maps of R x R)
    RxN      N blocks
    RdQ      encoder: one block, after whose output Q x Q pixels are averaged, so that resolution R/Q follows
    RmQ      decoder: one block, before which the upsampled state of resolution Q is added
    R:W      widths: W channels at resolution R
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

MAX_BLOCKS = 1_000
MAX_RESOLUTION = 2**14
TOKEN = re.compile(r"([0-9]{1,6})(?:([xmd])([0-9]{1,6}))?")
WIDTH = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")
EXAMPLES = {
    "encoder": "R (a block at resolution R), RxN (N blocks) and RdQ (a block, then pooling by Q)",
    "decoder": "R (a block at resolution R), RxN (N blocks) and RmQ (a block after the state of Q is mixed in)",
}


class BlockOptions(NamedTuple):
    """One block of the encoder or decoder."""

    resolution: int
    """Height and width of its input."""
    other: int | None = None
    """Encoder: the factor by which its output is pooled. Decoder: the resolution whose state is mixed in."""


class VDVAEOptions(NamedTuple):
    """The architecture that the settings describe, checked."""

    encoder: tuple[BlockOptions, ...]
    decoder: tuple[BlockOptions, ...]
    widths: dict[int, int]
    """Channels of every resolution of the encoder."""

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.encoder[0].resolution

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Those of the decoder, ascending."""
        return tuple(sorted({block.resolution for block in self.decoder}))


def parse_options(encoder_blocks: str, decoder_blocks: str, width: int, widths: str) -> VDVAEOptions:
    """The architecture. Raises ValueError, naming the setting and the block, for one that cannot be built."""
    encoder = parse_blocks(encoder_blocks, "encoder")
    decoder = parse_blocks(decoder_blocks, "decoder")
    resolutions = _encoder_resolutions(encoder)
    options = VDVAEOptions(encoder, decoder, _parse_widths(widths, width, resolutions))
    _check_decoder(options, resolutions)
    _check_states_are_used(options)
    _check_widths(options, resolutions)
    return options


def parse_blocks(text: str, kind: Literal["encoder", "decoder"]) -> tuple[BlockOptions, ...]:
    """The blocks of a string, in its order. Raises ValueError for a part that is none."""
    setting, blocks = f"model.{kind}_blocks", []
    for part in text.split(","):
        match = TOKEN.fullmatch(part.strip())
        if match is None or match[2] == {"encoder": "m", "decoder": "d"}[kind]:
            raise ValueError(f"{setting}: {part[:40]!r} is not a block; a block of the {kind} is {EXAMPLES[kind]}")
        resolution, letter, number = int(match[1]), match[2], int(match[3] or 1)
        count = number if letter == "x" else 1
        if not 1 <= resolution <= MAX_RESOLUTION or number < 1:
            raise ValueError(f"{setting}: {part[:40]}: numbers are at least 1, resolutions at most {MAX_RESOLUTION:,}")
        if len(blocks) + count > MAX_BLOCKS:
            raise ValueError(f"{setting}: more than {MAX_BLOCKS:,} blocks")
        blocks += [BlockOptions(resolution, number if letter in ("m", "d") else None)] * count
    return tuple(blocks)


def _encoder_resolutions(encoder: Sequence[BlockOptions]) -> list[int]:
    """The encoder's resolutions, descending. Raises ValueError for a block that does not get what it is made for."""
    current, found = encoder[0].resolution, [encoder[0].resolution]
    for resolution, factor in encoder:
        if resolution != current:
            raise ValueError(
                f"model.encoder_blocks: a block at resolution {resolution} follows one that leaves resolution {current}"
            )
        if factor is not None:
            if factor == 1 or resolution % factor:
                raise ValueError(
                    f"model.encoder_blocks: {resolution}d{factor}: resolution {resolution} can be pooled by a factor "
                    f"that divides it and is at least 2, not by {factor}"
                )
            current //= factor
            found.append(current)
    return found


def _parse_widths(text: str, width: int, resolutions: Sequence[int]) -> dict[int, int]:
    """The width of every resolution of the encoder. Raises ValueError for what is no width."""
    given: dict[int, int] = {}
    for part in text.split(",") if text.strip() else []:
        match = WIDTH.fullmatch(part.strip())
        if match is None or not 1 <= int(match[2]) <= 2**16:
            raise ValueError(f"model.widths: {part[:40]!r} is not RESOLUTION:CHANNELS, for instance 8:512")
        resolution = int(match[1])
        if resolution not in resolutions or resolution in given:
            raise ValueError(
                f"model.widths: {part.strip()}: give a width once for a resolution of model.encoder_blocks: "
                f"{_listed(resolutions)}"
            )
        given[resolution] = int(match[2])
    return {resolution: given.get(resolution, width) for resolution in resolutions}


def _check_decoder(options: VDVAEOptions, resolutions: Sequence[int]) -> None:
    """Raises ValueError for a block without an encoder feature, or whose mix-in is not there or does not fit."""
    done: set[int] = set()
    for resolution, mixed in options.decoder:
        name = f"model.decoder_blocks: {resolution}" + (f"m{mixed}" if mixed else "")
        if resolution not in resolutions:
            raise ValueError(
                f"{name}: model.encoder_blocks has no resolution {resolution}; it has {_listed(resolutions)}"
            )
        if mixed is not None:
            if mixed not in done:
                raise ValueError(f"{name}: no block before it has resolution {mixed}")
            if mixed >= resolution or resolution % mixed:
                raise ValueError(f"{name}: {mixed} must be a smaller resolution that divides {resolution}")
        done.add(resolution)
    if options.size not in done:
        raise ValueError(f"model.decoder_blocks: no block has the images' resolution, {options.size}")
    if resolutions[-1] not in done:
        raise ValueError(
            f"model.decoder_blocks: no block has resolution {resolutions[-1]}, the lowest of model.encoder_blocks, so "
            "nothing would use the encoder's last blocks"
        )


def _check_states_are_used(options: VDVAEOptions) -> None:
    """Raises ValueError for a decoder block whose result no later block and no output uses."""
    unused: set[int] = set()
    for resolution, mixed in options.decoder:
        unused -= {resolution, mixed}
        unused.add(resolution)
    for resolution in sorted(unused - {options.size}):
        raise ValueError(
            f"model.decoder_blocks: nothing uses what the last block at resolution {resolution} computes; mix it in "
            f"at a higher resolution R with Rm{resolution}"
        )


def _check_widths(options: VDVAEOptions, resolutions: Sequence[int]) -> None:
    """Raises ValueError where channels would have to be made up or thrown away.

    The encoder appends zero channels where a resolution is wider than the one before it. The decoder mixes in the first
    channels of a lower resolution.
    """
    widths = options.widths
    for high, low in zip(resolutions, resolutions[1:], strict=False):
        if widths[low] < widths[high]:
            raise ValueError(
                f"model.widths: {widths[low]} channels at resolution {low} are fewer than {widths[high]} at {high}; "
                "widths must not shrink as the resolution falls"
            )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
