"""metrics.jsonl as a report reads it: torn, foreign and long lines, restarts, and what is added later."""

import json

import pytest

from pipeline.reporting.history import MAX_NAMES, HistoryReader
from pipeline.storage.metrics_file import MAX_RECORD, MetricsFile


def line(step, **values):
    return json.dumps({"step": step, "time": 1e9 + step, **values}) + "\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_lines_that_are_no_records_are_counted_and_the_others_read(path):
    torn, foreign, unfinished = '{"step": 2, "ti\n', "hello\n[1, 2]\n\x00\n", '{"step": 9, "loss": 1'
    path.write_text(line(1, loss=3.0) + torn + foreign + line(3, loss=float("nan")) + line(4, loss=1.0) + unfinished)
    history = HistoryReader(path).read()
    assert history.curves["loss"].points() == [(1, 3.0), (4, 1.0)]
    assert (history.num_records, history.not_records) == (3, 4)
    assert history.last_step == 4


def test_a_long_line_is_one_line_and_its_end_is_no_record(path):
    path.write_text(line(1, loss=3.0) + "x" * (2 * MAX_RECORD + 10) + line(2, loss=7.0) + line(3, loss=1.0))
    history = HistoryReader(path).read()
    assert history.curves["loss"].points() == [(1, 3.0), (3, 1.0)]
    assert history.not_records == 1


def test_records_that_come_after_a_later_step_are_counted(path):
    path.write_text(line(5, loss=1.0) + line(3, loss=2.0) + line(5, loss=3.0) + line(6, loss=4.0))
    history = HistoryReader(path).read()
    assert history.curves["loss"].points() == [(5, 1.0), (6, 4.0)]
    assert history.out_of_order == 2


def test_what_is_added_later_is_read_from_where_reading_stopped(path):
    path.write_text(line(1, loss=3.0) + '{"step": 2, "time"')
    reader, num_bytes = HistoryReader(path), []
    assert reader.read().num_records == 1
    with path.open("a") as file:
        file.write(': 1, "loss": 2.0}\n' + line(3, loss=1.0))
    history = reader.read(num_bytes.append)
    assert history.curves["loss"].points() == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert history.not_records == 0
    assert sum(num_bytes) < path.stat().st_size


def test_a_file_that_a_restart_has_cut_is_read_again(path):
    path.write_text(line(1, loss=3.0) + line(2, loss=2.0))
    reader = HistoryReader(path)
    reader.read()
    other = path.with_name("other")
    other.write_text(line(1, loss=3.0) + line(2, loss=9.0) + line(3, loss=8.0))
    other.replace(path)
    assert reader.read().curves["loss"].points() == [(1, 3.0), (2, 9.0), (3, 8.0)]


def test_a_file_that_was_written_anew_in_its_place_is_read_again(path):
    """As when a run folder is deleted and its file system gives the new file the old one's number."""
    path.write_text(line(1, loss=3.0) + line(2, loss=2.0))
    reader = HistoryReader(path)
    reader.read()
    path.write_text("".join(line(step, loss=7.0) for step in range(10)))
    history = reader.read()
    assert history.curves["loss"].points() == [(step, 7.0) for step in range(10)]
    assert (history.not_records, history.out_of_order) == (0, 0)


def test_a_record_that_is_read_between_its_two_parts_is_read_again(path):
    """A step that is validated and logged gets one record, whose line is written twice."""
    file, reader = MetricsFile(path, last_step=-1), HistoryReader(path)
    file.add(1, {"train/loss": 5.0})
    file.add(2, {"val/elbo": -3.0})
    assert reader.read().curves["val/elbo"].points() == [(2, -3.0)]
    file.add(2, {"train/loss": 4.0})
    file.add(3, {"train/loss": 3.0})
    file.close()
    history = reader.read()
    assert history.curves["train/loss"].points() == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert (history.num_records, history.not_records) == (3, 0)


def test_attempts_and_speed(path):
    first = [line(step, attempt=1, **{"perf/wall_clock_s": step}) for step in (10, 20)]
    second = [
        json.dumps({"step": step, "time": 2e9 + 3 * step, "attempt": 2, "perf/wall_clock_s": 2.0 * step}) + "\n"
        for step in (30, 40, 50)
    ]
    path.write_text("".join(first + second))
    history = HistoryReader(path).read()
    assert [(one.number, one.first_step, one.last_step) for one in history.attempts] == [(1, 10, 20), (2, 30, 50)]
    assert history.seconds_per_step() == 3  # of the second attempt alone, without the time between them
    assert history.seconds == 100


def test_best_values_with_their_first_step(path):
    path.write_text("".join(line(step, x=value) for step, value in enumerate([2.0, 5.0, 1.0, 5.0, 1.0])))
    assert HistoryReader(path).read().best["x"] == ((2, 1.0), (1, 5.0))


def test_memory_does_not_grow_with_names(path):
    path.write_text("".join(line(step, **{f"{step}/{i}": 1.0 for i in range(50)}) for step in range(MAX_NAMES // 10)))
    history = HistoryReader(path).read()
    assert len(history.curves) == MAX_NAMES
    assert history.names_refused
