"""Stops processes of training runs (SIGSTOP) at random moments for a random time, and checks how the runs end.

    python -m tests.suspend --stops 20       about a minute for each on two cores

Each run trains on two processes with timeouts of 10 s. One of its processes (launcher, a rank, a loader worker) is
stopped for up to 20 s and then continued, or stopped for good. The run must either finish and equal an uninterrupted
run to the byte, or end with a line that names a rank or a loader worker; then the same command again must finish and
equal it. (The launcher waits for a rank that was stopped for good after it had finished: that is said, and is no
failure.)
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos import COMMON, MODELS, make_data, victims
from tests.helpers.launching import ROOT, clean_environment, is_alive, launch_command
from tests.helpers.run_folders import differences

TIMEOUT = 10.0
TARGETS = ("launcher", "rank", "worker")
NAMED = re.compile(r"^.*\b(?:rank \d+ on|data loader worker \d+ \(process) .*$", re.MULTILINE)
GRACE = 90.0
"""Seconds beyond the timeout within which a run must end: joining takes 30 s more, and torch's launcher then waits 30 s
for a stopped process."""


def start(data: Path, run_dir: Path) -> subprocess.Popen:
    changes = ["train.steps=300", f"train.collective_timeout={TIMEOUT:g}", f"train.progress_timeout={TIMEOUT:g}"]
    settings = [*MODELS["mlp_vae"], *COMMON, *changes, "--data", str(data), "--run-dir", str(run_dir)]
    command = launch_command(2, "pipeline/train.py", *settings)
    with open(f"{run_dir}.log", "ab") as log:
        options = {"env": clean_environment(), "stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, cwd=ROOT, **options)


def train(data: Path, run_dir: Path) -> float:
    """Trains to the end; the seconds that it took."""
    begin = time.monotonic()
    if start(data, run_dir).wait() != 0:
        raise RuntimeError(f"training failed; see {run_dir}.log")
    return time.monotonic() - begin


def stop_one(launcher: subprocess.Popen, target: str, after: float, chance: random.Random) -> psutil.Process | None:
    """Stops a process of that kind after `after` seconds, or as soon as there are one and both ranks: a launcher that
    is stopped before it has started the ranks can be named by nobody. None if the run ended before.
    """
    moment = time.monotonic() + after
    while launcher.poll() is None:
        root = psutil.Process(launcher.pid)
        found = victims(root, target) if time.monotonic() >= moment else []
        if found and len(victims(root, "rank")) == 2:
            victim = chance.choice(found)
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGSTOP)
                return victim
        time.sleep(0.01)
    return None


def signal_if_alive(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def end(launcher: subprocess.Popen, victim: psutil.Process, seconds: float | None) -> bool:
    """Continues the victim after `seconds` (None: never). Whether all others ended by themselves; kills the rest."""
    root = psutil.Process(launcher.pid)
    family = [root, *root.children(recursive=True)]
    if seconds is not None:
        time.sleep(seconds)
        signal_if_alive(victim, signal.SIGCONT)
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(TIMEOUT + GRACE)
    by_itself = not [process for process in family if process != victim and is_alive(process.pid)]
    for process in family:
        signal_if_alive(process, signal.SIGKILL)
    launcher.wait()
    return by_itself


def outcome(data: Path, run_dir: Path, reference: Path) -> tuple[bool, str]:
    """Whether the run ended as promised, and how."""
    log = Path(f"{run_dir}.log").read_text()
    finished = "is finished: step" in log
    named = NAMED.findall(log)
    if not finished and not named:
        return False, "ended without a line that names a rank or a worker"
    train(data, run_dir)
    different = differences(reference, run_dir)
    how = "finished" if finished else f"ended ({named[0].strip()[:110]})"
    return not different, f"{how}; {'; '.join(different) or 'equal'}" + (" after a restart" if not finished else "")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a run did not end as promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.suspend", description=__doc__.partition("\n")[0])
    parser.add_argument("--stops", type=int, default=20, help="runs in which a process is stopped (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of targets and moments (default: 1)")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    parsed = parser.parse_args(arguments)
    chance, failed = random.Random(parsed.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data, reference = make_data(folder), folder / "uninterrupted"
        longest = train(data, reference)
        for number in range(parsed.stops):
            target, after = TARGETS[number % len(TARGETS)], chance.uniform(0, longest)
            seconds = chance.choice((None, chance.uniform(0, 2 * TIMEOUT)))
            run_dir = folder / f"stopped-{number}"
            launcher = start(data, run_dir)
            victim = stop_one(launcher, target, after, chance)
            by_itself = victim is None or end(launcher, victim, seconds)
            as_promised, how = outcome(data, run_dir, reference)
            failed += not (as_promised and (by_itself or how.startswith("finished")))
            stopped = "never" if victim is None else "for good" if seconds is None else f"for {seconds:.1f} s"
            print(f"{target} stopped {stopped}: {how}{'' if by_itself else '; had to be killed'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
