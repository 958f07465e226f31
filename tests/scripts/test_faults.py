"""A shard that one process cannot read: all processes end with one message, or all continue without the sample."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.order import Order
from pipeline.data.shards import TarShards, UnreadableShard
from pipeline.run.data import RunData
from tests.helpers.launching import ROOT, launch, train, train_alone
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set
from tests.helpers.run_folders import (
    assert_metrics_close,
    metrics,
    read_lines,
    remove_checkpoints_after,
    tensor_bytes,
)

BATCH = 12
SEED = 1


@pytest.fixture
def root(tmp_path) -> Path:
    return write_tiny_set(tmp_path / "data")


@pytest.fixture
def recipe(root, tmp_path) -> Path:
    train = {"batch_size": BATCH, "seed": SEED, "steps": 4}
    return write_tiny_recipe(tmp_path, root, train=train, validation={"every": 2})


def make_unreadable(root: Path, split: str, index: int) -> str:
    """Overwrites the .npy header of a sample. Returns the pattern of the error that names its place."""
    shards = TarShards(root, split)
    starts = np.cumsum((0, *shards.shard_sizes))
    number = int(np.searchsorted(starts, index, side="right")) - 1
    name = f"{split}-{number:06d}"
    offset = int(np.load(root / f"{name}.index.npy")["offset"][index - starts[number]])
    with (root / f"{name}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    return rf"{name}\.tar: sample '{split}-s{index:05d}' at offset {offset}: not the \.npy that it should be"


def sample_at(root: Path, position: int) -> int:
    shards = TarShards(root, "train")
    return int(Order(shards.shard_sizes, SEED, window=32).at([position])[1][0])


def skipped(folder: Path) -> list[dict]:
    return read_lines(folder / "skipped_samples.jsonl")


# ------------------------------------------------------------------------------------------------------ all ranks end

RECORD_ERRORS = """
import os, sys
from pathlib import Path
from pipeline import cli, train
def report_error(error, report_error=cli.report_error):
    (Path(os.environ["ERRORS"]) / os.environ["RANK"]).write_text(f"{type(error).__name__} {error}")
    report_error(error)
cli.report_error = report_error
sys.exit(train.main())
"""


def assert_all_end(recipe: Path, place: str, *overrides: str) -> None:
    """Both processes end with one error, which names the place. The launcher's output shows it once."""
    folder = recipe.parent
    (folder / "errors").mkdir()
    (folder / "script.py").write_text(RECORD_ERRORS)
    arguments = ["--config", str(recipe), "--run-dir", str(folder / "run"), *overrides]
    variables = {"ERRORS": str(folder / "errors"), "PYTHONPATH": str(ROOT)}
    result = launch(2, folder / "script.py", *arguments, **variables)
    assert result.returncode == 1
    errors = [(folder / "errors" / rank).read_text() for rank in "01"]
    assert errors[0] == errors[1]
    assert re.search(rf"^UnreadableShard .*{place}", errors[0])
    assert result.stderr.count(errors[0].removeprefix("UnreadableShard ")) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_sample_that_the_second_process_cannot_read_ends_both(root, recipe, tmp_path, workers):
    """In step 1, with positions 12 to 23; the second process has 18 to 23. The checkpoint of step 1 is complete."""
    place = make_unreadable(root, "train", sample_at(root, 21))
    assert_all_end(recipe, place, f"data.workers={workers}", "data.verify=false", "checkpoint.every=1")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.slow
def test_an_unreadable_sample_in_validation_ends_both(root, recipe, tmp_path):
    place = make_unreadable(root, "test", 11)
    assert_all_end(recipe, place, "data.verify=false")
    assert not any("val/elbo" in record for record in metrics(tmp_path / "run"))


def test_a_missing_shard_ends_both(root, recipe):
    """Both find it in the same step, each with a sample of its own. The first rank's is reported."""
    (root / "train-000002.tar").unlink()
    assert_all_end(recipe, r"train-000002\.tar: sample 'train-s000\d\d' at offset \d+: No such file or directory")


# -------------------------------------------------------------------------------------------------- all ranks continue


@pytest.fixture
def unreadable(root) -> dict[str, set[int]]:
    """A sample of each process's share, the first of a shard, and two for validation; by split."""
    indices = {"train": {sample_at(root, 14), sample_at(root, 21), 10}, "test": {0, 12}}
    for split, numbers in indices.items():
        for index in numbers:
            make_unreadable(root, split, index)
    return indices


