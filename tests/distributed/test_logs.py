"""Log messages on a terminal that also shows a progress bar."""

import io
import logging

import pytest
from tqdm import tqdm

from pipeline.distributed.logs import TerminalHandler


def test_a_message_has_its_own_line_above_a_progress_bar():
    terminal = io.StringIO()
    handler = TerminalHandler(terminal)
    with tqdm(total=3, file=terminal, mininterval=0) as bar:
        bar.update()
        handler.handle(logging.makeLogRecord({"msg": "step %d", "args": (7,)}))
        bar.update()
    lines = [line.rsplit("\r", 1)[-1] for line in terminal.getvalue().split("\n")]  # what stays visible
    assert lines[0] == "step 7"
    assert "2/3" in lines[1]


def test_without_a_progress_bar_a_message_is_a_plain_line():
    terminal = io.StringIO()
    TerminalHandler(terminal).handle(logging.makeLogRecord({"msg": "100 %"}))
    assert terminal.getvalue() == "100 %\n"


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("level", "environment", "shown"),
    [
        ("INFO", {}, "a message"),
        ("WARNING", {}, "\x1b[33ma message\x1b[0m"),
        ("ERROR", {}, "\x1b[31ma message\x1b[0m"),
        ("ERROR", {"NO_COLOR": "1"}, "a message"),
        ("ERROR", {"TERM": "dumb"}, "a message"),
    ],
)
def test_warnings_and_errors_have_a_color_on_a_terminal(monkeypatch, level, environment, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    TerminalHandler(terminal).handle(logging.makeLogRecord({"msg": "a message", "levelname": level}))
    assert terminal.getvalue() == shown + "\n"
