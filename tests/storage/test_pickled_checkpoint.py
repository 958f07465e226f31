"""Pickled checkpoints: what torch.save wrote comes back; no forged file runs code or allocates without limit."""

import argparse
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.pickled_checkpoint import UnreadablePickle, check_tensor, read_pickled, write_pickled
from tests.helpers.hostile_pickles import hostile, saved, tensor_pickle, with_pickle

ROOT = Path(__file__).parents[2]


def content() -> dict:
    weights = OrderedDict(a=torch.arange(6.0).reshape(2, 3), steps=torch.tensor(3))
    weights["twice"] = weights["a"]
    args = argparse.Namespace(dataset="mnist", seed=2**40, rate=0.5, flag=True, path=None)
    return {"epoch": 3, "state_dict": weights, "args": args, "lists": [1, (2.5, "x")], "empty": {}}


def same(one: dict, other: dict) -> bool:
    weights, others = one["state_dict"], other["state_dict"]
    equal = list(weights) == list(others) and all(torch.equal(weights[name], others[name]) for name in weights)
    return equal and one | {"state_dict": 0} == other | {"state_dict": 0}


def test_what_was_saved_comes_back(tmp_path):
    write_pickled(tmp_path / "x.pt", content())
    found = read_pickled(tmp_path / "x.pt")
    assert same(found, content())
    assert found["state_dict"]["a"].dtype == torch.float32
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        write_pickled(tmp_path / "x.pt", {"a": torch.zeros(2), "b": lambda: 0})
    assert os.listdir(tmp_path) == []


READ_ALL = """
import json, resource, sys
from pathlib import Path
from pipeline.storage.pickled_checkpoint import UnreadablePickle, read_pickled

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
messages = {}
for path in sorted(Path(sys.argv[1]).glob("*.pt")):
    try:
        messages[path.stem] = f"read: {str(read_pickled(path))[:100]}"
    except UnreadablePickle as error:
        messages[path.stem] = str(error).removeprefix(f"{path}: ")
print(json.dumps(messages))
"""


def test_hostile_files_are_refused_in_one_line_with_little_memory_and_nothing_runs(tmp_path):
    cases = hostile(tmp_path / "it_ran")
    for name, (data, _) in cases.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert messages.keys() == cases.keys()
    for name, (_, expected) in cases.items():
        assert expected in messages[name], (name, messages[name])
        assert "\n" not in messages[name]
        assert not messages[name].startswith("read"), name
    assert not (tmp_path / "it_ran").exists()


@settings(max_examples=150)
@given(st.data())
def test_a_cut_or_changed_file_is_refused_or_gives_what_was_saved(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    good = saved(content())
    if data.draw(st.booleans()):
        changed = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        changed = good[:place] + bytes([good[place] ^ (1 << data.draw(st.integers(0, 7)))]) + good[place + 1 :]
    path.write_bytes(changed)
    try:
        found = read_pickled(path)
    except UnreadablePickle as error:
        message = str(error)
    else:
        message = f"{path}: the same" if same(found, content()) else "something else"
    assert message.startswith(f"{path}: ")
    assert message.isprintable()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2).to_sparse(), "not a tensor"),
        (torch.zeros(2, device="meta"), "not a tensor"),
        ([1.0], "not a tensor"),
        (torch.zeros(1).expand(2**40), "more elements"),
        (torch.zeros(5), "more elements"),
    ],
)
def test_a_tensor_has_no_more_elements_than_the_file(value, message):
    with pytest.raises(ValueError, match=message):
        check_tensor("w", value, max_bytes=16)
    assert check_tensor("w", torch.zeros(4), max_bytes=16).shape == (4,)


def test_an_expanded_tensor_of_a_forged_file_is_noticed(tmp_path):
    (tmp_path / "x.pt").write_bytes(with_pickle(tensor_pickle(2**30, stride=0)))
    tensor = read_pickled(tmp_path / "x.pt")["w"]
    assert len(tensor) == 2**30
    with pytest.raises(ValueError, match="more elements than the file holds"):
        check_tensor("w", tensor, max_bytes=2**40)


def test_what_is_not_a_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), (".", "is a folder"), ("none", "No such file")):
        with pytest.raises(OSError, match=message) as caught:
            read_pickled(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
