"""Lines of progress where there is no terminal: once per minute, with an estimate of what is left."""

import logging

import pytest

from pipeline.run.reading_progress import duration, with_progress


def test_a_line_per_minute_says_what_is_left(caplog):
    """Six batches of 40 s, of which ten were measured before."""
    now = iter(range(0, 10_000, 40))
    logging.getLogger("pipeline").propagate = True
    with caplog.at_level(logging.INFO, "pipeline"):
        assert list(with_progress("abcdef", 10, 6, clock=lambda: float(next(now)))) == list("abcdef")
    assert caplog.messages == [
        "evaluated 11 of 16 batches; about 7 min left",
        "evaluated 13 of 16 batches; about 3 min left",
        "evaluated 15 of 16 batches; about 1 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "about 1 min"), (3599, "about 1 h 00 min"), (11_130, "about 3 h 06 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
