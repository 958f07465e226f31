"""Run folders prepared by someone else: a message and exit code 2, or a correct result; nothing written outside."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline import edit, evaluate, sample
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import STEP, make_judge, make_run

PARAMETER = "decoder_start"
CHECKPOINT = f"checkpoints/step_{STEP:08d}"


@pytest.fixture(scope="module")
def honest(shards, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("honest") / "run", tiny_settings(shards))


@pytest.fixture
def use(make_runtime, capfd) -> Callable[..., str]:
    """(run) -> what evaluate.py and sample.py print of it; both end with the same exit code."""

    def call(run: Path, code: int = 2) -> str:
        make_runtime()
        codes = [evaluate.main([str(run), "--threads", "1", "--images", "1"]), sample.main([str(run), "--count", "1"])]
        printed = capfd.readouterr().err
        assert codes == [code, code], printed
        assert "Traceback" not in printed
        if code:
            assert printed.count("error: ") == 2
            assert len(printed.splitlines()) <= 14
        return printed

    return call


def forge(honest: Path, folder: Path, facts: dict | None = None, ema: dict | None = None, settings=None) -> Path:
    """A checkpoint with valid hashes whose facts or averaged weights are others."""
    found = Checkpoints(honest / "checkpoints").latest()
    forged = json.loads(json.dumps(found.facts)) | (facts or {})
    for path, value in (settings or {}).items():
        section, _, key = path.partition(".")
        forged["settings"][section][key] = value
    tensors = found.tensors | {"ema": {**found.tensors["ema"], **(ema or {})}}
    folder.mkdir(exist_ok=True)
    Checkpoints(folder / "checkpoints").save(STEP, tensors, forged)
    return folder


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


SETTINGS = {
    "a list": ({"facts": {"settings": [1]}}, "holds no model with its settings"),
    "a text": ({"facts": {"settings": "x"}}, "holds no model with its settings"),
    "nothing": ({"facts": {"settings": None}}, "holds no model with its settings"),
    "nested": ({"facts": {"settings": {"model": nested(200)}}}, "its settings are not those of this version"),
    "wide": ({"settings": {"model.encoder_channels": 2**62}}, "its settings"),
    "wider": ({"settings": {"model.encoder_channels": 10**40}}, "its settings"),
    "large images": ({"settings": {"data.size": 2**40}}, "its settings"),
    "other images": ({"settings": {"data.size": 32}}, "does not fit"),
    "other widths": ({"settings": {"model.encoder_channels": 64}}, "does not fit"),
    "many groups": ({"settings": {"model.groups_per_scale": [10**9]}}, "its settings"),
    "many scales": ({"settings": {"model.groups_per_scale": [1] * 500}}, "its settings"),
    "many blocks": ({"settings": {"model.num_blocks": 10**9}}, "its settings"),
    "many classes": ({"facts": {}, "settings": {}, "classes": 10**12}, ""),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_forged_settings_are_refused_before_memory_is_allocated(honest, tmp_path, use, what):
    case, message = SETTINGS[what]
    changes = dict(case)
    classes = changes.pop("classes", None)
    if classes:
        settings = tiny_settings("nowhere") | {"condition": {"name": "class", "num_classes": classes}}
        changes["facts"] = {"settings": settings}
    assert message in use(forge(honest, tmp_path / "run", **changes))


def weights(honest: Path) -> tuple[str, torch.Tensor]:
    """The name and the values of a parameter. A safetensors file lists its tensors in changing order."""
    tensors = Checkpoints(honest / "checkpoints").latest().tensors["ema"]
    return next(item for item in tensors.items() if item[1].is_floating_point())


WEIGHTS = {
    "another shape": (lambda tensor: torch.zeros(3), "has shape (3,) instead of"),
    "another dtype": (lambda tensor: tensor.double(), "has dtype float64 instead of float32"),
    "NaN": (lambda tensor: torch.full_like(tensor, torch.nan), "has non-finite values"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_forged_weights_are_refused_by_name(honest, tmp_path, use, what):
    change, message = WEIGHTS[what]
    name, tensor = weights(honest)
    printed = use(forge(honest, tmp_path / "run", ema={name: change(tensor)}))
    assert f"'{name}' {message}" in printed
    assert CHECKPOINT in printed


def test_unknown_weights_are_refused(honest, tmp_path, use):
    assert "'extra' is unknown" in use(forge(honest, tmp_path / "run", ema={"extra": torch.zeros(1)}))


META = {
    "nested": b"[" * 100_000,
    "huge": b" " * (5 * 2**20),
    "a list": b"[]",
    "digits": b'{"sha256": ' + b"9" * 5000 + b"}",
    "infinite": b'{"sha256": 1e999, "step": 1e999}',
    "empty": b"",
}


@pytest.mark.parametrize("what", META)
def test_a_forged_meta_json_is_refused(honest, tmp_path, use, what):
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    (run / CHECKPOINT / "meta.json").write_bytes(META[what])
    assert f"{CHECKPOINT}/meta.json" in use(run)


def test_links_and_pipes_among_the_files_of_a_checkpoint_are_refused(honest, tmp_path, use):
    for name in ("meta.json", "ema.safetensors"):
        run = tmp_path / name
        shutil.copytree(honest, run)
        (run / CHECKPOINT / name).rename(tmp_path / "real")
        (run / CHECKPOINT / name).symlink_to(tmp_path / "real")
        assert "is a symbolic link, which is refused" in use(run)
        (run / CHECKPOINT / name).unlink()
        os.mkfifo(run / CHECKPOINT / name)
        assert "not a regular file" in use(run)


@pytest.mark.parametrize("name", ["a classifier", "a file", "an empty folder", "no checkpoints", "a shard set"])
def test_what_is_no_run_is_named(shards, tmp_path, use, name):
    place = tmp_path / "it"
    made = {
        "a classifier": (lambda: make_judge(place, "classes", ["a", "b"]), "holds no model with its settings"),
        "a file": (lambda: place.write_text("x"), "a file, not a run folder"),
        "an empty folder": (lambda: place.mkdir(), "no run with checkpoints there"),
        "no checkpoints": (lambda: (place / "checkpoints").mkdir(parents=True), "no checkpoint there yet"),
        "a shard set": (lambda: shutil.copytree(shards, place), "a shard set, not a run folder"),
    }
    make, message = made[name]
    make()
    assert message in use(place)


def test_a_config_yaml_of_any_content_is_not_read(honest, tmp_path, use):
    """The recipe comes from the checkpoint, which has hashes."""
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['exit 1']")
    use(run, code=0)


def test_class_names_cannot_control_the_terminal(honest, tmp_path):
    settings = tiny_settings("nowhere") | {"condition": {"name": "class", "num_classes": 2}}
    run = make_run(tmp_path / "run", settings, ["\x1b[2Ja", "b"])
    assert pipeline.load(run).classes == ("?[2Ja", "b")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_output_folders_that_are_links_are_refused(honest, shards, tmp_path, use):
    """A run that someone else prepared cannot have files written to places outside of it."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(honest, run)
    outside.mkdir()
    for name in ("evaluations", "samples", "edited"):
        (run / name).symlink_to(outside)
    printed = use(run)
    assert f"{run / 'evaluations'}: is a symbolic link, which is refused" in printed
    assert f"{run / 'samples'}: is a symbolic link, which is refused" in printed
    assert edit.main([str(run), "--data", str(shards), "--key", "0", "1", "--interpolate"]) == 2
    assert everything(outside) == set()


def test_links_in_place_of_outputs_are_replaced_not_followed(honest, tmp_path, use):
    run, target = tmp_path / "run", tmp_path / "target"
    shutil.copytree(honest, run)
    target.write_text("untouched")
    (run / "samples").mkdir()
    name = f"samples_step_{STEP:08d}_temperature_1_seed_0.png"
    (run / "samples" / name).symlink_to(target)
    (run / "samples" / f"{name}.{socket.gethostname()}.partial").symlink_to(target)
    use(run, code=0)
    assert target.read_text() == "untouched"
    assert not (run / "samples" / name).is_symlink()
