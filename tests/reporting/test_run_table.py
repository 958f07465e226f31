"""`python -m pipeline.runs` and `python -m pipeline.status --long`, on folders as runs leave them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import runs, status
from pipeline.reporting.history import History
from pipeline.reporting.run_table import RunList, Wanted, find_runs, select
from pipeline.reporting.text_table import table_lines
from pipeline.storage.attempts import AttemptFacts, add_attempt
from pipeline.storage.run_lock import RunLock
from tests.helpers.launching import ROOT, clean_environment

GONE = "no GPU\x1b[2J"
OLD_RUNS = ROOT / "tests/old_runs"


def write_run(
    folder: Path, state: str, bpd=(9.0, 4.0, 5.0), model="nvae", likelihood="logistic_mixture", **status
) -> Path:
    """A run that logs every 10 steps and 5 s, the last time 2 s ago, up to step 30 of 90."""
    folder.mkdir(parents=True)
    now = time.time()
    records = [
        {
            "step": 10 * i,
            "time": now - 2 - 5 * (len(bpd) - i),
            "attempt": 1,
            "train/bpd": value,
            "train/elbo": -100 * value,
        }
        | {"perf/images_per_second": 8.0, "kl/4x4_group00": 1.0}
        for i, value in enumerate(bpd, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {"state": state, "step": 20, "total_steps": 90, "attempt": 1, "reason": "", "time": now - 60} | status
    (folder / "status.json").write_text(json.dumps(content))
    settings = {"model": {"name": model, "likelihood": {"name": likelihood}}, "data": {"root": "data/faces32/"}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs in every state, and what is none."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "done", "finished", step=30, total_steps=30)
    write_run(root / "sweep/seed_1", "running")
    write_run(root / "sweep/seed_2", "preempted", bpd=(8.0, 3.5), reason="SIGTERM", attempt=3)
    write_run(
        root / "digits", "failed", bpd=(3.0, 2.0), model="mlp_vae", likelihood="bernoulli", reason="no GPU\x1b[2J"
    )
    write_run(root / "lost", "running", bpd=(7.0,))
    (root / "lost/run.lock").write_text(f"process 1 on {os.uname().nodename}\n")
    torn = write_run(root / "torn", "interrupted")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": 40, "tra\n{"step": 35, "time": 1, "train/bpd": 1')
    (root / "no_metrics").mkdir()
    (root / "no_metrics/status.json").write_text((torn / "status.json").read_text())
    (root / "foreign/metrics.jsonl").parent.mkdir()
    (root / "foreign/metrics.jsonl").write_bytes(b"\x00\xff\n" * 3)
    (root / "notes").mkdir()
    (root / "done/checkpoints/step_00000030").mkdir(parents=True)
    (root / "link").symlink_to(root / "done")
    (root / ".hidden").mkdir()
    write_run(root / ".hidden/run", "finished")
    return root


@pytest.fixture
def running(root):
    """The lock of the run that is running."""
    with RunLock(root / "sweep/seed_1"):
        yield


def rows_of(root: Path, **wanted) -> list:
    found = RunList(root)
    found.find()
    return select(found.read(), Wanted(**wanted))


def names(root: Path, **wanted) -> list[str]:
    return [row.name for row in rows_of(root, **wanted)]


def test_runs_are_found_up_to_three_folders_deep(root, tmp_path):
    found = [str(folder.relative_to(root)) for folder in find_runs(root)]
    assert found == ["digits", "done", "foreign", "lost", "no_metrics", "sweep/seed_1", "sweep/seed_2", "torn"]
    assert list(find_runs(root / "done")) == [root / "done"]
    write_run(tmp_path / "a/b/c", "finished")
    write_run(tmp_path / "a/b/d/e", "finished")
    assert names(tmp_path) == ["a/b/c"]


def test_a_run_that_is_deleted_while_runs_are_found_is_no_error(root, monkeypatch):
    found = [*find_runs(root), root / "deleted"]
    monkeypatch.setattr("pipeline.reporting.run_table.find_runs", lambda folder: found)
    assert RunList(root).find() == found[:-1]


def test_a_row_says_what_the_folder_says(root, running):
    row = next(row for row in rows_of(root) if row.name == "sweep/seed_1")
    assert (row.state, row.step, row.total_steps, row.model, row.data) == ("running", 30, 90, "nvae", "data/faces32/")
    assert (row.objective, row.newest, row.best, row.best_step) == ("train bits/dim", 5.0, 4.0, 20)
    assert row.seconds_left == pytest.approx(60 * 0.5)  # ten steps take five seconds
    assert row.images_per_second == 8.0
    last = json.loads((root / "sweep/seed_1/metrics.jsonl").read_text().splitlines()[-1])
    assert row.age_seconds == pytest.approx(time.time() - last["time"], abs=1)


def test_states_are_what_this_machine_can_see(root, running):
    states = {row.name: row.state for row in rows_of(root)}
    assert states == {
        "digits": "failed", "done": "finished", "foreign": "unknown", "lost": "killed", "no_metrics": "interrupted",
        "sweep/seed_1": "running", "sweep/seed_2": "preempted", "torn": "interrupted",
    }  # fmt: skip
    assert next(row for row in rows_of(root) if row.name == "lost").seconds_left is None


def test_a_run_of_another_machine_that_is_silent_may_be_killed(tmp_path):
    run = write_run(tmp_path / "run", "running")
    (run / "run.lock").write_text("process 1 on another-host\n")
    assert rows_of(tmp_path)[0].state == "running"
    (run / "metrics.jsonl").write_text("")
    content = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(content | {"time": content["time"] - 3600}))
    (row,) = rows_of(tmp_path)
    assert (row.state, row.reason[:27]) == ("running?", "Nothing was written for 1 h")
    with RunLock(run):
        (row,) = rows_of(tmp_path)
    assert (row.state, "is alive, and may hang" in row.reason) == ("running", True)


def test_sorting_and_filtering(root, running):
    assert names(root, sort="best") == [
        "digits",
        "sweep/seed_2",
        "done",
        "sweep/seed_1",
        "torn",
        "lost",
        "foreign",
        "no_metrics",
    ]  # fmt: skip - the ELBO of binary images beside bits per dimension; unknown ones last
    assert names(root, sort="best", reverse=True)[-2:] == ["foreign", "no_metrics"]
    assert names(root, sort="attempts")[0] == "sweep/seed_2"
    assert names(root, sort="name", states=["running", "killed"]) == ["lost", "sweep/seed_1"]
    assert names(root, sort="name", name="seed_?") == ["sweep/seed_1", "sweep/seed_2"]
    assert names(root, model="mlp") == ["digits"]
    assert names(root, data="celeba") == []


def test_the_best_elbo_is_the_largest_and_the_best_bits_are_the_fewest(tmp_path):
    write_run(tmp_path / "binary_worse", "finished", bpd=(9.0, 5.0), likelihood="bernoulli")
    write_run(tmp_path / "binary_better", "finished", bpd=(9.0, 4.0), likelihood="bernoulli")
    write_run(tmp_path / "color_worse", "finished", bpd=(9.0, 5.0))
    write_run(tmp_path / "color_better", "finished", bpd=(9.0, 4.0))
    order = ["binary_better", "binary_worse", "color_better", "color_worse"]
    assert names(tmp_path, sort="best") == names(tmp_path, sort="newest") == order
    assert [row.best for row in rows_of(tmp_path, sort="best")] == [-400.0, -500.0, 4.0, 5.0]


def test_what_is_added_is_read_without_reading_the_rest_again(tmp_path):
    run = write_run(tmp_path / "run", "running")
    found, num_bytes = RunList(tmp_path), []
    found.find()
    assert found.read(num_bytes.append)[0].best == 4.0
    size = (run / "metrics.jsonl").stat().st_size
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "time": time.time(), "train/bpd": 2.5}) + "\n")
    write_run(tmp_path / "other", "running")
    found.find()
    assert [row.best for row in found.read(num_bytes.append)] == [4.0, 2.5]
    assert sum(num_bytes) < 3 * size


def test_a_narrow_terminal_has_fewer_columns_and_says_which(root):
    rows = rows_of(root)
    plain = lambda text, style: text  # noqa: E731
    whole, narrow = table_lines(rows, None, plain), table_lines(rows, 80, plain)
    assert len(whole) == len(rows) + 1
    assert max(map(len, narrow)) <= 80
    assert "data" in whole[0]
    assert "data" not in narrow[0]
    assert re.fullmatch("80 letters wide, so without: .*data.*", narrow[-1])
    assert table_lines(rows, 10, plain)[0].split() == ["run", "state", "step"]


def test_the_speed_of_the_attempt_before_is_used_until_there_are_two_records():
    history = History()
    for step, moment, attempt in ((10, 100.0, 1), (20, 130.0, 1), (25, 900.0, 2)):
        history.add({"step": step, "time": moment, "attempt": attempt})
    assert history.seconds_per_step() == 3.0
    history.add({"step": 30, "time": 905.0, "attempt": 2})
    assert history.seconds_per_step() == 1.0


def test_the_command_needs_no_torch_and_names_what_is_wrong(root, running):
    """One start of the real command; -X importtime writes each module to standard error."""
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.runs", str(root), "--sort", "name"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=clean_environment())
    assert result.returncode == 0, result.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "yaml" in imported
    assert imported & {"torch", "numpy", "wandb", "PIL", "accelerate"} == set()
    lines = result.stdout.splitlines()
    assert lines[0].split() == "run model data state step left of newest best images/s age attempts".split()
    assert lines[6].split()[:6] == ["sweep/seed_1", "nvae", "faces32", "running", "30/90", "33"]
    assert "\x1b" not in result.stdout
    assert "digits: no GPU [2J." in lines
    assert "torn: 2 lines of metrics.jsonl cannot be read as a record; skipped." in lines
    assert any(line.startswith("no_metrics: There is no metrics.jsonl") for line in lines)
    assert any(line.startswith("foreign: status.json is missing") for line in lines)


def test_json_has_everything_and_an_older_run_is_a_row(capsys):
    assert runs.main([str(OLD_RUNS), "--json", "--sort", "name"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["attribute_vae", "nvae"]
    assert (rows[1]["state"], rows[1]["step"], rows[1]["model"], rows[1]["notes"]) == ("finished", 8, "nvae", [])
    assert rows[1]["best"] == pytest.approx(7.791886)
    assert rows[1]["objective"] == "val bits/dim"


def test_times_of_any_size_are_read(tmp_path, capsys):
    """Of foreign files: JSON stays valid, and nothing overflows."""
    strange = [1e308, float("inf"), float("nan"), -5.0, 0]
    for number, moment in enumerate(strange):
        run = write_run(tmp_path / f"run{number}", "running", time=moment, total_steps=2**62)
        times = [1.0, moment, 1.7e308]
        lines = [json.dumps({"step": step, "time": at, "train/bpd": 1e300}) for step, at in enumerate(times, start=1)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        assert status.main([str(run), "--long"]) == 0
    assert runs.main([str(tmp_path)]) == 0
    capsys.readouterr()
    assert runs.main([str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert len(rows) == len(strange)


def test_folders_without_runs(tmp_path, capsys):
    assert runs.main([str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    assert runs.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert runs.main([str(tmp_path / "nothing")]) == 2
    assert "nothing: no such folder; give the folder that holds run folders" in capsys.readouterr().err
    write_run(tmp_path / "run", "finished")
    assert runs.main([str(tmp_path), "--state", "failed"]) == 0
    assert "none of the 1 runs" in capsys.readouterr().out
    assert runs.main([str(tmp_path), "--watch", "0"]) == 2


# ------------------------------------------------------------------------------------------------------- on a terminal


def watched(root: Path, **environment: str) -> tuple[str, int]:
    """What `--watch` shows on a terminal until Ctrl-C, and its exit code."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "pipeline.runs", str(root), "--watch", "0.2", "--state", "finished"]
    changes = {"TERM": "xterm", "COLUMNS": "100", "LINES": "20"} | environment
    process = subprocess.Popen(command, stdout=end, stderr=end, cwd=ROOT, env=clean_environment(**changes))
    os.close(end)
    shown = b""
    while shown.count(b"finished") < 3:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # the terminal's other end is closed
        while content := os.read(terminal, 4096):
            shown += content
    os.close(terminal)
    return shown.decode(), process.wait(20)


