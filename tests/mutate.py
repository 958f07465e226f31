"""Makes deliberate mistakes in the code, one at a time, and checks that the tests notice each of them.

    python -m tests.mutate                       what `make mutate` runs
    python -m tests.mutate --only learning_rate  those whose name contains this

The mistakes are listed in tests/mutations: a file, a text that occurs once in it, what replaces it, and the tests
that must fail then. The working tree is copied, and only the copies are changed. First the tests must pass without a
mistake. A mistake that its tests do not notice survives: then the exit code is 1, and a test is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from tests.helpers.launching import ROOT, clean_environment
from tests.mutations import MUTATIONS, Mutation

COPIED = ("pipeline", "shard_data", "slurm", "tests", "accelerate_configs", "pyproject.toml")
FAILED = 1
"""Exit code of pytest when a test failed; others mean that the tests could not be run."""


@dataclass(frozen=True)
class Outcome:
    """What the tests of one mutation did. `code`: exit code of pytest, None after a timeout."""

    mutation: Mutation
    code: int | None
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        """Whether the tests noticed. A hang is noticed too; a test that cannot be run is not."""
        return self.code in (FAILED, None)


def run_tests(tree: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """pytest's exit code for these tests in a copy of the working tree, and the end of its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=0", *tests]
    environment = clean_environment() | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        result = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no result after {timeout:.0f} s"
    return result.returncode, (result.stdout + result.stderr)[-3000:]


def copy_tree(target: Path) -> Path:
    """A copy of what the tests need of the working tree."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def try_mutation(tree: Path, mutation: Mutation, timeout: float) -> Outcome:
    """Runs the mutation's tests in `tree` with the mistake in it, then takes the mistake out again."""
    file, started = tree / mutation.file, time.monotonic()
    original = file.read_text()
    file.write_text(mutation.applied(original))
    try:
        code, output = run_tests(tree, mutation.tests, timeout)
    finally:
        file.write_text(original)
    return Outcome(mutation, code, time.monotonic() - started, output)


def try_all(mutations: Sequence[Mutation], folder: Path, jobs: int, timeout: float) -> list[Outcome]:
    """Every mutation, `jobs` at a time, each in a copy of its own."""
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(jobs):
        trees.put(copy_tree(folder / f"tree{number}"))

    def work(mutation: Mutation) -> Outcome:
        tree = trees.get()
        try:
            return try_mutation(tree, mutation, timeout)
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(work, mutations)
        return list(tqdm(outcomes, total=len(mutations), desc="mutations", disable=None))


def report(outcomes: Sequence[Outcome]) -> str:
    """One line for each mutation, then the output of the tests that did not notice theirs."""
    lines = [
        f"{'killed  ' if outcome.killed else 'SURVIVED'}  {outcome.seconds:5.0f} s  {outcome.mutation.name}"
        for outcome in outcomes
    ]
    survivors = [outcome for outcome in outcomes if not outcome.killed]
    for outcome in survivors:
        lines += ["", f"{outcome.mutation.name}: {' '.join(outcome.mutation.tests)}", outcome.output.strip()]
    lines += ["", f"{len(outcomes) - len(survivors)} of {len(outcomes)} killed"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose name contains TEXT")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for one mutation's tests (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    mutations = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    if not mutations:
        parser.error(f"--only {options.only}: no mutation has this in its name")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        code, output = run_tests(copy_tree(Path(folder) / "unchanged"), tests, timeout=1800)
        if code != 0:
            print(f"error: the tests do not pass without a mutation:\n{output}", file=sys.stderr)
            return 2
        outcomes = try_all(mutations, Path(folder), options.jobs, options.timeout)
    print(report(outcomes))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return 0 if all(outcome.killed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
