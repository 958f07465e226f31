"""`make gpu` and `make gpu-check` in their tiny form on the CPU: every part runs, and every check can fail."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_check, parts, steps
from benchmarks.parts import Part, Results
from pipeline.distributed.device_settings import DEFAULT_SETTINGS
from pipeline.training.regularizers import Regularizers
from pipeline.training.state import TrainingState
from tests.helpers.golden import golden_folder

LONG = {"two-processes"}
"""Of gpu.py: they start processes as the checks of the same name do."""


@pytest.fixture(autouse=True)
def _restore():
    yield
    DEFAULT_SETTINGS.apply()
    steps.AcceleratorState._reset_state(reset_partial_state=True)


def run(part: Part, folder: Path) -> list[dict]:
    results = Results(folder, "results", "A title")
    parts.run_here(part, results, tiny=True)
    assert results.ends[part.name].startswith("done in"), results.ends
    assert f"## {part.name}" in (folder / "results.md").read_text()
    return json.loads((folder / "results.json").read_text())["parts"][part.name]


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part.name not in LONG], ids=lambda part: part.name)
def test_every_measurement_runs(part, tmp_path):
    records = run(part, tmp_path)
    numbers = [value for record in records for value in record.values() if type(value) in (int, float)]
    assert numbers
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    speeds = [record["images/s"] for record in records if record.get("images/s") is not None]
    assert all(speed > 0 for speed in speeds)
    assert speeds or part.name not in {"profile-cifar10", "steps-eager"}
    costs = [record["CPU ms"] for record in records if "operator" in record]
    assert len(costs) == (20 if part.name.startswith("profile") else 0)
    assert costs == sorted(costs, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_check.PARTS, ids=lambda part: part.name)
def test_every_check_passes_on_the_cpu(part, tmp_path):
    records = run(part, tmp_path)
    skipped = part.name == "golden" and golden_folder() is None
    assert [record["passed"] for record in records] == [None if skipped else True] * len(records) != []


def checks(name: str, folder: Path) -> list[bool]:
    part = next(part for part in gpu_check.PARTS if part.name == name)
    return [record["passed"] for record in run(part, folder)]


@pytest.mark.parametrize(("name", "error"), [("float64", 1e-7), ("float32", 1e-2)])
def test_an_error_of_one_gradient_is_noticed(name, error, tmp_path, monkeypatch):
    calls, compute = [], gpu_check.loss_and_gradients

    def wrong_at_the_second_call(*arguments):
        found = compute(*arguments)
        calls.append(found)
        if len(calls) == 2:
            largest = max(found, key=lambda key: found[key].norm() if key != "loss" else 0)
            found[largest] = found[largest] * (1 + error)
        return found

    monkeypatch.setattr(gpu_check, "loss_and_gradients", wrong_at_the_second_call)
    assert checks(name, tmp_path) == [False]


def test_a_state_that_is_not_restored_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Regularizers, "load_state", lambda *_: None)
    assert False in checks("resume", tmp_path)


def test_a_skipped_step_that_leaves_a_trace_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingState, "undo_forward", lambda _: None)
    assert checks("skip", tmp_path) == [True, False, True]


@pytest.mark.slow
def test_other_losses_on_two_processes_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu_check, "train_on_ranks", lambda *_: {"processes": 2, "device": "CPU", "losses": [4800.0] * 3}
    )
    assert checks("two-processes", tmp_path) == [False]


def test_a_check_without_a_number_does_not_pass(tmp_path):
    results = Results(tmp_path, "gpu_check", "A title")
    part = Part("nan", 1.0, lambda report, tiny: gpu_check.check(report, "a loss", math.nan, 1.0))
    parts.run_here(part, results, tiny=True)
    results.end("lost", "ended after its 3 s")
    assert gpu_check.failures(results) == ["lost: ended after its 3 s", "nan: a loss: nan, at most 1 "]


# --------------------------------------------------------------------------------------------- processes of the parts


def apart(folder: Path, code: str, seconds: float = 20.0) -> tuple[list[dict], str]:
    """The records and the end of a part whose process runs `code`."""
    results = Results(folder, "gpu", "A title")
    code = f"import os, sys, time\nfrom benchmarks.parts import report_line\n{code}"
    parts.run_apart(Part("a part", seconds, lambda *_: None), results, [sys.executable, "-c", code], seconds)
    written = json.loads((folder / "gpu.json").read_text())
    return written["parts"]["a part"], written["ends"]["a part"]


def test_what_a_part_found_before_its_time_was_over_is_kept(tmp_path):
    records, end = apart(tmp_path, "report_line(speed=1.5, note='a|b')\ntime.sleep(100)", seconds=6.0)
    assert records == [{"speed": 1.5, "note": "a|b"}]
    assert end == "ended after its 6 s"
    assert r"| 1.5 | a\|b |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('no GPU left'); sys.exit(3)", "failed with exit code 3: no GPU left"),
        ("os.kill(os.getpid(), 11)", "killed by signal 11"),
    ],
)
def test_the_end_of_a_part_says_what_went_wrong(tmp_path, code, expected):
    records, end = apart(tmp_path, f"report_line(speed=2)\n{code}")
    assert records == [{"speed": 2}]
    assert end == expected


def test_the_process_of_a_part_prints_its_records(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--part", "depthwise"])
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(json.loads(line.removeprefix(parts.MARK))["GB/s"] > 0 for line in lines)


@pytest.mark.parametrize("module", [gpu, gpu_check])
def test_without_a_gpu_there_is_one_line(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("module", [gpu, gpu_check])
def test_every_part_gets_its_share_of_the_time(module):
    """Whatever the earlier ones take: all of what they get, or half of it."""
    whole = sum(part.seconds for part in module.PARTS)
    for used in (1.0, 0.5):
        left = module.SECONDS
        for number, part in enumerate(module.PARTS):
            given = parts.time_for(module.PARTS[number:], left)
            assert part.seconds >= given >= 0.999 * min(1, module.SECONDS / whole) * part.seconds
            left -= used * given
        assert left >= -1e-9
    assert given == module.PARTS[-1].seconds  # half used: the last one has its whole time


def test_a_part_for_which_there_is_no_time_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "run_apart", lambda part, results, *_: results.end(part.name, "done in 0 s"))
    clock = iter([0.0, 0.0, 99.5])  # at the start, and before each part
    monkeypatch.setattr(parts.time, "monotonic", lambda: next(clock))
    parsed = SimpleNamespace(part=None, parts=None, tiny=False, out=tmp_path)
    both = [Part(name, 60.0, lambda *_: None) for name in ("first", "second")]
    results = parts.run_all("benchmarks.gpu_check", parsed, both, "A title", 100.0)
    assert results.ends == {"first": "done in 0 s", "second": "not run: the 100 s of the command were over"}


def test_the_parts_fit_the_time_of_the_command():
    """Checks seldom take their whole time."""
    assert sum(part.seconds for part in gpu.PARTS) <= gpu.SECONDS
    assert sum(part.seconds for part in gpu_check.PARTS) <= 1.5 * gpu_check.SECONDS


# --------------------------------------------------------------------------------------------------- images in memory


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_micro_batch(world_size, make_runtime):
    recipe = steps.small_recipe("train.micro_batch=4")
    seen = []
    for rank in range(world_size):
        runtime = make_runtime()
        runtime.rank, runtime.world_size = rank, world_size
        data = steps.MemoryData(recipe, runtime, epoch_size=100)
        stream = data.batches(3)
        seen.append([next(stream) for _ in range(3)])
    for number in range(3):
        shares = [batches[number] for batches in seen]
        assert torch.cat([share.positions for share in shares]).tolist() == list(
            range(24 + 4 * number, 28 + 4 * number)
        )
        assert {tuple(share.images.shape) for share in shares} == {(4 // world_size, 3, 16, 16)}