def test_watching_ends_by_ctrl_c_with_the_last_table_and_has_colors(root):
    shown, code = watched(root)
    assert code == 0
    inside, _, after = shown.partition("\x1b[?1049l")
    assert inside.startswith("\x1b[?1049h")
    assert inside.count("\x1b[H") >= 3
    assert "\x1b[32mfinished" in inside
    assert after.count("done") == 1
    assert "Traceback" not in shown


def test_no_color_is_honored(root):
    shown, code = watched(root, NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*m", shown)
    assert "finished" in shown


def test_the_long_status(root, running, capsys):
    assert status.main([str(root / "sweep/seed_1"), "--long"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("seed_1: running, step 30 of 90 (33.3 %)\n  left ")
    assert re.search(r"^  left +30 s, until \d{4}-", text, re.M)
    assert re.search(r"^  best bits/dim +4 \(training, step 20\)$", text, re.M)
    assert "report.py" in text
    assert "--serve" in text
    add_attempt(
        root / "sweep/seed_1",
        AttemptFacts(2, model="nvae", parameters=1234, latent_groups=1, processes=2, device="CPU"),
    )
    assert status.main([str(root / "sweep/seed_1"), "--long"]) == 0
    text = capsys.readouterr().out
    assert "nvae: 1,234 parameters, 1 latent group\n" in text
    assert "at step 0, attempt 2: nvae on 2 processes on CPU\n" in text
    assert status.main([str(root / "digits"), "--long"]) == 0
    assert "  why              no GPU [2J\n" in capsys.readouterr().out
    assert status.main([str(root / "sweep/seed_1")]) == 0
    assert capsys.readouterr().out == "running\n"


def test_names_of_files_and_folders_have_no_letters_that_a_terminal_obeys(tmp_path, capsys):
    run = tmp_path / "run\x1b]0;title\x07"
    write_run(run, "finished")
    (run / "evaluations").mkdir()
    (run / "evaluations/\x1b[2J.json").write_text("torn")
    assert status.main([str(run), "--long"]) == 0
    text = capsys.readouterr().out
    assert "report.py" in text
    assert "is not an evaluation" in text
    assert "\x1b" not in text


def test_a_row_names_the_split_that_is_validated(tmp_path):
    write_run(tmp_path / "run", "finished")
    (tmp_path / "run/config.yaml").write_text("validation: {split: test}\n")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "time": 1, "val/bpd": 2.0}\n')
    assert [row.objective for row in rows_of(tmp_path)] == ["test bits/dim"]


def test_the_long_status_of_an_older_run_says_what_its_log_says(capsys):
    assert status.main([str(OLD_RUNS / "nvae"), "--long"]) == 0
    text = capsys.readouterr().out
    assert re.search("^  started +nvae on 1 process on CPU, 1 threads each, fp32 in tests/old_runs/nvae$", text, re.M)
    assert "next " in text
    assert "pipeline/evaluate.py" in text


@pytest.mark.parametrize(("name", "missing"), [("no_metrics", "There is no metrics.jsonl"), ("foreign", "3 lines of")])
def test_the_long_status_names_what_is_missing(root, capsys, name, missing):
    assert status.main([str(root / name), "--long"]) == 0
    assert missing in capsys.readouterr().out
    assert status.main([str(root / "notes"), "--long"]) == 2
    assert "not a run folder" in capsys.readouterr().err