@pytest.mark.slow
def test_one_and_two_processes_skip_the_same_samples(recipe, unreadable, tmp_path):
    """Losses, keys, list and counts are those of one process, in float64 over an epoch's end, with micro-batches."""
    overrides = (
        "train.precision=fp64",
        "data.trace=true",
        "data.on_error=skip",
        "train.micro_batch=4",
        "train.steps=7",
    )
    for processes in (1, 2):
        result = train(processes, recipe, "--run-dir", str(tmp_path / str(processes)), *overrides)
        assert result.returncode == 0, result.stderr
    one, two = tmp_path / "1", tmp_path / "2"
    assert_metrics_close(metrics(one), metrics(two), 1e-10)
    assert (one / "data_trace.jsonl").read_text() == (two / "data_trace.jsonl").read_text()
    assert skipped(one) == skipped(two)
    assert {split: {r["index"] for r in skipped(one) if r["split"] == split} for split in unreadable} == unreadable
    check_figures(one, unreadable)


def check_figures(folder: Path, unreadable: dict[str, set[int]]) -> None:
    """The counts count positions, the list samples. The trace names the replacements."""
    records = metrics(folder)
    trace = read_lines(folder / "data_trace.jsonl")
    keys = {position: key for line in trace for position, key in zip(line["positions"], line["keys"], strict=True)}
    sampled = Order([10, 7, 7, 7, 7, 3], SEED, window=32).at(range(7 * BATCH))[1].tolist()
    assert records[-1]["train/skipped_samples"] == sum(index in unreadable["train"] for index in sampled) > 3
    assert [r["val/skipped_samples"] for r in records if "val/elbo" in r] == [2.0] * 4
    assert all(np.isfinite(r["val/elbo"]) for r in records if "val/elbo" in r)
    for position, index in enumerate(sampled):
        assert (keys[position] == f"train-s{index:05d}") == (index not in unreadable["train"])
    for entry in skipped(folder):
        if entry["split"] == "train":
            assert keys[entry["position"]] == f"train-s{entry['replaced_by']:05d}"
            assert sampled[entry["position"]] == entry["index"]
        assert f"{entry['split']}-s{entry['index']:05d}' at offset" in entry["problem"]


@pytest.mark.slow
def test_resuming_keeps_the_list_of_skipped_samples(recipe, unreadable, tmp_path):
    """As if killed after step 2's checkpoint: list, count and weights are those of the uninterrupted run."""
    overrides = ("data.on_error=skip", "checkpoint.keep=null")
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    result = train_alone(recipe, "--run-dir", str(uninterrupted), *overrides)
    assert result.returncode == 0, result.stderr
    shutil.copytree(uninterrupted, resumed)
    remove_checkpoints_after(resumed, 2)
    result = train_alone(recipe, "--run-dir", str(resumed), *overrides)
    assert result.returncode == 0, result.stderr
    assert "at step 2" in result.stderr
    assert skipped(uninterrupted) == skipped(resumed)
    assert_metrics_close(metrics(uninterrupted), metrics(resumed), 0)
    assert tensor_bytes(uninterrupted) == tensor_bytes(resumed)


@pytest.mark.slow
def test_a_run_that_an_unreadable_sample_ended_resumes_with_skip(root, recipe, tmp_path):
    place = make_unreadable(root, "train", sample_at(root, 40))
    overrides = ("data.verify=false", "checkpoint.every=1")
    result = train_alone(recipe, "--run-dir", str(tmp_path / "run"), *overrides)
    assert result.returncode == 2
    assert re.search(f"^error: .*{place}", result.stderr, re.MULTILINE)
    result = train_alone(recipe, "--run-dir", str(tmp_path / "run"), *overrides, "data.on_error=skip")
    assert result.returncode == 0, result.stderr
    assert [(r["step"], r["position"]) for r in skipped(tmp_path / "run")] == [(4, 40)]
    assert metrics(tmp_path / "run")[-1]["train/skipped_samples"] == 1


def test_reconstructions_show_the_first_readable_images(root, make_recipe, make_runtime):
    """Shards of 10 and 3 images, and batches of 4: of the first batch with something left, 10 and 11 are left."""
    (root / "test-000000.tar").unlink()
    recipe = make_recipe(f"data.root={root}", "data.on_error=skip")
    data = RunData(recipe, make_runtime())
    expected = TarShards(root, "test").images([10, 11]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(data.held_out_inputs(4)[0].numpy(), expected, rtol=1e-6)
    (root / "test-000001.tar").unlink()
    with pytest.raises(UnreadableShard, match=r"no sample can be read; the last problem: .*test-000001\.tar"):
        RunData(recipe, make_runtime()).held_out_inputs(4)
