"""Checkpoints prepared by an attacker who writes correct hashes, and files that were enlarged."""

import hashlib
import json
import os
import pickle
import resource

import pytest

from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint, read_folder, read_meta
from tests.helpers.checkpoints import FACTS, assert_same, forge, small


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def saved(checkpoints):
    return checkpoints.save(1000, small(), FACTS, score=1.5)


def test_the_forger_of_these_tests_is_a_good_one(saved):
    forge(saved, step=1000, facts={"changed": True})
    assert read_folder(saved).facts == {"changed": True}


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.pt", "..", "", "x.safetensors\n", ".safetensors"]
)
def test_names_that_lead_elsewhere_are_refused(saved, name):
    target = saved / name
    if name == "../x.safetensors":
        target.write_bytes((saved / "model.safetensors").read_bytes())
    good = json.loads((saved / "meta.json").read_text())["files"]["model.safetensors"]
    forge(saved, files={name: good})
    with pytest.raises(UnreadableCheckpoint, match="files"):
        read_folder(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "1000"},
        {"step": 1000.0},
        {"version": 2},
        {"format": "other"},
        {"extra": 1},
        {"files": []},
        {"score": "low"},
    ],
)
def test_facts_of_another_kind_are_refused(saved, changes):
    forge(saved, **changes)
    with pytest.raises(UnreadableCheckpoint, match=f"meta.json.*{next(iter(changes))}"):
        read_folder(saved)


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors"])
def test_links_and_pipes_are_refused(saved, name):
    kept = (saved / name).rename(saved / "elsewhere")
    (saved / name).symlink_to(kept)
    with pytest.raises(UnreadableCheckpoint, match=f"{name}: is a symbolic link"):
        read_folder(saved)
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(UnreadableCheckpoint, match=f"{name}: not a regular file"):
        read_folder(saved)


def test_a_linked_folder_is_no_checkpoint(checkpoints, saved):
    (checkpoints.folder / "step_00009000").symlink_to(saved)
    assert checkpoints.steps() == [1000]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_not_run_even_with_the_right_hash(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Bomb())
    (saved / "model.safetensors").write_bytes(content)
    forge(saved, files={"model.safetensors": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}})
    with pytest.raises(UnreadableCheckpoint, match="not a safetensors file"):
        read_folder(saved)
    assert not (tmp_path / "exploded").exists()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """At most 2 GiB of address space more than now."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_an_enlarged_file_falls_back_to_the_checkpoint_before(checkpoints, little_memory, name):
    """A sparse file of 50 GB is not read: its size is compared first."""
    checkpoints.save(1, small(1), {})
    os.truncate(checkpoints.save(2, small(2), {}) / name, 50 * 2**30)
    found = checkpoints.latest()
    assert found.step == 1
    assert_same(small(1), found.tensors)
    assert "larger than" in found.passed_over[0] if name == "meta.json" else "bytes instead of" in found.passed_over[0]


def test_facts_that_could_not_be_read_back_are_not_written(checkpoints):
    with pytest.raises(ValueError, match="the facts of a checkpoint take .* bytes; at most"):
        checkpoints.save(1, small(), {"text": "x" * 2**23})
    assert os.listdir(checkpoints.folder) == []


# --- contents ---------------------------------------------------------------------------------------------------------


def safetensors_bytes(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}},  # torch has no such dtype
        {"x": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]}},
        b'{"a":' * 10_000,
        b"[]",
        b"",
    ],
)
def test_hostile_headers_are_unreadable_checkpoints(saved, header):
    content = safetensors_bytes(header)
    (saved / "model.safetensors").write_bytes(content)
    forge(saved, files={"model.safetensors": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}})
    with pytest.raises(UnreadableCheckpoint, match="model.safetensors: not a safetensors file of torch tensors"):
        read_folder(saved)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5_000, b'{"sha256": 1e999}', b"\xff", b"null", b'"x"']
)
def test_hostile_facts_are_unreadable_checkpoints(saved, content):
    (saved / "meta.json").write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match="meta.json: not the facts of a checkpoint"):
        read_meta(saved)
