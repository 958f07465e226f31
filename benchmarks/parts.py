"""Runs the parts of a benchmark one after the other, each with a time limit, and writes their records as they come.

A part is a function that reports records (flat dictionaries). Each runs in a process of its own: one that fails, hangs
or loses the GPU does not end the others. What a part had reported until then is kept.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

Record = dict[str, Any]
Report = Callable[..., None]
"""Called with the fields of one record."""

ROOT = Path(__file__).parents[1]
SHORTEST = 1.0
"""Seconds below which a part is not started."""
MARK = "RECORD "
"""Begins a line of a part's standard output that holds a record."""


class Part(NamedTuple):
    """One measurement or check."""

    name: str
    seconds: float
    """After which it is ended; earlier where it would leave too little of the whole command's time (`time_for`)."""
    work: Callable[[Report, bool], None]
    """(report, tiny): reports what it finds. `tiny`: in a form that takes a second on a CPU."""


class Results:
    """Facts about the machine and the records of the parts, in FOLDER/NAME.json and .md after every change."""

    def __init__(self, folder: Path, name: str, title: str):
        self._paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md")]
        self._title = title
        self.facts = machine()
        self.parts: dict[str, list[Record]] = {}
        self.ends: dict[str, str] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, record: Record) -> None:
        with self._lock:
            self.parts.setdefault(part, []).append(record)
            self._write()

    def end(self, part: str, how: str) -> None:
        """`how`: "done in 3 s", or why the part ended before that."""
        with self._lock:
            self.parts.setdefault(part, [])
            self.ends[part] = how
            self._write()

    def _write(self) -> None:
        content = {"machine": self.facts, "ends": self.ends, "parts": self.parts}
        for path, text in zip(self._paths, (json.dumps(content, indent=1), self.markdown()), strict=True):
            unfinished = path.with_name(f".{path.name}")
            unfinished.write_text(f"{text}\n")
            unfinished.replace(path)

    def markdown(self) -> str:
        """All records as tables, one for each part and set of fields."""
        lines = [f"# {self._title}", ""] + [f"- {name}: {value}" for name, value in self.facts.items()]
        for part, records in self.parts.items():
            lines += ["", f"## {part}", "", self.ends.get(part, "running")]
            for fields in dict.fromkeys(map(tuple, records)):
                lines += ["", *table(fields, [record for record in records if tuple(record) == fields])]
        return "\n".join(lines)


def table(fields: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The lines of a Markdown table."""
    rows = [" | ".join(shown(record[name]) for name in fields) for record in records]
    return [f"| {' | '.join(fields)} |", "|" + "---|" * len(fields), *(f"| {row} |" for row in rows)]


def shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def machine() -> Record:
    """What the figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "CUDA": torch.version.cuda or "none",
        "cuDNN": torch.backends.cudnn.version() if cuda else "none",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "code": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m", *command_line()]),
    }


def command_line() -> list[str]:
    """The module that was started, and its arguments."""
    spec = sys.modules["__main__"].__spec__
    return [spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]]


def output_of(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().replace("\n", ", ")
    return "unknown"


# ------------------------------------------------------------------------------------------------------- running parts


def run_here(part: Part, results: Results, tiny: bool) -> None:
    """In this process: for the tests, where a new one for each part would take longer than the part."""
    start = time.monotonic()
    try:
        part.work(lambda **record: results.add(part.name, record), tiny)
        results.end(part.name, f"done in {time.monotonic() - start:.0f} s")
    except Exception as error:
        traceback.print_exc(limit=-4)
        results.end(part.name, f"failed: {reason(error)}")


def run_apart(part: Part, results: Results, command: Sequence[str], seconds: float) -> None:
    """In a process of its own, `command`, which ends after `seconds` at the latest."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        last: list[str] = []

        def receive() -> None:
            for line in process.stdout:
                if line.startswith(MARK):
                    results.add(part.name, json.loads(line.removeprefix(MARK)))
                else:
                    last[:] = [line.strip()]
                    print(line, end="", flush=True)

        reader = threading.Thread(target=receive, daemon=True)
        reader.start()
        try:
            process.wait(seconds)
            how = f"done in {time.monotonic() - start:.0f} s"
        except subprocess.TimeoutExpired:
            how = f"ended after its {seconds:.0f} s"
        finally:
            end_group(process)
        reader.join(10)
    if process.returncode > 0:
        how = f"failed with exit code {process.returncode}: {' '.join(last)}"
    elif process.returncode < 0 and not how.startswith("ended"):
        how = f"killed by signal {-process.returncode}"
    results.end(part.name, how)


def run_as_process(part: Part, tiny: bool) -> None:
    """The work of the process that `run_apart` starts. Its last line says what went wrong."""
    try:
        part.work(report_line, tiny)
    except Exception as error:
        traceback.print_exc(limit=-4)
        print(reason(error), flush=True)
        sys.exit(1)


def end_group(process: subprocess.Popen) -> None:
    """Ends the process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def reason(error: BaseException) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def report_line(**record: Any) -> None:
    """`Report` of a part in a process of its own."""
    print(f"{MARK}{json.dumps(record)}", flush=True)


# --------------------------------------------------------------------------------------------------- the command line


def parse(module: str, text: str, parts: Sequence[Part], out: str) -> argparse.Namespace:
    """The options that benchmarks/gpu.py and gpu_check.py share."""
    names = ", ".join(part.name for part in parts)
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", metavar="NAME", help=f"only these, of: {names}")
    parser.add_argument("--out", type=Path, default=ROOT / out, metavar="FOLDER", help=f"for the results ({out})")
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU where there is no GPU: a test")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of the process of one part
    parsed = parser.parse_args()
    unknown = sorted({*(parsed.parts or []), *filter(None, [parsed.part])} - {part.name for part in parts})
    if unknown:
        parser.error(f"there is no part {unknown[0]}; the parts: {names}")
    if not (parsed.tiny or torch.cuda.is_available()):
        parser.exit(2, f"error: {module} measures a GPU, and torch sees none here; --tiny runs its parts on the CPU\n")
    return parsed


def time_for(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of these parts, which share the time that is left in proportion to their limits.

    What a part does not use, all later ones share, up to their limits.
    """
    return parts[0].seconds * min(1.0, left / sum(part.seconds for part in parts))


def run_all(
    module: str, parsed: argparse.Namespace, parts: Sequence[Part], title: str, seconds: float
) -> Results | None:
    """The parts that were chosen, within `seconds`; None in the process of one part, after that part."""
    if parsed.part:
        run_as_process(next(part for part in parts if part.name == parsed.part), parsed.tiny)
        return None
    results = Results(parsed.out, module.rpartition(".")[2], title)
    end = time.monotonic() + seconds
    chosen = [part for part in parts if not parsed.parts or part.name in parsed.parts]
    for number, part in enumerate(chosen):
        given = time_for(chosen[number:], end - time.monotonic())
        if given < SHORTEST:
            results.end(part.name, f"not run: the {seconds:.0f} s of the command were over")
        elif parsed.tiny:
            run_here(part, results, tiny=True)
        else:
            run_apart(part, results, [sys.executable, "-m", module, "--part", part.name], given)
        print(f"{part.name}: {results.ends[part.name]}", flush=True)
    return results
