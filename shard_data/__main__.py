"""python -m shard_data: make, check and look at shard sets."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

from shard_data import info, verify
from shard_data.errors import Damaged, DataError, Incomplete
from shard_data.shard import ENCODINGS
from shard_data.sources import SOURCES
from shard_data.writer import convert

STYLE = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
OVERVIEW = """\
Turn a data set into a shard set: WebDataset tars, an index beside each, and manifest.json, which is written last.

  python -m shard_data toy_faces --out data/toy_faces32 --size 32
  python -m shard_data mnist --source ~/mnist --out data/mnist
  python -m shard_data info data/mnist --sheet mnist.png
  python -m shard_data verify data/mnist --decode

An interrupted conversion goes on when the same command is run again. Exit codes: 0 done, 1 a damaged set,
2 something to mend in the command or its input (the message says what)."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m shard_data", description=OVERVIEW, **STYLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in SOURCES.items():
        command = commands.add_parser(name, help=_first_line(module), description=module.__doc__, **STYLE)
        module.add_arguments(command)
        _add_writer_arguments(command)
        command.set_defaults(run=_convert, module=module)
    _add_verify(commands.add_parser("verify", help="check a shard set", description=verify.__doc__, **STYLE))
    _add_info(commands.add_parser("info", help="show what a shard set holds", description=info.__doc__, **STYLE))
    return parser


def _first_line(module: ModuleType) -> str:
    return module.__doc__.partition("\n")[0].rstrip(".")


def _add_writer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shards")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the set; made where missing")
    encoding = "of the images; both lossless: npy is fastest to read, png is small (default npy)"
    group.add_argument("--encoding", choices=ENCODINGS, default="npy", help=encoding)
    size = "samples per shard (default: what keeps a shard under about 32 MiB)"
    group.add_argument("--shard-size", type=int, metavar="N", help=size)
    shuffle = (
        "write each split in a random order decided by this seed, or `none` for the originals' (default %(default)s)"
    )
    group.add_argument("--shuffle", type=_seed, metavar="SEED", help=shuffle)
    partial = "convert what is there: leave out what is missing or unreadable, and list it in the manifest"
    group.add_argument("--partial", action="store_true", help=partial)
    workers = "processes; the bytes do not depend on it (default: the cores, here %(default)s)"
    group.add_argument("--workers", type=int, default=_cores(), metavar="N", help=workers)
    group.add_argument("--overwrite", action="store_true", help="replace a complete set that lies in --out")


def _seed(word: str) -> int | None:
    return None if word == "none" else int(word)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of the shard set")
    decode = "also read every sample with stock webdataset and compare picture, label and attributes"
    parser.add_argument("--decode", action="store_true", help=decode)
    parser.set_defaults(run=_verify)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of the shard set")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="also write a contact sheet with labels")
    parser.set_defaults(run=_info)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convert(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    manifest = convert(
        arguments.module.from_arguments(arguments),
        arguments.out,
        encoding=arguments.encoding,
        shard_size=arguments.shard_size,
        shuffle_seed=arguments.shuffle,
        partial=arguments.partial,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress=True,
    )
    counts = ", ".join(f"{split} {entry['count']:,}" for split, entry in manifest["splits"].items())
    print(f"{arguments.out}: {manifest['name']} is complete ({counts} images) after {time.monotonic() - start:.1f} s")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    faults = verify.verify(arguments.root, arguments.decode, progress=True)
    for fault in faults:
        print(f"error: {arguments.root}/{fault}", file=sys.stderr)
    if faults:
        print(f"error: {arguments.root}: damaged; make the set again with --overwrite", file=sys.stderr)
        return 1
    depth = "hashes, counts, index and every sample" if arguments.decode else "hashes, counts and index"
    print(f"{arguments.root}: in order ({depth})")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    print(info.describe(arguments.root))
    if arguments.sheet:
        info.contact_sheet(arguments.root, arguments.sheet)
        print(f"contact sheet: {arguments.sheet}")
    return 0


def main(words: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(words)
    try:
        return arguments.run(arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, Incomplete):
            words = sys.argv[1:] if words is None else words
            print(f"  {shlex.join(['python', '-m', 'shard_data', *words, '--partial'])}", file=sys.stderr)
        return 1 if isinstance(error, Damaged) else 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again, and it goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
