"""The journal of an unfinished evaluation: exact, safe against kills and damage, and of one question only."""

import json
import logging
import math
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import evaluation_journal
from pipeline.storage.evaluation_journal import EvaluationJournal, lock

QUESTION = {"weights_sha256": "ab" * 32, "seed": 1, "threads": 2}
RECORDS = [[0, [[-81.25, 1e-300], [math.inf, math.nan]], []], [0, [], [[5, 5, "tar: \u20ac", None]]], [1, [[0.1]], []]]


def filled(path, records=RECORDS):
    """The closed journal of an evaluation that was killed after these records."""
    journal = EvaluationJournal(path, QUESTION)
    for record in records:
        journal.add(record)
    journal.close()
    return journal.path


def resumed(path, question=QUESTION) -> list:
    journal = EvaluationJournal(path, question)
    journal.close()
    return journal.records


@given(st.lists(st.lists(st.floats(width=64)), max_size=4))
def test_numbers_come_back_to_the_bit(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("journal") / "report"
    filled(path, records)
    bits = [[struct.pack("<d", value) for value in record if value == value] for record in records]
    found = resumed(path)
    assert [[struct.pack("<d", value) for value in record if value == value] for record in found] == bits
    assert [len(record) for record in found] == [len(record) for record in records]


@given(cut=st.integers(0, 400), junk=st.binary(max_size=40))
@settings(max_examples=60)
def test_what_a_kill_or_a_damage_leaves_is_a_prefix_and_continues(tmp_path_factory, cut, junk):
    """Cut anywhere, with anything behind: whole records before it are kept, and more can be added."""
    path = tmp_path_factory.mktemp("journal") / "report"
    file = filled(path)
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    file.write_bytes(whole[:cut] + junk)
    kept = sum(end <= cut for end in ends[1:])
    journal = EvaluationJournal(path, QUESTION)
    assert repr(journal.records) == repr(RECORDS[:kept])
    for record in RECORDS[kept:]:
        journal.add(record)
    journal.close()
    assert file.read_bytes() == whole


@given(st.data())
@settings(max_examples=60)
def test_no_changed_byte_is_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "report"
    file = filled(path)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    before = bytes(content[:place]).count(b"\n")
    file.write_bytes(content)
    assert repr(resumed(path)) == repr(RECORDS[: max(0, before - 1)])


def test_damage_is_logged(tmp_path, caplog):
    file = filled(tmp_path / "report")
    file.write_bytes(file.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING, "pipeline"):
        resumed(tmp_path / "report")
    assert f"{file}: incomplete or damaged at its end; 2 results before that are kept" in caplog.text


def test_another_question_is_refused_and_kept(tmp_path):
    file = filled(tmp_path / "report")
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match="unfinished evaluation under other conditions.*seed 1, now 3; threads 2, now 4"
    ):
        EvaluationJournal(tmp_path / "report", QUESTION | {"seed": 3, "threads": 4})
    assert file.read_bytes() == before
    assert repr(resumed(tmp_path / "report")) == repr(RECORDS)  # and no lock was left
    text = json.dumps([1]).encode()
    file.write_bytes(evaluation_journal.encoded([1]) + text)
    with pytest.raises(ValueError, match="not an unfinished evaluation; remove the file"):
        EvaluationJournal(tmp_path / "report", QUESTION)


def test_one_process_at_a_time(tmp_path, monkeypatch):
    """The second is refused; what a killed one held is free."""
    monkeypatch.setattr(evaluation_journal, "LOCK_SECONDS", 0.0)
    path = tmp_path / "report"
    code = "import time; from pathlib import Path; from pipeline.storage.evaluation_journal import *; "
    code += f"journal = EvaluationJournal(Path({str(path)!r}), {QUESTION!r}); journal.add(1.5); "
    code += "print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on .* runs this evaluation"):
            EvaluationJournal(path, QUESTION)
        process.kill()
    assert resumed(path) == [1.5]


def test_a_link_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / "report.rank0.unfinished").symlink_to(other)
    with pytest.raises(OSError, match="symbolic link"):
        EvaluationJournal(tmp_path / "report", QUESTION)
    assert other.read_text() == "kept"


def test_a_full_disk_ends_the_journal_and_not_the_evaluation(tmp_path, caplog, monkeypatch):
    """What was written before can be resumed."""
    path = tmp_path / "report"
    journal = EvaluationJournal(path, QUESTION)
    journal.add(RECORDS[0])

    class Full:
        def write(self, line):
            return len(line) // 2

        def close(self):
            pass

    journal._file.close()
    journal._file = Full()
    journal.add(RECORDS[1])
    journal.add(RECORDS[2])
    journal.close()
    said = "no space left; the evaluation continues, but cannot be resumed from here"
    assert len([record for record in caplog.records if said in record.getMessage()]) == 1
    assert repr(resumed(path)) == repr(RECORDS[:1])


def test_results_reach_the_disk_every_few_seconds(tmp_path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(evaluation_journal.os, "fsync", synced.append)
    journal = EvaluationJournal(tmp_path / "report", QUESTION, clock=lambda: now[0])
    for seconds in (1.0, 4.9, 5.1, 6.0, 11.0):
        now[0] = seconds
        journal.add(1.5)
    journal.close()
    assert len(synced) == 2


def test_ranks_have_files_of_their_own_and_a_finished_evaluation_has_none(tmp_path):
    journals = [EvaluationJournal(tmp_path / "report", QUESTION, rank) for rank in (0, 1)]
    assert len({journal.path for journal in journals}) == 2
    for journal in journals:
        journal.add(1)
        journal.close(delete=True)
    assert list(tmp_path.iterdir()) == []
    lock(tmp_path / "report").release(delete=True)
