"""The log file of a run: from the first line on, complete once the disk has space, and never a traceback."""

import logging
import resource
from pathlib import Path

import pytest

from pipeline.distributed.log_file import LogFile


@pytest.fixture
def log():
    log = logging.getLogger("pipeline")
    before, level = list(log.handlers), log.level
    log.setLevel(logging.INFO)
    yield log
    for handler in set(log.handlers) - set(before):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(level)


def messages(path: Path) -> list[str]:
    return [line.split(" ", 3)[3] for line in path.read_text().splitlines()]


def test_lines_before_the_file_is_open_are_in_it(log, tmp_path):
    (tmp_path / "log.txt").write_text("2026-11-28 08:00:00,000 INFO of an earlier attempt\n")
    file = LogFile()
    log.addHandler(file)
    log.info("one")
    assert messages(tmp_path / "log.txt") == ["of an earlier attempt"]
    file.open(tmp_path / "log.txt")
    log.warning("two")
    assert messages(tmp_path / "log.txt") == ["of an earlier attempt", "one", "two"]


def test_a_full_disk_is_reported_once_and_costs_no_line(log, tmp_path, caplog, capfd):
    file, path = LogFile(), tmp_path / "log.txt"
    log.addHandler(file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
        file.open(path)
        for number in range(3):
            log.info("line %d", number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{path}: no space left; its lines are kept in memory until they can be written"
    ]
    log.info("line 3")
    assert [line for line in messages(path) if line.startswith("line")] == [f"line {number}" for number in range(4)]
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_cannot_be_opened_is_reported_once(log, tmp_path, caplog):
    file = LogFile()
    log.addHandler(file)
    (tmp_path / "log.txt").mkdir()
    file.open(tmp_path / "log.txt")
    log.info("one")
    log.info("two")
    assert len([record for record in caplog.records if "Is a directory" in record.getMessage()]) == 1
    (tmp_path / "log.txt").rmdir()
    log.info("three")
    assert [line for line in messages(tmp_path / "log.txt") if "directory" not in line] == ["one", "two", "three"]
