"""A short form of `make chaos`: runs killed at random moments equal uninterrupted ones."""

import pytest

from tests.chaos import CASES, main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("case", "kills"), [("mlp_vae, 1 process", 2), ("nvae, 2 processes", 1)])
def test_killed_runs_equal_uninterrupted_ones(case, kills, tmp_path):
    assert case in CASES
    assert main(["--kills", str(kills), "--cases", case, "--folder", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*/killed"))) == 1
