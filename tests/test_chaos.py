"""A little of `make chaos`: runs killed at random moments equal straight ones."""

import os

import pytest

from tests.chaos import CASES, main


@pytest.mark.parametrize(("case", "kills"), [("mlp_vae, 1 process", 2), ("nvae, 2 processes", 1)])
def test_a_little_chaos(case, kills, tmp_path):
    assert case in CASES
    port = 29600 + os.getpid() % 300
    assert main(["--kills", str(kills), "--cases", case, "--folder", str(tmp_path), "--port", str(port)]) == 0
    assert len(list(tmp_path.glob("*/tormented"))) == 1
