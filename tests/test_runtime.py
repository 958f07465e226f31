"""One process: collectives are the identity, and threads follow the machine rather than the launcher."""

import os

import pytest
import torch

from pipeline.runtime import check_process_count, cores_per_process


def test_with_one_process_collectives_are_the_identity(make_runtime):
    runtime = make_runtime()
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(runtime.mean(value), value)
    assert torch.equal(runtime.gather(value), value)
    assert runtime.agree(torch.tensor(True)) is True
    assert runtime.agree(torch.tensor(False)) is False
    assert runtime.from_main("x") == "x"
    assert runtime.on_main(lambda: 7) == 7
    with pytest.raises(ValueError, match="spoiled"):
        runtime.on_main(lambda: int("spoiled"))


def test_cores_are_shared_by_local_processes(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores_per_process() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * cores))
    assert cores_per_process() == 1


def test_the_launchers_number_is_compared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_process_count(1, None)
    check_process_count(1, 1)
    with pytest.raises(ValueError, match="train.expect_processes: 8 processes were expected and 1 started"):
        check_process_count(1, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 but 1"):
        check_process_count(1, None)
