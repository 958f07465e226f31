"""A shard that one process cannot read: all processes end with one message, or all go on without the sample."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.data.order import Order
from pipeline.data.shards import TarShards, UnreadableShard
from pipeline.run.data import Data
from tests.conftest import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.scripts.test_train import ROOT, close, launch, metrics, plain, run

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
BATCH = 12
SEED = 1


@pytest.fixture
def root(tmp_path) -> Path:
    return write_set(
        tmp_path / "data", {"train": random_samples(41, 16, 16), "test": random_samples(13, 16, 16)}, [10, 7]
    )


@pytest.fixture
def recipe(root, tmp_path) -> Path:
    settings = tiny_settings(root)
    settings["train"] |= {"batch_size": BATCH, "seed": SEED, "steps": 4}
    settings["tracking"] |= {"log_every": 1}
    settings["validation"] |= {"every": 2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def spoil(root: Path, split: str, index: int) -> str:
    """Damage the .npy header of a sample; what an error must say of its place."""
    shards = TarShards(root, split)
    starts = np.cumsum((0, *shards.shard_sizes))
    number = int(np.searchsorted(starts, index, side="right")) - 1
    name = f"{split}-{number:06d}"
    offset = int(np.load(root / f"{name}.index.npy")["offset"][index - starts[number]])
    with (root / f"{name}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    return rf"{name}\.tar: sample '{split}-s{index:05d}' at offset {offset}: not the \.npy that it should be"


def drawn_at(root: Path, position: int) -> int:
    shards = TarShards(root, "train")
    return int(Order(shards.shard_sizes, SEED, window=32).at([position])[1][0])


def skipped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped_samples.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ all stop alike

TELL = """
import os, sys
from pathlib import Path
from pipeline import train
def fail(error, code, fail=train.fail):
    (Path(os.environ["TOLD"]) / os.environ["RANK"]).write_text(f"{code} {type(error).__name__} {error}")
    return fail(error, code)
