"""Writes a page on one run, or several compared: curves, latent groups, pictures, evaluations, settings, data.

    python pipeline/report.py runs/nvae
    python pipeline/report.py runs/nvae runs/nvae-2 --out compared.html
    python pipeline/report.py runs/nvae --serve

RUN is a folder of pipeline/train.py, also one that is being trained. The page is one HTML file: it needs no network and
no server, and can be sent by e-mail. Curves are thinned to what a screen shows, without losing extremes, and pictures
evenly over the steps; the page says how far. What a folder lacks is named on the page, and the rest is shown.

With --serve nothing is written: the page is at http://127.0.0.1:8000/ and refreshes what changed while it is open. On a
remote machine, leave it on the loopback interface and forward the port: ssh -L 8000:127.0.0.1:8000 MACHINE.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import CommandLine, run_tool  # noqa: E402
from pipeline.reporting.serve import serve  # noqa: E402
from pipeline.reporting.write_report import write_report  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("report.py", __doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="run folder of pipeline/train.py; several are compared")
    how = parser.add_mutually_exclusive_group()
    page = "the page (default: RUN/report.html; of several runs, report.html)"
    how.add_argument("--out", metavar="FILE.html", type=Path, help=page)
    served = "serve the page until Ctrl-C, and refresh it while the runs are trained"
    how.add_argument("--serve", action="store_true", help=served)
    add("--contact-sheet", action="store_true", help="show the first pictures of the data set also if they show people")
    add("--port", type=int, default=8000, help="with --serve (default 8000; 0: any that is free)")
    add("--host", default="127.0.0.1", help="with --serve: the interface (default 127.0.0.1, this machine alone)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    if parsed.serve:
        return run_tool(lambda: serve(parsed.runs, parsed.host, parsed.port, parsed.contact_sheet))
    out = parsed.out or (parsed.runs[0] if len(parsed.runs) == 1 else Path()) / "report.html"
    return run_tool(lambda: write_report(parsed.runs, out, parsed.contact_sheet))


if __name__ == "__main__":
    sys.exit(main())
