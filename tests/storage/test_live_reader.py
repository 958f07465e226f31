"""A folder of checkpoints is read while a run writes to it."""

import threading

import pytest
import torch

from pipeline.storage import checkpoint
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint
from pipeline.storage.checkpoint_writer import CheckpointWriter
from tests.helpers.checkpoints import small


@pytest.mark.parametrize("which", ["latest", "best"])
def test_each_read_of_a_live_run_finds_a_checkpoint(tmp_path, which):
    """With keep=1 the checkpoint that a reader has chosen is often deleted under it."""
    Checkpoints(tmp_path).save(0, small(), {}, score=0.0)
    stop = threading.Event()

    def write():
        checkpoints = Checkpoints(tmp_path, keep=1)
        step = 0
        while not stop.is_set():
            step += 1
            checkpoints.save(step, {"model": {"x": torch.full((2**15,), float(step))}}, {}, score=-step)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        steps = [0]
        while len(steps) < 100 or (steps[-1] < 20 and len(steps) < 50_000):
            steps.append(Checkpoints(tmp_path).load(which).step)
    finally:
        stop.set()
        writer.join()
    assert steps == sorted(steps)
    assert steps[-1] >= 20


def test_a_checkpoint_that_is_deleted_while_it_is_read_leads_to_the_new_one(tmp_path, monkeypatch):
    """Not to the older one that is there, and without a message about an unreadable one."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(), {})
    checkpoints.save(2, small(), {})
    read = checkpoint.read_folder

    def delete_first(folder):
        if folder == checkpoints.path(2):
            checkpoints.save(3, small(), {})
            checkpoints._delete(folder)
        return read(folder)

    monkeypatch.setattr(checkpoint, "read_folder", delete_first)
    found = checkpoints.latest()
    assert (found.step, found.passed_over) == (3, ())


def test_the_folder_is_not_listed_for_ever(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(), {})
    listings = []
    monkeypatch.setattr(checkpoints, "steps", lambda: listings.append(1) or [10 + len(listings)])
    with pytest.raises(UnreadableCheckpoint, match="no checkpoint in .* can be used"):
        checkpoints.latest()
    assert len(listings) == 2 * checkpoint.MAX_LISTINGS


def test_a_step_is_reported_when_it_is_on_the_disk(tmp_path):
    """status.json once named checkpoints that did not exist yet, or never did."""
    checkpoints, reported = Checkpoints(tmp_path / "run"), []

    def on_written(step):
        assert checkpoints.latest().step == step
        reported.append(step)

    with CheckpointWriter(checkpoints, print, on_written=on_written) as writer:
        writer.save(1, small(), {})
    assert reported == [1]
    (tmp_path / "file").write_text("")
    failing = CheckpointWriter(Checkpoints(tmp_path / "file"), lambda *failure: None, (), on_written)
    failing.save(2, small(), {})
    with pytest.raises(OSError, match="step 2"):
        failing.finish()
    assert reported == [1]
