"""A run does not use the checkpoints of another run that lie in its folder."""

import shutil

import pytest

from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint
from pipeline.storage.run_id import FILE, find_run_id, read_run_id, write_run_id
from tests.helpers.checkpoints import assert_same, damage, small

OWN, OTHER = "a" * 32, "b" * 32


def start(folder, keep=None):
    """The checkpoints of a run in a folder, as a session has them."""
    folder.mkdir(exist_ok=True)
    run_id = find_run_id(folder)
    write_run_id(folder, run_id)
    return Checkpoints(folder / "checkpoints", keep, run_id)


def test_a_folder_keeps_its_id_when_it_is_copied_or_moved(tmp_path):
    checkpoints = start(tmp_path / "run")
    checkpoints.save(1, small(), {"a": 1})
    assert checkpoints.latest().facts == {"a": 1, "run_id": checkpoints.run_id}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in ("copy", "moved"):
        again = start(tmp_path / name)
        assert again.run_id == checkpoints.run_id
        assert again.latest().step == 1


def test_a_folder_without_an_id_takes_that_of_its_newest_checkpoint(tmp_path):
    checkpoints = start(tmp_path)
    checkpoints.save(1, small(), {})
    damage(checkpoints.save(2, small(), {}))
    (checkpoints.path(2) / "meta.json").unlink()
    (tmp_path / FILE).unlink()
    assert start(tmp_path).run_id == checkpoints.run_id


def test_new_folders_have_different_ids(tmp_path):
    assert start(tmp_path / "a").run_id != start(tmp_path / "b").run_id


def test_checkpoints_without_an_id_are_accepted(tmp_path):
    Checkpoints(tmp_path / "checkpoints").save(1, small(), {})
    assert start(tmp_path).latest().step == 1


def test_a_checkpoint_of_another_run_is_skipped(tmp_path):
    """A process that kept training after its folder was replaced wrote step 9 here."""
    own = Checkpoints(tmp_path, run_id=OWN)
    own.save(1, small(1), {}, score=5.0)
    Checkpoints(tmp_path, run_id=OTHER).save(9, small(9), {}, score=1.0)
    for found in (own.latest(), own.best()):
        assert found.step == 1
        assert_same(small(1), found.tensors)
        assert "step_00000009: belongs to another run" in found.passed_over[0]
    assert own.own_steps() == [1]
    assert own.load(own.path(9)).step == 9


def test_only_checkpoints_of_another_run_are_an_error(tmp_path):
    Checkpoints(tmp_path, run_id=OTHER).save(9, small(9), {})
    own = Checkpoints(tmp_path, run_id=OWN)
    with pytest.raises(UnreadableCheckpoint, match="(?s)no checkpoint in .*belongs to another run .*give its path"):
        own.latest()
    assert own.own_steps() == []


def test_the_own_checkpoint_of_a_step_replaces_that_of_another_run(tmp_path):
    Checkpoints(tmp_path, run_id=OTHER).save(2, small(9), {})
    own = Checkpoints(tmp_path, keep=1, run_id=OWN)
    own.save(1, small(1), {})
    own.save(2, small(2), {})
    assert_same(small(2), own.latest().tensors)


def test_the_checkpoints_of_another_run_are_neither_counted_nor_deleted(tmp_path):
    Checkpoints(tmp_path, run_id=OTHER).save(2, small(9), {}, score=-1.0)
    own = Checkpoints(tmp_path, keep=1, run_id=OWN)
    own.save(1, small(1), {}, score=1.0)
    own.save(3, small(3), {}, score=2.0)
    assert own.steps() == [1, 2, 3]
    assert own.best().step == 1


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 32, b"a" * 5000, b"../../etc"])
def test_an_unreadable_id_counts_as_none(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    assert read_run_id(tmp_path) is None
    write_run_id(tmp_path, OWN)
    assert read_run_id(tmp_path) == OWN


def test_a_linked_id_is_not_followed(tmp_path):
    (tmp_path / "target").write_text(OTHER)
    (tmp_path / FILE).symlink_to(tmp_path / "target")
    assert read_run_id(tmp_path) is None
