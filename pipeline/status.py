"""Prints a run's state as one word, for scripts: none, running, preempted, interrupted, finished or failed.

    python -m pipeline.status runs/nvae
    python -m pipeline.status runs/nvae --long

With --long, for a reader: how far the run is, the time left, its best figures, where it was started, its checkpoints,
its last warnings, and what is missing in its folder. `python -m pipeline.runs` compares several runs.
"""

import sys
from pathlib import Path

from pipeline.cli import CommandLine, as_called, run_tool
from pipeline.storage.status import read_status


def build_parser() -> CommandLine:
    """The command line."""
    parser = CommandLine("python -m pipeline.status", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of pipeline/train.py")
    parser.add_argument("--long", action="store_true", help="some twenty lines for a reader, instead of one word")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for a folder that does not exist, and with --long for one that is no run's."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: show(parsed.run, parsed.long))


def show(folder: Path, is_long: bool) -> None:
    """Prints the word, or the lines."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run")
    if is_long:
        from pipeline.reporting.long_status import long_status  # a script that waits for a word should not wait for it

        print(as_called("\n".join(long_status(folder))))
    else:
        print(read_status(folder).state)


if __name__ == "__main__":
    sys.exit(main())
