"""What a checkpoint states about the progress of its run is checked before it is used."""

from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.progress import Progress

GOOD = {"step": 8, "skipped_steps": 3, "skipped_in_a_row": 2, "skipped_samples": 900, "skipped_by_norm": 1}
GOOD |= {"samples_seen": 64}

FORGED = {
    "missing": None,
    "a list": [8, 3, 2, 900],
    "no step": {key: value for key, value in GOOD.items() if key != "step"},
    "another step": GOOD | {"step": 7},
    "text": GOOD | {"step": "8"},
    "a fraction": GOOD | {"step": 8.0},
    "a truth value": GOOD | {"skipped_steps": True},
    "nothing": GOOD | {"skipped_samples": None},
    "negative": GOOD | {"skipped_samples": -1},
    "huge": GOOD | {"skipped_samples": 2**63},
    "more skipped than taken": GOOD | {"skipped_steps": 9},
    "more in a row than in all": GOOD | {"skipped_in_a_row": 4},
    "more by norm than in all": GOOD | {"skipped_by_norm": 4},
}


def test_what_a_run_states_is_read():
    assert asdict(Progress.read(GOOD, step=8)) | {"samples_seen": 64} == GOOD


def test_an_older_run_skipped_none_by_norm():
    older = {key: value for key, value in GOOD.items() if key != "skipped_by_norm"}
    assert Progress.read(older, step=8) == Progress.read(GOOD | {"skipped_by_norm": 0}, step=8)


@pytest.mark.parametrize("what", FORGED)
def test_forged_progress_is_refused_in_one_line(what):
    with pytest.raises(ValueError, match="^its progress .*") as error:
        Progress.read(FORGED[what], step=8)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, JSON)) | JSON)
def test_any_json_is_read_or_refused(facts):
    try:
        progress = Progress.read(facts, step=2)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
        assert 0 <= progress.skipped_in_a_row <= progress.skipped_steps <= progress.step == 2
    assert len(message) < 400
