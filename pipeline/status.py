"""Prints a run's state as one word, for scripts: none, running, preempted, interrupted, finished or failed."""

import sys
from pathlib import Path

from pipeline.cli import CommandLine
from pipeline.storage.status import read_status


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for a folder that does not exist."""
    parser = CommandLine("python -m pipeline.status", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of pipeline/train.py")
    folder = parser.parse_args(arguments).run
    if not folder.is_dir():
        print(f"error: {folder}: no such folder; give the folder of a run", file=sys.stderr)
        return 2
    print(read_status(folder).state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
