"""Kills training runs at random moments, restarts them and compares them with uninterrupted runs.

    python -m tests.chaos --kills 100        what `make chaos` runs: about half an hour on two cores
    python -m tests.chaos --kills 4 --cases "nvae, 2 processes"

Each case is trained once without interruption. Then it is killed (SIGKILL to the launcher, a rank, a loader worker, or
the main rank while it writes a checkpoint) and started again by the same command, until its share of kills is used up
and it has finished. The final weights, optimizer, moving average, batch-norm buffers, regularizer state and the trace
of samples must then equal those of the uninterrupted run to the byte. metrics.jsonl must hold the same figures, each
step once.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.launching import ROOT, clean_environment, launch_command, ranks_of
from tests.helpers.run_folders import differences

TARGETS = ("launcher", "rank", "worker", "writer")
COMMON = (
    "train.batch_size=12", "train.ema_decay=0.9", "train.cpu_threads=1", "data.size=32", "data.channels=3",
    "data.flip=true", "data.workers=1", "data.trace=true", "validation.every=40", "validation.images=24",
    "samples.every=0", "checkpoint.every=5", "checkpoint.keep=2", "tracking.wandb=disabled", "tracking.log_every=5",
)  # fmt: skip
CONV = ("model.width=8", "model.latent_size=16", "model.batch_norm=true", "train.steps=300")
NVAE = (
    "model.groups_per_scale=[1,2]", "model.encoder_channels=8", "model.decoder_channels=8", "model.latent_channels=4",
    "model.num_flows=1", "train.steps=100", "train.seed=3",
)  # fmt: skip
MODELS = {
    "mlp_vae": ("--model", "mlp_vae", "model.hidden=64", "train.epochs=null", "train.steps=600"),
    "conv_vae": ("--model", "conv_vae", "train.epochs=null", *CONV),
    "nvae": ("--model", "nvae", *NVAE),
}
CASES = {f"{model}, {count} process{'es' * (count > 1)}": (model, count) for model in MODELS for count in (1, 2)}


@dataclass
class Outcome:
    """The result of one case."""

    case: str
    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    differences: list[str] = field(default_factory=list)
    uninterrupted_seconds: float = 0.0


@dataclass
class Case:
    """One command and the folders that it trains in."""

    name: str
    folder: Path
    data: Path

    def start(self, run_dir: Path) -> subprocess.Popen:
        """The command as a user types it; what it prints is appended to a file beside the run folder."""
        model, processes = CASES[self.name]
        arguments = [*MODELS[model], *COMMON, "--data", str(self.data), "--run-dir", str(run_dir)]
        command = launch_command(processes, "pipeline/train.py", *arguments)
        with open(f"{run_dir}.log", "ab") as log:
            options = {"env": clean_environment(), "stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(command, cwd=ROOT, **options)


# ------------------------------------------------------------------------------------------------------------- killing


def victims(launcher: psutil.Process, target: str) -> list[psutil.Process]:
    """The running processes of that kind."""
    with suppress(psutil.NoSuchProcess):
        ranks = ranks_of(launcher)
        if target == "launcher":
            return [launcher]
        if target == "worker":
            return [worker for rank in ranks for worker in rank.children() if "train.py" in " ".join(worker.cmdline())]
        return ranks[:1] if target == "writer" else ranks
    return []


def writing(run_dir: Path) -> bool:
    """Whether a checkpoint is being written now."""
    return any((run_dir / "checkpoints").glob(".step_*"))


def kill(process: subprocess.Popen, run_dir: Path, target: str, after: float, chance: random.Random) -> bool:
    """Sends SIGKILL to a process of that kind after `after` seconds; False if the run ended before."""
    moment = time.monotonic() + after
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        if time.monotonic() >= moment and (target != "writer" or writing(run_dir)):
            found = victims(launcher, target)
            if found:
                with suppress(psutil.NoSuchProcess):
                    chance.choice(found).send_signal(signal.SIGKILL)
                    return True
        time.sleep(0.0005 if target == "writer" else 0.01)
    return False


def end(process: subprocess.Popen, seconds: float) -> None:
    """Waits until the launcher has ended after the kill."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    process.kill()
    raise RuntimeError(f"the launcher did not end within {seconds:g} s after a process of its run was killed")


