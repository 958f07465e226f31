"""Kills training runs at random moments, starts them again by the same command, and compares them with straight runs.

    python -m tests.chaos --kills 100        what `make chaos` runs: about half an hour on two cores
    python -m tests.chaos --kills 4 --cases "nvae, 2 processes"

Each case is trained once without interruption. Then it is killed (SIGKILL to the launcher, a rank, a loader worker, or
the main rank in the midst of writing a checkpoint) and started again, at once and with no other step, until its share
of kills is used up and it has finished. The final weights, optimizer, moving average, batch-norm buffers, regularizer
state and the trace of samples must then equal the straight run's to the byte, and metrics.jsonl its figures, each step
once.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
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
    """What became of one case."""

    case: str
    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    differences: list[str] = field(default_factory=list)
    straight_seconds: float = 0.0


@dataclass
class Case:
    """One command and the folders that it trains in."""

    name: str
    folder: Path
    data: Path
    port: int

    def start(self, run_dir: Path) -> subprocess.Popen:
        """The command as a user types it; what it prints is appended to a file beside the run folder."""
        model, processes = CASES[self.name]
        config = "cpu.yaml" if processes == 1 else "cpu_2proc.yaml"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
        words = [*MODELS[model], *COMMON, "--data", str(self.data), "--run-dir", str(run_dir)]
        command = [*launch, "--main_process_port", str(self.port), "pipeline/train.py", *words]
        with open(f"{run_dir}.log", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


# ------------------------------------------------------------------------------------------------------------- killing


def victims(launcher: psutil.Process, target: str) -> list[psutil.Process]:
    """The processes of that kind that live now."""
    with suppress(psutil.NoSuchProcess):
        ranks = [child for child in launcher.children() if "pipeline/train.py" in " ".join(child.cmdline())]
        if target == "launcher":
            return [launcher]
        if target == "worker":
            return [worker for rank in ranks for worker in rank.children() if "train.py" in " ".join(worker.cmdline())]
        return ranks[:1] if target == "writer" else ranks
    return []


def writing(run_dir: Path) -> bool:
    """Whether a checkpoint is being written just now."""
    return any((run_dir / "checkpoints").glob(".step_*"))


def kill(process: subprocess.Popen, run_dir: Path, target: str, after: float, chance: random.Random) -> bool:
    """Sends SIGKILL to a process of that kind once the run has gone on for `after` seconds; False where it ended."""
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
    """Waits until the launcher has ended by itself after the kill."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    process.kill()
    raise RuntimeError(f"the launcher did not end within {seconds:g} s after a process of its run was killed")


def torment(case: Case, run_dir: Path, kills: int, longest: float, chance: random.Random, outcome: Outcome) -> None:
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
        reset_to_start(run_dir)  # it finished before it could be killed often enough: once more from the beginning


def reset_to_start(run_dir: Path) -> None:
    """Takes the finished run away; its log stays."""
    run_dir.rename(run_dir.with_name(f"{run_dir.name}-finished-{time.time_ns()}"))


# ----------------------------------------------------------------------------------------------------------- comparing


def hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of each file of the last checkpoint's tensors, and of the trace."""
    last = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    files = [*sorted(last.glob("*.safetensors")), run_dir / "data_trace.jsonl"]
    return {f"{file.parent.name}/{file.name}"[-60:]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def figures(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl, without what tells time and attempt."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in record.items() if k not in ("time", "attempt") and "perf/" not in k} for record in records
    ]


def differences(straight: Path, tormented: Path) -> Iterator[str]:
    """What is not equal, one line each."""
    expected, found = hashes(straight), hashes(tormented)
    for name, digest in expected.items():
        name_there = name.replace(straight.name, tormented.name)
        if found.get(name_there) != digest:
            yield f"{name} differs"
    if figures(straight) != figures(tormented):
        yield "metrics.jsonl differs"
    steps = [record["step"] for record in figures(tormented)]
    if steps != sorted(set(steps)):
        yield "metrics.jsonl repeats a step"


# ------------------------------------------------------------------------------------------------------------- running


def run_case(case: Case, kills: int, chance: random.Random, note: Callable[[str], None]) -> Outcome:
    """The straight run, the tormented one, and their comparison."""
    outcome = Outcome(case.name)
    straight, tormented = case.folder / "straight", case.folder / "tormented"
    start = time.monotonic()
    if case.start(straight).wait() != 0:
        raise RuntimeError(f"{case.name}: the straight run failed; see {straight}.log")
    outcome.straight_seconds = time.monotonic() - start
    note(f"{case.name}: straight run {outcome.straight_seconds:.0f} s")
    torment(case, tormented, kills, outcome.straight_seconds, chance, outcome)
    for finished in [tormented, *sorted(case.folder.glob("tormented-finished-*/"))]:
        outcome.differences += differences(straight, finished)
    note(f"{case.name}: {dict(outcome.kills)}, {outcome.starts} starts; " + ("; ".join(outcome.differences) or "equal"))
    return outcome


def make_data(folder: Path) -> Path:
    """A small set of drawn faces."""
    words = [
        "toy_faces",
        "--size",
        "32",
        "--train",
        "500",
        "--val",
        "50",
        "--test",
        "50",
        "--out",
        str(folder / "faces"),
    ]
    subprocess.run([sys.executable, "-m", "shard_data", *words], cwd=ROOT, check=True, capture_output=True)
    return folder / "faces"


def table(outcomes: list[Outcome]) -> str:
    """The result as Markdown."""
    lines = ["| case | kills | " + " | ".join(TARGETS) + " | starts | compared with the straight run |"]
    lines.append("|" + "---|" * (len(TARGETS) + 4))
    for one in outcomes:
        cells = [one.case, one.kills.total(), *(one.kills[target] for target in TARGETS), one.starts]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {'; '.join(one.differences) or 'equal'} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where any case differs from its straight run."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="over all cases (default: 100)")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help="which")
    parser.add_argument("--seed", type=int, default=1, help="of targets and moments (default: 1)")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--port", type=int, default=29531, help="of the launcher (default: 29531)")
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
            outcomes.append(run_case(Case(name, place, data, parsed.port), kills, chance, print))
    print(table(outcomes))
    return int(any(one.differences for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
