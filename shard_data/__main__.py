"""python -m shard_data: make, check and show shard sets."""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

from shard_data import info, verify
from shard_data.errors import Damaged, DataError, Incomplete
from shard_data.manifest import Manifest
from shard_data.shard import ENCODINGS
from shard_data.sources import SOURCES
from shard_data.terminal import has_reader, next_lines
from shard_data.writer import convert

STYLE = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
SCRIPT, CONSOLE = "python -m shard_data", "nvae-shards"
TRAIN, CONSOLE_TRAIN = "python pipeline/train.py", "nvae-train"
OVERVIEW = """\
Converts a data set to a shard set: WebDataset tars, an index for each, and manifest.json, which is written last.

  python -m shard_data toy_faces --out data/toy_faces32 --size 32       # synthetic faces; nothing to download
  python -m shard_data cifar10 --source ~/cifar --download --out data/cifar10
  python -m shard_data folder --source ~/photos --size 64 --out data/photos64
  python -m shard_data info data/cifar10 --sheet cifar10.png
  python -m shard_data verify data/cifar10 --decode
  python -m shard_data celeba --help                                    # the options of a source, with examples

To resume an interrupted conversion, run the same command again. Exit codes: 0 success, 1 the shard set is damaged,
2 an error in the command or its input (the message says how to fix it), 130 interrupted."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(_command(), description=_as_called(OVERVIEW), **STYLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in SOURCES.items():
        command = _add_command(commands, name, module)
        module.add_arguments(command)
        _add_writer_arguments(command)
        command.set_defaults(run=_convert, module=module)
    _add_verify(_add_command(commands, "verify", verify))
    _add_info(_add_command(commands, "info", info))
    return parser


def _add_command(commands, name: str, module: ModuleType) -> argparse.ArgumentParser:
    first_line = module.__doc__.partition("\n")[0].rstrip(".")
    return commands.add_parser(name, help=first_line, description=_as_called(module.__doc__), **STYLE)


def _command() -> str:
    """What the user types to run this module."""
    return CONSOLE if Path(sys.argv[0]).name == CONSOLE else SCRIPT


def _as_called(text: str) -> str:
    """The text with the commands in it as the user types them."""
    text = text.replace(SCRIPT, _command())
    return text.replace(TRAIN, CONSOLE_TRAIN) if _command() == CONSOLE else text


def _add_writer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shards")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the set; created if missing")
    encoding = "of the images; both are lossless: npy is fastest to read, png is smaller (default npy)"
    group.add_argument("--encoding", choices=ENCODINGS, default="npy", help=encoding)
    size = "samples per shard (default: as many as fit into about 32 MiB)"
    group.add_argument("--shard-size", type=int, metavar="N", help=size)
    seed = "none" if parser.get_default("shuffle") is None else parser.get_default("shuffle")
    shuffle = f"seed of a random order of each split, or none for the original order (default {seed})"
    group.add_argument("--shuffle", type=_seed, metavar="SEED", help=shuffle)
    partial = "skip files that are missing or unreadable, instead of stopping, and list them in the manifest"
    group.add_argument("--partial", action="store_true", help=partial)
    workers = "processes; the result does not depend on it (default: the number of cores, here %(default)s)"
    group.add_argument("--workers", type=int, default=_cores(), metavar="N", help=workers)
    group.add_argument("--overwrite", action="store_true", help="replace a complete set in --out")


def _seed(value: str) -> int | None:
    if value == "none":
        return None
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r}: give a whole number, or none for the original order")
    return int(value)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of the shard set")
    decode = "also read every sample with webdataset, and compare image, label and attributes with the index"
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
    omitted = manifest["omitted"]
    state = "is complete but for skipped files" if omitted else "is complete"
    _print(f"{arguments.out}: {manifest['name']} {state} ({counts} images) after {time.monotonic() - start:.1f} s")
    if omitted:
        _print(f"skipped {info.num_files(sum(entry['count'] for entry in omitted))}; manifest.json lists all:")
        _print("\n".join(info.describe_omitted(omitted)))
    for line in next_lines(_next_commands(arguments.out, manifest)):
        _print(_as_called(line))
    return 0


def _next_commands(folder: Path, manifest: Manifest) -> list[str]:
    """What one does with a new set. The recipe is one that takes its images, where there is one."""
    place, image = shlex.quote(str(folder)), manifest["image"]
    shape = image["height"], image["width"], image["channels"]
    recipe = ""
    if shape == (28, 28, 1):
        recipe = f"--model nvae_mnist_small --data {place}"
    elif shape[0] == shape[1] and shape[0] % 16 == 0 and shape[2] == 3:
        recipe = f"--model nvae --data {place} --run-dir runs/{shlex.quote(folder.name)} data.size={shape[0]}"
    sheet = shlex.quote(f"{folder.name}.png")
    commands = [f"{SCRIPT} info {place} --sheet {sheet}", f"{SCRIPT} verify {place} --decode"]
    return [*commands, f"{TRAIN} {recipe}"] if recipe else commands


def _verify(arguments: argparse.Namespace) -> int:
    faults = verify.verify(arguments.root, arguments.decode, progress=True)
    for fault in faults:
        _print(f"error: {arguments.root}/{fault}", sys.stderr)
    if faults:
        _print(f"error: {arguments.root}: damaged; make the set again with --overwrite", sys.stderr)
        return 1
    depth = "hashes, counts, index and every sample" if arguments.decode else "hashes, counts and index"
    _print(f"{arguments.root}: no errors found ({depth})")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    if arguments.sheet:
        info.contact_sheet(arguments.root, arguments.sheet)
    _print(info.describe(arguments.root))
    if arguments.sheet:
        _print(f"contact sheet: {arguments.sheet}")
    return 0


def _print(text: str, stream=None) -> None:
    """Print text that may hold names from files. Control characters are escaped, as a terminal would obey them."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    print("".join(shown), file=stream)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        has_reader()
        return code
    except BrokenPipeError:
        if has_reader("\n"):  # a pipe of another kind
            raise
        return 0
    except DataError as error:
        _print(f"error: {error}", sys.stderr)
        if isinstance(error, Incomplete):
            argv = sys.argv[1:] if argv is None else argv
            _print(f"  {_command()} {shlex.join([*argv, '--partial'])}", sys.stderr)
        return 1 if isinstance(error, Damaged) else 2
    except KeyboardInterrupt:
        _print("interrupted; run the same command again to resume", sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