def interrupt(case: Case, run_dir: Path, kills: int, longest: float, chance: random.Random, outcome: Outcome) -> None:
    """Starts the run again and again until it has finished, killing it the first `kills` times."""
    while True:
        process = case.start(run_dir)
        outcome.starts += 1
        if outcome.kills.total() < kills:
            target = chance.choice(TARGETS)
            if kill(process, run_dir, target, chance.uniform(0, longest), chance):
                outcome.kills[target] += 1
                end(process, 60)
                continue
        if process.wait() != 0:
            raise RuntimeError(f"{case.name}: ended with exit code {process.returncode}; see {run_dir}.log")
        if outcome.kills.total() >= kills:
            return
        reset_to_start(run_dir)  # it finished before its last kill


def reset_to_start(run_dir: Path) -> None:
    """Renames the finished run's folder; its log stays."""
    run_dir.rename(run_dir.with_name(f"{run_dir.name}-finished-{time.time_ns()}"))


# ------------------------------------------------------------------------------------------------------------- running


def run_case(case: Case, kills: int, chance: random.Random, note: Callable[[str], None]) -> Outcome:
    """Trains the uninterrupted run and the killed one, and compares them."""
    outcome = Outcome(case.name)
    uninterrupted, killed = case.folder / "uninterrupted", case.folder / "killed"
    start = time.monotonic()
    if case.start(uninterrupted).wait() != 0:
        raise RuntimeError(f"{case.name}: the uninterrupted run failed; see {uninterrupted}.log")
    outcome.uninterrupted_seconds = time.monotonic() - start
    note(f"{case.name}: uninterrupted run {outcome.uninterrupted_seconds:.0f} s")
    interrupt(case, killed, kills, outcome.uninterrupted_seconds, chance, outcome)
    for finished in [killed, *sorted(case.folder.glob("killed-finished-*/"))]:
        outcome.differences += differences(uninterrupted, finished)
    note(f"{case.name}: {dict(outcome.kills)}, {outcome.starts} starts; " + ("; ".join(outcome.differences) or "equal"))
    return outcome


def make_data(folder: Path) -> Path:
    """A small set of synthetic faces."""
    sizes = "--size 32 --train 500 --val 50 --test 50".split()
    command = [sys.executable, "-m", "shard_data", "toy_faces", *sizes, "--out", str(folder / "faces")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "faces"


def table(outcomes: list[Outcome]) -> str:
    """The result as Markdown."""
    lines = ["| case | kills | " + " | ".join(TARGETS) + " | starts | compared with the uninterrupted run |"]
    lines.append("|" + "---|" * (len(TARGETS) + 4))
    for one in outcomes:
        cells = [one.case, one.kills.total(), *(one.kills[target] for target in TARGETS), one.starts]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {'; '.join(one.differences) or 'equal'} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where any case differs from its uninterrupted run."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="over all cases (default: 100)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help="which")
    parser.add_argument("--seed", type=int, default=1, help="of targets and moments (default: 1)")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    parsed = parser.parse_args(arguments)
    chance = random.Random(parsed.seed)
    shares = [
        parsed.kills // len(parsed.cases) + (i < parsed.kills % len(parsed.cases)) for i in range(len(parsed.cases))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = make_data(folder)
        outcomes = []
        for name, kills in zip(parsed.cases, shares, strict=True):
            place = folder / name.replace(", ", "_").replace(" ", "_")
            place.mkdir(exist_ok=True)
            outcomes.append(run_case(Case(name, place, data), kills, chance, print))
    print(table(outcomes))
    return int(any(one.differences for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
