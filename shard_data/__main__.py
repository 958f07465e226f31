"""python -m shard_data: make, check and look at shard sets."""

import argparse
import os
import sys
import time
from pathlib import Path

from shard_data.errors import DataError
from shard_data.shard import ENCODINGS
from shard_data.sources import SOURCES
from shard_data.writer import convert

OVERVIEW = """\
Turn a data set into a shard set: WebDataset tars, an index beside each, and manifest.json, which is written last.

  python -m shard_data toy_faces --out data/toy_faces32 --size 32
  python -m shard_data mnist --source ~/mnist --out data/mnist
  python -m shard_data info data/mnist --sheet mnist.png
  python -m shard_data verify data/mnist --decode

An interrupted conversion goes on when the same command is run again. Exit codes: 0 done, 1 a damaged set,
2 something to mend in the command or its input (the message says what)."""


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m shard_data", description=OVERVIEW, formatter_class=layout, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in SOURCES.items():
        command = commands.add_parser(
            name, help=_first_line(module), description=module.__doc__, formatter_class=layout, allow_abbrev=False
        )
        module.add_arguments(command)
        _add_writer_arguments(command)
        command.set_defaults(run=_convert, module=module)
    return parser


def _first_line(module) -> str:
    return module.__doc__.partition("\n")[0].partition(". ")[0]


def _add_writer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the shard set; made where missing"
    )
    group.add_argument(
        "--encoding",
        choices=ENCODINGS,
        default="npy",
        help="image members; both lossless: npy is fastest to read, png small (default npy)",
    )
    group.add_argument(
        "--shard-size", type=int, metavar="N", help="samples per shard (default: what keeps a shard under about 32 MiB)"
    )
    group.add_argument(
        "--workers",
        type=int,
        default=_cores(),
        metavar="N",
        help="processes; the bytes do not depend on it (default: the cores, here %(default)s)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a complete set that lies in --out")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convert(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    manifest = convert(
        arguments.module.from_arguments(arguments),
        arguments.out,
        encoding=arguments.encoding,
        shard_size=arguments.shard_size,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress=True,
    )
    counts = ", ".join(f"{split} {entry['count']:,}" for split, entry in manifest["splits"].items())
    print(f"{arguments.out}: {manifest['name']} is complete ({counts} images) after {time.monotonic() - start:.1f} s")
    return 0


def main(words: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(words)
    try:
        return arguments.run(arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again, and it goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
