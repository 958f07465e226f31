"""evaluate.py that is killed at random points: the same command continues, to figures equal to the bit."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT, launch_command, run_command, started, wait_until
from tests.helpers.model_cases import MLP
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

WORDS = ["--importance-samples", "40", "--batch-size", "4", "--threads", "1"]

KILLED_AGAIN_AND_AGAIN = """
import os, signal, sys, time
from pathlib import Path
from pipeline.evaluate import main

journal, *sizes = sys.argv[1].split(",")
journal, words = Path(journal), sys.argv[2:]

def size():
    return journal.stat().st_size if journal.exists() else 0

for wanted in map(int, sizes):
    child = os.fork()
    if not child:
        os._exit(main(words))
    while size() < wanted and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)  # fails where it has ended before
    os.waitpid(child, 0)
    print(journal.read_bytes().count(b"\\\\n") - 1, flush=True)
sys.exit(main(words))
"""
"""Starts evaluations in forks, kills each as soon as its journal has a size, and then lets one finish."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Of 150 images: 38 batches on one process."""
    folder = tmp_path_factory.mktemp("run")
    shards = write_set(folder / "set", {"test": random_samples(150, 16, 16, seed=2)}, [60])
    settings = tiny_settings(shards) | {"model": dict(MLP), "regularizers": {"strength": 0.0}}
    return make_run(folder / "run", settings)


def figures(path: Path) -> dict:
    return json.loads(path.read_text())["figures"]


def test_killed_evaluations_continue_to_the_same_bits(run, tmp_path):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    journal = tmp_path / "killed.json.rank0.unfinished"
    script = tmp_path / "script.py"
    script.write_text(KILLED_AGAIN_AND_AGAIN.replace("\\\\n", "\\n"))
    rng = random.Random(5)
    sizes = sorted(rng.randint(1, 11_000) for _ in range(5))
    for out, kills in ((whole, []), (killed, sizes)):
        words = [str(run), *WORDS, "--out", str(out)]
        command = [sys.executable, str(script), ",".join(map(str, [journal, *kills])), *words]
        ended = run_command(*command, PYTHONPATH=str(ROOT))
        assert ended.returncode == 0, ended.stderr
    counts = [int(line) for line in ended.stdout.splitlines() if line.isdecimal()]
    assert len(counts) == 5
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 38
    assert f"resumes; {counts[-1]} batches of this process were measured before" in ended.stderr
    assert figures(killed) == figures(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json", "killed.json", "script.py"}


def test_a_journal_of_other_settings_is_refused_and_kept(run, tmp_path, make_runtime, capfd, monkeypatch):
    from pipeline.evaluate import main
    from pipeline.inference import evaluate_run

    words = [str(run), *WORDS, "--out", str(tmp_path / "out.json")]

    def stop(*arguments):
        raise ValueError("stopped")

    monkeypatch.setattr(evaluate_run, "save", stop)
    make_runtime()
    assert main(words) == 2
    (journal,) = tmp_path.glob("*.unfinished")
    monkeypatch.undo()
    make_runtime()
    assert main([*words, "--seed", "7", "--images", "9"]) == 2
    error = capfd.readouterr().err
    assert "under other conditions (images 150, now 9; seed 1, now 7); repeat those to resume it, or remove" in error
    shutil.copy(journal, tmp_path / "copy")
    make_runtime()
    assert main(words) == 0
    assert "resumes; 38 batches of this process" in capfd.readouterr().err
    assert not journal.exists()
    records = (tmp_path / "copy").read_bytes().splitlines(keepends=True)
    from pipeline.storage.evaluation_journal import encoded

    journal.write_bytes(records[0] + encoded([0, [[1.0]], [2.0], []]))
    make_runtime()
    assert main(words) == 2
    assert "not the bounds of a batch" in capfd.readouterr().err


@pytest.mark.slow
def test_two_killed_processes_continue_to_the_same_bits(run, tmp_path):
    """Both are killed when the second one has measured a third of its images, however far the first one is."""
    script = str(ROOT / "pipeline" / "evaluate.py")

    def command(out: Path) -> list[str]:
        return launch_command(2, script, str(run), *WORDS, "--out", str(out))

    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    assert run_command(*command(whole)).returncode == 0
    second = tmp_path / "killed.json.rank1.unfinished"
    slow = {"cwd": ROOT, "stdout": -3, "stderr": -3}
    with started(command(killed), **slow) as launcher:
        wait_until(lambda: second.exists() and second.read_bytes().count(b"\n") > 8, interval=0.002)
        import psutil

        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()
    assert not killed.exists()
    ended = run_command(*command(killed))
    assert ended.returncode == 0, ended.stderr
    assert "resumes; " in ended.stderr
    assert figures(killed) == figures(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "whole.json"]
