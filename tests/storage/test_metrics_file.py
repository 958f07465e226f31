"""metrics.jsonl: strict JSON, one line per step, no gap and no repetition whatever happens."""

import errno
import json
import logging
import math
import os
import resource
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.metrics_file import MetricsFile, cut_records, read_records

values = st.dictionaries(
    st.text(min_size=1, max_size=8), st.one_of(st.floats(), st.integers(-(2**60), 2**60)), max_size=4
)


def refuse_constant(name):
    raise AssertionError(f"not JSON: {name}")


def read(path):
    """Records by a reader that knows JSON only, not Python's NaN."""
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


def same(saved, original):
    number = float(saved) if isinstance(saved, str) else saved
    return number == original or (math.isnan(number) and math.isnan(original))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), values), max_size=12))
def test_one_line_per_step_with_everything_that_was_logged(tmp_path_factory, calls):
    path = tmp_path_factory.mktemp("records") / "metrics.jsonl"
    file, step, expected = MetricsFile(path, -1), 0, {}
    for advance, figures in calls:
        step += advance
        figures.pop("step", None), figures.pop("time", None)
        file.add(step, figures)
        if figures:
            expected[step] = {**figures, **expected.get(step, {})}
        records = read(path)  # each call's figures are in the file when it returns
        assert [record["step"] for record in records] == sorted(expected)
        for record in records:
            logged = expected[record["step"]]
            assert record.keys() == {"step", "time"} | logged.keys()
            assert all(same(record[key], logged[key]) for key in logged)
    file.close()


def test_time_is_seconds_since_1970(tmp_path):
    before = time.time()
    MetricsFile(tmp_path / "m.jsonl", -1).add(1, {"a": 1})
    assert before - 0.001 <= read(tmp_path / "m.jsonl")[0]["time"] <= time.time() + 0.001


def test_numbers_that_json_does_not_know(tmp_path):
    MetricsFile(tmp_path / "m.jsonl", -1).add(3, {"a": math.nan, "b": math.inf, "c": -math.inf})
    record = read(tmp_path / "m.jsonl")[0]
    assert (record["a"], record["b"], record["c"]) == ("NaN", "Infinity", "-Infinity")
    assert (float(record["b"]), float(record["c"])) == (math.inf, -math.inf)


@settings(max_examples=40, deadline=None)
@given(st.lists(values, max_size=6), st.integers(0, 40))
def test_records_read_back_as_they_were_logged(tmp_path_factory, logged, torn):
    path = tmp_path_factory.mktemp("records") / "metrics.jsonl"
    assert list(read_records(path)) == []
    file, sizes = MetricsFile(path, -1), [0]
    for step, figures in enumerate(logged):
        file.add(step, {"loss": 1.0, **figures})
        sizes.append(path.stat().st_size)
    os.truncate(path, max(0, sizes[-1] - torn))
    whole = sum(size <= path.stat().st_size for size in sizes[1:])
    records = list(read_records(path))
    assert [record["step"] for record in records] == list(range(whole))
    for record, figures in zip(records, logged, strict=False):
        assert all(same(record[key], value) for key, value in figures.items() if key not in ("step", "time"))
        assert all(isinstance(value, int | float) for value in record.values())


def test_records_can_be_brought_to_the_disk(tmp_path, monkeypatch, caplog):
    file, synced = MetricsFile(tmp_path / "m.jsonl", -1), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    file.sync()
    assert synced == [str(tmp_path / "m.jsonl")]
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    file.sync()
    assert "could not be flushed to disk: I/O error" in caplog.text


def test_going_back_is_a_mistake(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", -1)
    file.add(3, {"a": 1})
    with pytest.raises(AssertionError, match="step 2 after 3"):
        file.add(2, {"a": 1})


def write(path, steps):
    file = MetricsFile(path, -1)
    for step in steps:
        file.add(step, {"loss": step / 7})
    file.close()
    return path.read_bytes().splitlines(keepends=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(0, 10), st.integers(0, 60))
def test_a_resumed_run_continues_the_file(tmp_path_factory, written, resumed_at, torn):
    """`torn` bytes are missing at the end; the run resumes at a step of which the record was whole."""
    path = tmp_path_factory.mktemp("records") / "metrics.jsonl"
    lines = write(path, range(1, written + 1))
    path.write_bytes(path.read_bytes()[: max(0, sum(map(len, lines)) - torn)])
    whole = [step for step in range(1, written + 1) if sum(map(len, lines[:step])) <= path.stat().st_size]
    resumed_at = min(resumed_at, len(whole))
    file = MetricsFile(path, resumed_at)
    assert path.read_bytes() == b"".join(lines[:resumed_at])
    for step in range(resumed_at + 1, 12):
        file.add(step, {"loss": step / 7})
    assert [(record["step"], record["loss"]) for record in read(path)] == [(step, step / 7) for step in range(1, 12)]
    assert os.listdir(path.parent) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"step": "3"}\n', b"\0" * 40 + b"\n", b'{"step": 1']
)
def test_lines_that_are_no_records_are_removed(tmp_path, bad, caplog):
    path = tmp_path / "m.jsonl"
    lines = write(path, [1, 2])
    path.write_bytes(lines[0] + bad + (lines[1] if bad.endswith(b"\n") else b""))
    with caplog.at_level(logging.INFO):
        cut_records(path, 5)
    assert path.read_bytes() == lines[0] + (lines[1] if bad.endswith(b"\n") else b"")
    assert "removed what followed step 5" in caplog.text


def test_a_good_file_is_left_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    before = path.stat()
    cut_records(path, 2)
    assert path.stat() == before


def test_death_while_cutting_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    lines = write(path, [1, 2, 3])
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "died")))
    with pytest.raises(OSError, match="died"):
        cut_records(path, 1)
    assert path.read_bytes() == b"".join(lines)


def test_a_full_disk_costs_no_record(tmp_path, caplog):
    """The kernel refuses to write beyond a file size, in the midst of a record, as a full disk would."""
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path, -1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limit[1]))
    try:
        for step in range(1, 8):
            file.add(step, {"loss": 0.5})
            file.add(step, {"more": step})
        assert path.stat().st_size <= 150
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    file.add(8, {"loss": 0.5, "more": 8})
    file.add(9, {"loss": 0.5, "more": 9})
    assert [(record["step"], record["more"]) for record in read(path)] == [(step, step) for step in range(1, 10)]
    assert len([record for record in caplog.records if "kept in memory" in record.message]) == 1


def test_a_kill_tears_no_record(tmp_path):
    """Records are extended in place while the process is killed. The kernel may stop a write at a page's edge, so the
    last line may be torn; the next start removes it, and what is left are the first steps, each whole."""

    def add_for_ever(path):
        file, step = MetricsFile(path, -1), 0
        while True:
            step += 1
            file.add(step, {"a": 1})
            file.add(step, {"b": step})

    for attempt in range(10):
        path = tmp_path / f"{attempt}.jsonl"
        child = os.fork()
        if child == 0:
            try:
                add_for_ever(path)
            finally:
                os._exit(1)
        while not path.exists() or path.stat().st_size < 1000:
            time.sleep(0.001)
        time.sleep(0.002 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        MetricsFile(path, last_step=10**9).close()
        records = read(path)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        assert len(records) > 10
        assert all(record["b"] == record["step"] for record in records[:-1])
