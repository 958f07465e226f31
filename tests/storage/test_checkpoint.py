"""Checkpoints are whole or invisible, exact to the bit, and every damage is seen."""

import hashlib
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import checkpoint, checkpoint_folder
from pipeline.storage.checkpoint import CheckpointConfig, Checkpoints
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint, read_folder, read_meta, snapshot
from tests.helpers.checkpoints import FACTS, assert_same, damage, same_bits, small


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


# --- what goes in comes out -------------------------------------------------------------------------------------------


LAYOUTS = {
    "plain": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "strided": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "scalar": lambda x: x.sum() if x.dtype != torch.bool else x.any(),
    "empty": lambda x: x[:0],
    "with gradient": lambda x: x.requires_grad_() if x.is_floating_point() else x,
}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(0, 2**32),
)
def test_values_come_back_to_the_bit(tmp_path_factory, dtype, layout, shape, seed):
    raw = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    values = (
        raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype)[..., 0]
    )  # any bits, NaN and infinities among them
    tensors = {"model": {"x": LAYOUTS[layout](values.clone())}}
    path = Checkpoints(tmp_path_factory.mktemp("saved")).save(5, tensors, FACTS)
    loaded = read_folder(path)
    assert_same({"model": {"x": tensors["model"]["x"].detach()}}, loaded.tensors)
    assert (loaded.step, loaded.facts, loaded.score) == (5, FACTS, None)


def test_tensors_that_share_memory_are_saved_each(checkpoints):
    weight = torch.randn(3, 3)
    checkpoints.save(1, {"model": {"encoder": weight, "decoder": weight, "row": weight[0]}}, {})
    loaded = checkpoints.latest().tensors["model"]
    assert same_bits(loaded["encoder"], weight)
    assert same_bits(loaded["decoder"], weight)
    assert same_bits(loaded["row"], weight[0])


def test_a_snapshot_is_not_changed_by_later_steps(checkpoints):
    tensors = small()
    before = {stem: {name: tensor.clone() for name, tensor in group.items()} for stem, group in tensors.items()}
    taken = snapshot(tensors)
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    checkpoints.write(10, taken, FACTS)
    assert_same(before, checkpoints.latest().tensors)


def test_only_safetensors_and_json_are_written(checkpoints):
    path = checkpoints.save(1000, small(), FACTS)
    assert path.name == "step_00001000"
    assert sorted(os.listdir(path)) == ["ema.safetensors", "meta.json", "model.safetensors"]
    assert os.listdir(checkpoints.folder) == ["step_00001000"]


