"""Shows the training runs below a folder as a table: state, step, time left, ELBO or bits/dim, speed.

    python -m pipeline.runs
    python -m pipeline.runs runs --sort best --state finished
    python -m pipeline.runs runs --name seed --watch
    python -m pipeline.runs runs --json

The column `of` says what `newest` and `best` are: the ELBO in nats of binary images, bits per dimension of others; of
the split that is validated (val, test), or of training where there was no validation. `age` is the time since the run
wrote something, `left` an estimate from its last records. States are those of `python -m pipeline.status`, and

    killed      the run states that it is running, and no process of this machine trains in its folder
    running?    it wrote nothing for long, and its process is not on this machine: it may have been killed
    unknown     no status.json, or an unreadable one

What is missing in a folder, or cannot be read, is named below the table; the rest is shown. Nothing is written.
"""

import argparse
import sys
from pathlib import Path

from pipeline.cli import CommandLine, run_tool
from pipeline.reporting.run_table import ORDERS, STATES, Wanted
from pipeline.reporting.show_runs import show_runs, watch_runs

SECONDS = 5.0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("python -m pipeline.runs", __doc__)
    add = parser.add_argument
    add("root", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="where the runs are (default: runs)")
    orders = f"the best, fastest or newest first, by one of {', '.join(ORDERS)} (default: age)"
    add("--sort", choices=ORDERS, default="age", metavar="COLUMN", help=orders)
    add("--reverse", action="store_true", help="reverse the order")
    add("--state", nargs="+", choices=STATES, default=[], metavar="STATE", help=f"only these: {', '.join(STATES)}")
    name = "only runs whose name contains TEXT; * stands for any letters, ? for one"
    add("--name", default="", metavar="TEXT", help=name)
    add("--model", default="", metavar="TEXT", help="only runs of models whose name contains TEXT")
    add("--data", default="", metavar="TEXT", help="only runs on shard sets whose folder or address contains TEXT")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print everything that is known as JSON, for programs")
    how.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=SECONDS,
        help=f"show the table again every so many seconds (default {SECONDS:g}), until Ctrl-C",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Prints the table, once or again and again."""
    wanted = Wanted(parsed.state, parsed.name, parsed.model, parsed.data, parsed.sort, parsed.reverse)
    if parsed.watch is None:
        show_runs(parsed.root, wanted, parsed.json)
    elif not 0.1 <= parsed.watch <= 86_400:
        raise ValueError(f"--watch {parsed.watch:g}: must be from 0.1 to 86400 seconds")
    else:
        watch_runs(parsed.root, wanted, parsed.watch)


if __name__ == "__main__":
    sys.exit(main())
