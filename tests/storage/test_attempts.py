"""attempts.jsonl: what is written is read; what is no record of a start is skipped."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.storage.attempts import FILE, KEPT, AttemptFacts, add_attempt, read_attempts
from pipeline.storage.run_lock import RunLock, is_held
from tests.helpers.launching import ROOT

FACTS = AttemptFacts(
    1, 0.0, 4, 8, "nvae", 12_345, 3, "data/toy_faces32", 64, 2, "CPU", 1, "fp32", "a host \N{SNOWMAN}", "2.13",
    "3.11.2", "0123456789abcdef", "v1-3-g0123-dirty", "f" * 64,
)  # fmt: skip


HOLD = (
    "import sys; from pipeline.storage.run_lock import RunLock; lock = RunLock(sys.argv[1]); print(flush=True); input()"
)


def test_what_is_written_is_read_in_order(tmp_path):
    add_attempt(tmp_path, FACTS)
    add_attempt(tmp_path, replace(FACTS, attempt=2))
    first, second = read_attempts(tmp_path)
    assert replace(first, time=0.0) == FACTS
    assert (second.attempt, second.time >= first.time > 1e9) == (2, True)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", '{"attempt": 0}', '{"attempt": true}', '{"attempt": "1"}', "[" * 100_000, '{"a": ' * 100_000,
     f'{{"attempt": {"1" * 5000}}}', f'{{"attempt": {"1" * 400}}}', "\udcff\x00"],
)  # fmt: skip
def test_a_line_that_is_no_record_is_skipped_and_the_others_are_kept(tmp_path, line):
    content = f"{line}\n".encode(errors="surrogateescape")
    (tmp_path / FILE).write_bytes(b'{"attempt": 1}\n' + content + b'{"attempt": 2}')
    assert [facts.attempt for facts in read_attempts(tmp_path)] == [1, 2]
    add_attempt(tmp_path, replace(FACTS, attempt=3))
    assert [json.loads(line)["attempt"] for line in (tmp_path / FILE).read_text().splitlines()] == [1, 2, 3]


def test_values_of_another_type_or_size_have_their_default(tmp_path):
    record = {
        "attempt": 7,
        "time": "now",
        "step": -1,
        "total_steps": 2**63,
        "model": ["x"],
        "host": "h" * 5000,
        "more": 1,
    }
    (tmp_path / FILE).write_text(json.dumps(record)[:-1] + ', "more": 1, "parameters": NaN, "processes": 1e999}\n')
    assert read_attempts(tmp_path) == [AttemptFacts(attempt=7, host="h" * 1000)]


def test_the_environment_is_what_stays_from_start_to_start():
    later = replace(FACTS, attempt=9, time=3.0, step=7, total_steps=99)
    assert later.environment == FACTS.environment
    assert FACTS.environment["revision"] == "v1-3-g0123-dirty"
    assert replace(FACTS, torch="2.14").environment != FACTS.environment


def test_files_that_are_none_and_long_ones(tmp_path):
    assert read_attempts(tmp_path) == []
    (tmp_path / FILE).symlink_to("/dev/zero")
    assert read_attempts(tmp_path) == []
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).write_text("".join(f'{{"attempt": {number}}}\n' for number in range(1, KEPT + 50)))
    add_attempt(tmp_path, replace(FACTS, attempt=KEPT + 50))
    attempts = [facts.attempt for facts in read_attempts(tmp_path)]
    assert (len(attempts), attempts[-1]) == (KEPT, KEPT + 50)


def test_a_folder_is_held_while_a_process_has_its_lock(tmp_path):
    """Another process, which is then killed. Asking makes no file and takes no lock that lasts."""
    assert is_held(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.readline()
        assert is_held(tmp_path) is True
        process.kill()
    assert is_held(tmp_path) is False
    with RunLock(tmp_path):
        assert is_held(tmp_path) is True
    (tmp_path / "run.lock").write_text("process 1 on another-host\n")
    assert is_held(tmp_path) is None  # free as far as this host can see, which is not far
    (tmp_path / "run.lock").unlink()
    os.mkfifo(tmp_path / "run.lock")
    assert is_held(tmp_path) is None