def test_bytes_do_not_depend_on_the_process(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from pipeline.storage.checkpoint import Checkpoints
        names = [f"layer{i}.weight" for i in range(20)]
        if sys.argv[2] == "reversed":
            names.reverse()
        tensors = {"model": {name: torch.full((3,), float(name[5:-7])) for name in names}}
        Checkpoints(sys.argv[1]).save(1, tensors, {"a": 1})
    """)
    digests = []
    for seed, order in (("1", "sorted"), ("2", "reversed")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed), order], check=True, env=env)
        folder = tmp_path / seed / "step_00000001"
        digests.append({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in os.listdir(folder)})
    assert digests[0] == digests[1]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(checkpoints):
    return checkpoints.save(1000, small(), FACTS, score=1.5)


def fault_of(read, folder):
    """What the exception says; thousands of `pytest.raises` would be slow."""
    try:
        read(folder)
    except UnreadableCheckpoint as damage:
        return str(damage)
    return None


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_any_flipped_bit_is_seen(saved, name):
    content = (saved / name).read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        (saved / name).write_bytes(flipped)
        assert name in fault_of(read_folder, saved)
    (saved / name).write_bytes(content)
    assert fault_of(read_folder, saved) is None


def test_any_flipped_bit_of_the_facts_is_seen(saved):
    content = (saved / "meta.json").read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        (saved / "meta.json").write_bytes(flipped)
        assert "meta.json" in fault_of(checkpoint_folder.read_meta, saved)


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "ema.safetensors"])
def test_truncated_and_missing_files_are_seen(saved, name):
    content = (saved / name).read_bytes()
    for length in {0, 1, 7, len(content) // 2, len(content) - 1}:
        (saved / name).write_bytes(content[:length])
        with pytest.raises(UnreadableCheckpoint, match=name):
            read_folder(saved)
    (saved / name).write_bytes(content + b"\n")
    with pytest.raises(UnreadableCheckpoint, match=name):
        read_folder(saved)
    (saved / name).unlink()
    with pytest.raises(UnreadableCheckpoint, match=f"{name}: No such file"):
        read_folder(saved)


def test_a_renamed_folder_is_refused(saved):
    with pytest.raises(UnreadableCheckpoint, match="step 1000"):
        read_folder(saved.rename(saved.with_name("step_00002000")))
    assert read_folder((saved.with_name("step_00002000")).rename(saved.with_name("chosen"))).step == 1000


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_nothing_there_is_none(checkpoints):
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    with pytest.raises(ValueError, match="no checkpoint that could be its latest"):
        checkpoints.load("latest")
    with pytest.raises(ValueError, match="no checkpoint at .*step_00000009.*name a folder such as"):
        checkpoints.load(checkpoints.path(9))


def test_the_last_good_one_is_taken_and_it_says_so(checkpoints, caplog):
    checkpoints.keep = None
    for step in (1, 2, 3, 4):
        checkpoints.save(step, small(step), {"step": step}, score=-step)
    damage(checkpoints.path(4))
    (checkpoints.path(3) / "meta.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoints.load("latest")
    assert found.step == 2
    assert found.path == checkpoints.path(2)
    assert_same(small(2), found.tensors)
    assert ["step_00000004" in found.passed_over[0], "step_00000003" in found.passed_over[1]] == [True, True]
    assert "checkpoint skipped" in caplog.text
    assert "sha256 differs" in caplog.text
    assert checkpoints.load("best").step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "meta.json"])
@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "missing"])
def test_harm_to_any_one_file_falls_back_to_the_checkpoint_before(checkpoints, caplog, name, harm):
    checkpoints.save(1, small(1), {})
    file = checkpoints.save(2, small(2), {}) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flipped bit" else content[:-1])
    found = checkpoints.latest()
    assert found.step == 1
    assert_same(small(1), found.tensors)
    assert f"checkpoint skipped: {file}" in caplog.text


def test_only_unreadable_ones_are_an_error_not_a_fresh_start(checkpoints):
    damage(checkpoints.save(1, small(), {}))
    damage(checkpoints.save(2, small(), {}))
    with pytest.raises(UnreadableCheckpoint, match="(?s)can be used.*step_00000002.*step_00000001.*start a new run"):
        checkpoints.latest()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(-3, 3), st.just(float("nan")), st.just(float("inf"))), max_size=6),
    st.integers(0, 3),
)
def test_the_last_and_the_best_are_kept(tmp_path_factory, scores, keep):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("kept"), keep)
    present = set()
    for step, score in enumerate(scores):
        checkpoints.save(step, {"model": {"x": torch.tensor(step)}}, {}, score)
        present.add(step)
        finite = [each for each in sorted(present) if scores[each] is not None and abs(scores[each]) < 9]
        best = {min(finite, key=lambda each: scores[each])} if finite else set()
        if keep:
            present = set(sorted(present)[-keep:]) | best
        assert set(checkpoints.steps()) == present
        assert {checkpoints.best().step} == best if best else checkpoints.best() is None
        assert checkpoints.latest().step == step
    assert set(os.listdir(checkpoints.folder)) == {checkpoints.path(step).name for step in present}


def test_milestones_stay(tmp_path):
    """Beside the last and the best, which is of step 3; step 0 is none."""
    checkpoints = Checkpoints(tmp_path, keep=2, milestones=4)
    for step in range(11):
        checkpoints.save(step, small(step), {}, score=1.0 if step == 3 else 2.0)
    assert checkpoints.steps() == [3, 4, 8, 9, 10]


def test_milestones_have_checkpoints():
    assert CheckpointConfig(every=10, milestones=30).milestones == 30
    for every in (0, 20):
        with pytest.raises(ValueError, match=rf"milestones=30 is not a multiple of checkpoint.every={every}"):
            CheckpointConfig(every=every, milestones=30)


def test_after_a_return_to_an_older_one_the_new_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    Checkpoints(tmp_path).save(2000, small(), {})
    damage(Checkpoints(tmp_path).save(3000, small(), {}))
    assert checkpoints.latest().step == 2000
    checkpoints.save(2500, small(1), {})
    assert checkpoints.latest().step == 2500
    checkpoints.save(3000, small(2), {})
    assert checkpoints.steps() == [3000]
    assert_same(small(2), checkpoints.latest().tensors)


def test_saving_a_step_again_is_harmless(checkpoints):
    path = checkpoints.save(10, small(1), {"first": True})
    written = (path / "meta.json").stat()
    assert checkpoints.save(10, small(1), {"first": True}) == path
    assert (path / "meta.json").stat() == written
    assert os.listdir(checkpoints.folder) == [path.name]


def test_a_save_reads_the_facts_of_each_checkpoint_once(checkpoints, monkeypatch):
    """Reading them takes time on a network file system."""
    for step, score in ((1, 0.5), (2, 3.0), (3, 2.0)):
        checkpoints.save(step, small(), {}, score)
    read = []
    monkeypatch.setattr(checkpoint, "read_meta", lambda path: read.append(path.name) or read_meta(path))
    checkpoints.save(4, small(), {}, 1.0)
    assert sorted(read) == [f"step_{step:08d}" for step in (1, 2, 3, 4)]
    assert checkpoints.steps() == [1, 3, 4]
