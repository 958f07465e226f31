"""status.json: the state that distinguishes stopped, finished and failed runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.status import main
from pipeline.storage.status import FILE, Status, StatusFile, read_status


def printed(folder: Path) -> str:
    command = [sys.executable, "-m", "pipeline.status", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout


def test_attempts_are_counted_over_restarts_and_the_end_is_reported(tmp_path):
    assert read_status(tmp_path) == Status()
    first = StatusFile(tmp_path)
    assert first.begin(0, 100) == 1
    first.saved(40)
    assert read_status(tmp_path).state == "running"
    second = StatusFile(tmp_path)  # the first was killed
    assert second.begin(40, 100) == 2
    second.end("preempted", "SIGUSR1")
    status = read_status(tmp_path)
    assert (status.state, status.step, status.total_steps, status.attempt, status.reason) == (
        "preempted",
        40,
        100,
        2,
        "SIGUSR1",
    )


def test_scripts_read_one_word(tmp_path):
    assert printed(tmp_path) == "none\n"
    file = StatusFile(tmp_path)
    file.begin(0, 10)
    file.end("finished")
    assert printed(tmp_path) == "finished\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"state": "rm -rf"}',
        '{"state": ["running"]}',
        '{"state": {"a": {}}}',
        '{"state": "running", "step": "1"}',
        '{"state": "running", "step": true}',
        '{"state": "running", "step": -1}',
        '{"state": "running", "total_steps": {}}',
        '{"state": "running", "reason": []}',
        '{"state": "running", "time": "now"}',
        '{"x": 1}',
        "[" * 100_000,
        '{"state":' * 100_000,
        f'{{"state": "running", "step": {"1" * 5000}}}',
        '{"state": "running"}' + " " * 2**21,
    ],
)
def test_an_invalid_file_is_no_status(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    assert read_status(tmp_path) == Status()
    assert StatusFile(tmp_path).begin(3, 10) == 1
    assert json.loads((tmp_path / FILE).read_text())["step"] == 3


def test_status_in_other_encodings_and_links_are_unreadable(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    assert read_status(tmp_path) == Status()
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).symlink_to("/dev/zero")
    assert read_status(tmp_path) == Status()


def test_the_command_explains_itself_and_refuses_a_missing_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m pipeline.status" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, "nothing: no such folder; give the folder of a run" in printed.err) == ("", True)


def test_a_disk_that_refuses_is_logged_and_tolerated(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the folder should be")
    file = StatusFile(tmp_path / "run")
    assert file.begin(0, 10) == 1
    assert file.status.state == "running"
    assert "status.json could not be written" in caplog.text


def test_a_status_does_not_make_a_folder_that_was_moved_again(tmp_path):
    """The name may be another run's soon. Seen when a run was moved while its status was being written."""
    (tmp_path / "run").mkdir()
    status = StatusFile(tmp_path / "run")
    status.begin(0, 6)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    status.saved(2)
    assert not (tmp_path / "run").exists()
    assert read_status(tmp_path / "elsewhere").step == 0
