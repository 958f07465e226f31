"""Log messages on a terminal that also shows a progress bar."""

import io
import logging

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
