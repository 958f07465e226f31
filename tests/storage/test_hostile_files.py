"""Files of a run folder with arbitrary content: a correct read, or the one error that their readers document.

`HOSTILE_EXAMPLES` sets how many contents each test tries.
"""

import hashlib
import json
import math
import os
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint, read_folder
from pipeline.storage.metrics_file import cut_records, read_records
from pipeline.storage.status import FILE, Status, StatusFile, read_status
from pipeline.tracking.history import read_history
from tests.helpers.checkpoints import FACTS, small
from tests.helpers.hostile import NESTED, VALUES, altered, dumps, flipped

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "60"))
hostile = settings(
    max_examples=EXAMPLES,
    derandomize="HOSTILE_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good checkpoints of a run; the tests alter the second."""
    folder = tmp_path_factory.mktemp("hostile") / "checkpoints"
    checkpoints = Checkpoints(folder, run_id="a" * 32)
    checkpoints.save(1, small(), FACTS, score=1.0)
    checkpoints.save(2, small(), FACTS, score=0.5)
    return folder


def check_checkpoint(folder):
    """The second checkpoint is read as it is, or the first one is used and the error is one line."""
    path = folder / "step_00000002"
    try:
        found, problem = read_folder(path), f"{path}: none"
    except UnreadableCheckpoint as error:
        found, problem = None, str(error)
    assert problem.startswith(str(path))
    assert len(problem.splitlines()) == 1
    if found is not None:
        assert found.step == 2
        size = sum(os.path.getsize(path / f"{stem}.safetensors") for stem in found.tensors)
        assert sum(tensor.nbytes for group in found.tensors.values() for tensor in group.values()) <= size
    own = Checkpoints(folder, run_id="a" * 32)
    used = {own.latest().step, own.best().step}
    assert used <= ({1, 2} if found is not None else {1})


def with_hash(content):
    """Content of meta.json with the hash that it should have."""
    content.pop("sha256", None)
    text = json.dumps(content, indent=1) + "\n"
    return (json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n").encode()


@hostile
@given(data=st.data())
def test_meta_json(folder, data):
    path = folder / "step_00000002" / "meta.json"
    good = path.read_bytes()
    content = data.draw(
        altered(json.loads(good)).map(lambda value: with_hash(value) if isinstance(value, dict) else dumps(value))
        | flipped(good)
        | VALUES.map(dumps)
        | NESTED
    )
    try:
        path.write_bytes(content)
        check_checkpoint(folder)
    finally:
        path.write_bytes(good)


@hostile
@given(data=st.data())
def test_safetensors_headers_with_the_right_hash(folder, data):
    path = folder / "step_00000002"
    good, meta = (path / "model.safetensors").read_bytes(), (path / "meta.json").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, tensors = json.loads(good[8 : 8 + length]), good[8 + length :]
    text = data.draw(altered(header).map(dumps) | flipped(good[8 : 8 + length]) | VALUES.map(dumps) | NESTED)
    stated = data.draw(st.just(len(text)) | st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 400))
    content = stated.to_bytes(8, "little") + text + tensors[: data.draw(st.integers(0, len(tensors)))]
    facts = json.loads(meta)
    facts["files"]["model.safetensors"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    try:
        (path / "model.safetensors").write_bytes(content)
        (path / "meta.json").write_bytes(with_hash(facts))
        check_checkpoint(folder)
    finally:
        (path / "model.safetensors").write_bytes(good)
        (path / "meta.json").write_bytes(meta)


STATUS = {"state": "running", "step": 3, "total_steps": 9, "attempt": 1, "reason": "", "time": 1.5}


@hostile
@given(
    content=altered(STATUS).map(dumps) | flipped(dumps(STATUS)) | VALUES.map(dumps) | NESTED | st.binary(max_size=40)
)
def test_status_json(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    status = read_status(tmp_path)
    if status != Status():
        fields = json.loads(content)
        assert all(fields[name] == getattr(status, name) for name in fields)
    assert StatusFile(tmp_path).begin(5, 9) == status.attempt + 1
    assert read_status(tmp_path).step == 5


RECORD = {"step": 2, "time": 1.5, "val/elbo": -3.5, "perf/wall_clock_s": 2.0, "loss": "NaN"}
LINES = st.one_of(
    altered(RECORD).map(lambda value: json.dumps(value).encode()),
    flipped(json.dumps(RECORD).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
    NESTED,
    st.binary(max_size=20),
)


@hostile
@example(
    lines=[b"[" * 20_000, b'{"step": 1, "a": "far"}', b'{"step": 1e3}', b'{"step": true}'], ended=True, last_step=4
)
@example(lines=[b'{"step": 1, "time": "NaN", "a": [1], "b": {}, "c": 1' + b"0" * 400 + b"}"], ended=True, last_step=1)
@given(lines=st.lists(LINES, max_size=4), ended=st.booleans(), last_step=st.integers(-1, 4))
def test_metrics_jsonl(tmp_path, lines, ended, last_step):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([json.dumps(RECORD).encode(), *lines]) + b"\n" * ended)
    records = list(read_records(path))
    for record in records:
        assert type(record["step"]) is int
        assert all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in record.values())
        assert math.isfinite(record["time"])
    assert [logged.step for logged in read_history(tmp_path)] == sorted({record["step"] for record in records})
    cut_records(path, last_step)
    kept = [record for record in records if record["step"] <= last_step]
    assert repr(list(read_records(path))) == repr(kept)  # NaN differs from itself
    once = path.read_bytes()
    cut_records(path, last_step)
    assert path.read_bytes() == once


@pytest.mark.parametrize("line", [b"9" * 2**22, b"\n" * 2**12, b'{"step": 1, "a": [' + b"[]," * 2**19 + b"0]}\n"])
def test_reading_a_large_metrics_file_takes_at_most_twice_its_size(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line)
    tracemalloc.start()
    try:
        assert list(read_records(path)) == []
        cut_records(path, 5)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(line) + 2**20
    finally:
        tracemalloc.stop()