train.fail = fail
sys.exit(train.main())
"""


def assert_all_stop(recipe: Path, place: str, *words: str) -> None:
    """Both processes end with one error, which names the place, and the launcher's output tells it once."""
    folder = recipe.parent
    (folder / "told").mkdir()
    (folder / "tell.py").write_text(TELL)
    config = ["--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml"), "--main_process_port", "0"]
    command = [*LAUNCH, *config, str(folder / "tell.py"), "--config", str(recipe), "--run-dir", str(folder / "run")]
    result = run(*command, *words, TOLD=str(folder / "told"), PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    told = [(folder / "told" / rank).read_text() for rank in "01"]
    assert told[0] == told[1]
    assert re.search(rf"^2 UnreadableShard .*{place}", told[0])
    assert result.stderr.count(told[0].removeprefix("2 UnreadableShard ")) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_that_the_second_process_meets_ends_both(root, recipe, tmp_path, workers):
    """In step 1, which has positions 12 to 23; the second process has 18 to 23. The checkpoint of step 1 is whole."""
    place = spoil(root, "train", drawn_at(root, 21))
    assert_all_stop(recipe, place, f"data.workers={workers}", "data.verify=false", "checkpoint.every=1")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000001"]


def test_damage_met_in_validation_ends_both(root, recipe, tmp_path):
    place = spoil(root, "test", 11)
    assert_all_stop(recipe, place, "data.verify=false")
    assert not any("val/elbo" in record for record in metrics(tmp_path / "run"))


def test_a_vanished_shard_ends_both(root, recipe):
    """Both meet it in the same step, each with a sample of its own: the first one's is told."""
    (root / "train-000002.tar").unlink()
    assert_all_stop(recipe, r"train-000002\.tar: sample 'train-s000\d\d' at offset \d+: No such file or directory")


# ------------------------------------------------------------------------------------------------------ all go on alike


@pytest.fixture
def spoiled(root) -> dict[str, set[int]]:
    """A sample of each process's share, the first of a shard, and two for validation; by split."""
    indices = {"train": {drawn_at(root, 14), drawn_at(root, 21), 10}, "test": {0, 12}}
    for split, numbers in indices.items():
        for index in numbers:
            spoil(root, split, index)
    return indices


def test_one_and_two_processes_leave_out_the_same_samples(root, recipe, spoiled, tmp_path):
    """Losses, keys, list and counts are those of one process, in float64 over an epoch's end, with micro-batches."""
    words = ("train.precision=fp64", "data.trace=true", "data.on_error=skip", "train.micro_batch=4", "train.steps=7")
    for processes in (1, 2):
        result = launch(processes, recipe, "--run-dir", str(tmp_path / str(processes)), *words)
        assert result.returncode == 0, result.stderr
    one, two = tmp_path / "1", tmp_path / "2"
    close(metrics(one), metrics(two), 1e-10)
    assert (one / "data_trace.jsonl").read_text() == (two / "data_trace.jsonl").read_text()
    assert skipped(one) == skipped(two)
    assert {split: {r["index"] for r in skipped(one) if r["split"] == split} for split in spoiled} == spoiled
    check_figures(one, spoiled)


def check_figures(folder: Path, spoiled: dict[str, set[int]]) -> None:
    """Counts are of draws, the list of samples; what took their places is what the trace tells."""
    records = metrics(folder)
    trace = [json.loads(line) for line in (folder / "data_trace.jsonl").read_text().splitlines()]
    keys = {position: key for line in trace for position, key in zip(line["positions"], line["keys"], strict=True)}
    drawn = Order([10, 7, 7, 7, 7, 3], SEED, window=32).at(range(7 * BATCH))[1].tolist()
    assert records[-1]["train/skipped_samples"] == sum(index in spoiled["train"] for index in drawn) > 3
    assert [r["val/skipped_samples"] for r in records if "val/elbo" in r] == [2.0] * 4
    assert all(np.isfinite(r["val/elbo"]) for r in records if "val/elbo" in r)
    for position, index in enumerate(drawn):
        assert (keys[position] == f"train-s{index:05d}") == (index not in spoiled["train"])
    for entry in skipped(folder):
        if entry["split"] == "train":
            assert keys[entry["position"]] == f"train-s{entry['replaced_by']:05d}"
            assert drawn[entry["position"]] == entry["index"]
        assert f"{entry['split']}-s{entry['index']:05d}' at offset" in entry["problem"]


def test_resuming_neither_repeats_nor_forgets(root, recipe, spoiled, tmp_path):
    """As if killed after step 2's checkpoint: list, count and weights are those of a run that was not."""
    words = ("data.on_error=skip", "checkpoint.keep=null")
    for folder in ("straight", "parts"):
        result = plain(recipe, "--run-dir", str(tmp_path / folder), *words)
        assert result.returncode == 0, result.stderr
    for file in (tmp_path / "parts/checkpoints/step_00000004").iterdir():
        file.unlink()
    (tmp_path / "parts/checkpoints/step_00000004").rmdir()
    result = plain(recipe, "--run-dir", str(tmp_path / "parts"), *words)
    assert result.returncode == 0, result.stderr
    assert "at step 2" in result.stderr
    assert skipped(tmp_path / "straight") == skipped(tmp_path / "parts")
    close(metrics(tmp_path / "straight"), metrics(tmp_path / "parts"), 0)
    for stem in ("model", "optimizer"):
        file = f"checkpoints/step_00000004/{stem}.safetensors"
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_a_run_that_damage_stopped_goes_on_with_skip(root, recipe, tmp_path):
    place = spoil(root, "train", drawn_at(root, 40))
    words = ("data.verify=false", "checkpoint.every=1")
    result = plain(recipe, "--run-dir", str(tmp_path / "run"), *words)
    assert result.returncode == 2
    assert re.search(f"^error: .*{place}", result.stderr, re.MULTILINE)
    result = plain(recipe, "--run-dir", str(tmp_path / "run"), *words, "data.on_error=skip")
    assert result.returncode == 0, result.stderr
    assert [(r["step"], r["position"]) for r in skipped(tmp_path / "run")] == [(4, 40)]
    assert metrics(tmp_path / "run")[-1]["train/skipped_samples"] == 1


def test_pictures_are_drawn_of_the_first_images_that_can_be_read(root, make_recipe, make_runtime):
    """Shards of 10 and 3 images, and batches of 4: of the first batch with something left, 10 and 11 are left."""
    (root / "test-000000.tar").unlink()
    recipe = make_recipe(f"data.root={root}", "data.on_error=skip")
    data = Data(recipe, make_runtime())
    expected = TarShards(root, "test").images([10, 11]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(data.held_out_inputs(4)[0].numpy(), expected, rtol=1e-6)
    (root / "test-000001.tar").unlink()
    with pytest.raises(UnreadableShard, match=r"no sample can be read; the last problem: .*test-000001\.tar"):
        Data(recipe, make_runtime()).held_out_inputs(4)
