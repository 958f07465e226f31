"""What commands show: a bar on a terminal, a line per minute elsewhere, aligned facts, and colors where they fit."""

import io
import os
import sys

import pytest

from shard_data.terminal import BYTES, Progress, aligned, duration, paint, with_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_for(monkeypatch) -> Terminal:
    """What is written to standard error from now on. Not a fixture, as pytest's own capture begins after them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("shard_data.terminal.BAR_DELAY", 0)
    return terminal


def test_without_a_terminal_a_line_per_minute_says_what_is_left():
    """Six batches of 40 s, of which ten were measured before."""
    now, lines = iter(range(0, 10_000, 40)), []
    progress = Progress("elbo", 16, "batches", 10, lines.append, clock=lambda: float(next(now)))
    assert list(with_progress("abcdef", progress)) == list("abcdef")
    assert lines == [
        "elbo: 12 of 16 batches (75 %), about 3 min left",
        "elbo: 14 of 16 batches (87 %), about 1 min left",
    ]


def test_figures_and_bytes():
    now, lines = iter(range(0, 10_000, 61)), []
    with Progress("train", 3, "steps", write=lines.append, clock=lambda: float(next(now))) as progress:
        progress.update(figures="loss 0.500")
        progress.update()
        progress.update()
    now = iter(range(0, 10_000, 61))
    with Progress("file.zip", None, BYTES, write=lines.append, clock=lambda: float(next(now))) as progress:
        progress.update(1_000_000)
        progress.set_total(4_000_000)
        progress.update(2_000_000)
    assert lines == [
        "train: 1 of 3 steps (33 %), about 2 min left, loss 0.500",
        "train: 2 of 3 steps (66 %), about 1 min left, loss 0.500",
        "file.zip: 1.0 MB",
        "file.zip: 3.0 of 4.0 MB (75 %), about 41 s left",
    ]


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch):
    terminal = terminal_for(monkeypatch)
    lines = []
    with Progress("train", 3, "steps", write=lines.append, clock=iter([0.0, 100.0, 200.0]).__next__) as progress:
        progress.update()
        progress.update(figures="loss 0.5")
    assert lines == []
    assert "train:" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue()


def test_a_terminal_of_no_width_has_a_bar(monkeypatch):
    """As containers and `script` make them: no one has set its size."""
    terminal_for(monkeypatch)
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal, open(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("train", 3, "steps", clock=iter([0.0, 1.0]).__next__) as progress:
            progress.update(2)
        assert b"2/3" in screen.read(4096)


def test_work_that_writes_its_own_lines_has_a_bar_alone(monkeypatch):
    for stream, has_bar in ((terminal_for(monkeypatch), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("train", 3, "steps", write=None, clock=iter([0.0, 99.0]).__next__) as progress:
            progress.update()
        assert ("1/3" in stream.getvalue(), stream.getvalue() != "") == (has_bar, has_bar)


def test_what_is_not_shown_writes_nothing(monkeypatch):
    terminal = terminal_for(monkeypatch)
    lines = []
    for stream in (terminal, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("x", 2, "images", write=lines.append, shown=False, clock=iter([0.0, 99.0]).__next__) as progress:
            progress.update()
        assert (stream.getvalue(), lines) == ("", [])


def test_a_terminal_that_moves_no_cursor_gets_lines(monkeypatch):
    terminal = terminal_for(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    lines = []
    with Progress("x", 2, "images", write=lines.append, clock=iter([0.0, 99.0]).__next__) as progress:
        progress.update()
    assert (terminal.getvalue(), len(lines)) == ("", 1)


def test_the_bar_is_gone_when_the_work_fails(monkeypatch):
    terminal = terminal_for(monkeypatch)
    progress = Progress("x", 9, "images")
    with pytest.raises(ZeroDivisionError), progress:
        raise ZeroDivisionError
    assert terminal.getvalue().endswith("\n")


def test_facts_are_aligned_and_empty_ones_omitted():
    facts = {"data": "x", "model": "", "next": ["one", "", "two"], "length": "7 steps"}
    assert aligned(facts) == ["  data    x", "  next    one", "          two", "  length  7 steps"]
    assert aligned({}) == []


def test_colors_are_for_terminals_that_have_them(monkeypatch):
    terminal = terminal_for(monkeypatch)
    assert paint("x", "red", terminal) == "\x1b[31mx\x1b[0m"
    assert paint("x", "", terminal) == paint("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("x", "red", terminal) == "x"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 00 min"), (11_130, "3 h 06 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
