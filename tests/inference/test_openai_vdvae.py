"""Files of VDVAE's reference release: read as a model, written from one, and nothing lost on the way."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.config import build
from pipeline.data.preprocess import to_model_input
from pipeline.inference import openai_vdvae
from pipeline.inference.model_folder import ModelContent, write_model_folder
from pipeline.inference.openai_vdvae import read_release, release_options, write_release
from pipeline.models.vdvae_conversion import config_from_reference, state_dict_to_reference
from pipeline.recipe import Recipe, build_model
from pipeline.storage.checkpoint_folder import Checkpoint, read_folder
from tests.helpers.golden import close, noise
from tests.helpers.release_files import release_content
from tests.helpers.trained_runs import make_run
from tests.helpers.vdvae_cases import VDVAECase, golden_file
from tests.helpers.vdvae_files import (
    tiny_shapes,
    tiny_state,
    tiny_vdvae_settings,
    write_vdvae_file,
    write_vdvae_recipe,
)


@pytest.fixture
def recipe(tmp_path) -> str:
    return str(write_vdvae_recipe(tmp_path / "tiny.yaml"))


def as_folder(content: ModelContent, path: Path) -> Checkpoint:
    write_model_folder(path, content, "card")
    return read_folder(path)


def same_tensors(one: dict, other: dict) -> bool:
    equal = (one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)
    return list(one) == list(other) and all(equal)


# ---- there and back


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("path", [golden_file("vdvae_small"), golden_file("vdvae_deep")])
@torch.no_grad()
def test_weights_of_the_release_both_ways(path, prefix, tmp_path):
    """Its numbers to 1e-9, also through a model folder and the file that is written of it, which has its tensors."""
    case = VDVAECase(path)
    size, expected = case.args["image_size"], case.file["eval_eps"]
    write_vdvae_file(tmp_path / "x.th", case.file["state_dict"], prefix)
    settings = {"model": config_from_reference(case.args).model_dump(mode="json"), "data": {"size": size}}
    recipe = str(write_vdvae_recipe(tmp_path / "its.yaml", **settings))
    folder = as_folder(read_release(tmp_path / "x.th", recipe), tmp_path / "model")
    write_release(tmp_path / "again.th", folder)
    for name in ("x.th", "again.th"):
        content = read_release(tmp_path / name, recipe)
        model = build_model(content.recipe)
        model.load_state_dict(content.weights)
        out = model.double().eval()(to_model_input(case.file["x_uint8"], 8, torch.float64), noise(case.file))
        close(-out.log_px, expected["recon"])
        close(out.kl.T, expected["kl_all"])
        close(out.log_qz, expected["log_q"])
        close(out.log_pz, expected["log_p"])
        close(-out.elbo, expected["nelbo"])
    written = torch.load(tmp_path / "again.th", weights_only=True)
    assert same_tensors(case.file["state_dict"], written)
    described = release_options(content.recipe)
    assert described == {name: case.args[name] for name in described}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_there_and_back_is_the_identity(prefix, recipe, tmp_path):
    assert list(tiny_shapes().values())[:2] == [(6, 3, 3, 3), (6,)]
    first = as_folder(read_release(write_vdvae_file(tmp_path / "x.th", prefix=prefix), recipe), tmp_path / "first")
    write_release(tmp_path / "new" / "y.th", first)
    assert same_tensors(tiny_state(), torch.load(tmp_path / "new" / "y.th", weights_only=True))
    second = as_folder(read_release(tmp_path / "new" / "y.th", recipe), tmp_path / "second")
    assert second.sha256 == first.sha256
    assert second.facts["settings"] == first.facts["settings"]
    assert (first.step, first.facts["source"]["kind"], first.facts["source"]["file"]) == (0, "openai-vdvae", "x.th")


def test_a_published_model_is_recognized_by_its_tensors(recipe, tmp_path, monkeypatch):
    """What differs between the recipe and the release is set."""
    other = str(write_vdvae_recipe(tmp_path / "other.yaml", model={"widths": ""}))
    monkeypatch.setattr(openai_vdvae, "PUBLISHED", {other: [], recipe: ["model.pixel_mean=99"]})
    found = read_release(write_vdvae_file(tmp_path / "x.th"))
    assert (found.recipe.model.widths, found.recipe.model.pixel_mean) == ("2:10", 99)
    monkeypatch.setattr(openai_vdvae, "PUBLISHED", {other: []})
    with pytest.raises(ValueError, match=r"x.th: its 212 tensors are not those of .*other.yaml; name the recipe"):
        read_release(tmp_path / "x.th")


def test_a_recipe_of_another_model_is_refused(tmp_path):
    path = write_vdvae_file(tmp_path / "x.th")
    with pytest.raises(ValueError, match="--recipe nvae_cifar10: model.name=nvae; give a recipe of VDVAE"):
        read_release(path, "nvae_cifar10")
    with pytest.raises(ValueError, match="there is no such recipe; did you mean"):
        read_release(path, "vdvae_cifar100")


# ---- files that cannot be used


def with_state(**changes: object) -> dict:
    return tiny_state() | {name.replace("__", "."): value for name, value in changes.items()}


def without(name: str) -> dict:
    return {key: tensor for key, tensor in tiny_state().items() if key != name}


STEM, GAIN = torch.zeros(6, 3, 3, 3), torch.zeros(1, 6, 1, 1)
UNUSABLE = {
    "list": (lambda: [1, 2], "holds a list, not a state dict"),
    "nothing": (dict, "holds nothing, not a state dict"),
    "NVAE's": (release_content, "a checkpoint of NVAE's release; read it with --from nvlabs"),
    "an optimizer's": (lambda: {"state": {}, "param_groups": []}, "holds the state of an optimizer"),
    "other keys": (lambda: with_state(extra__weight=STEM), "'extra.weight' is unknown"),
    "missing key": (lambda: without("decoder.bias_xs.1"), "'decoder.bias_xs.1' is missing"),
    "one prefix": (lambda: with_state(module__decoder__gain=GAIN), "'module.decoder.gain' is unknown"),
    "other shape": (lambda: with_state(decoder__gain=GAIN[:, :4]), "'decoder.gain' has shape (1, 4, 1, 1)"),
    "other dtype": (lambda: with_state(decoder__gain=GAIN.long()), "'decoder.gain' has dtype int64"),
    "other precision": (lambda: with_state(decoder__gain=GAIN.half()), "it names torch HalfStorage"),
    "not finite": (lambda: with_state(decoder__gain=GAIN / 0), "'decoder.gain' has non-finite values"),
    "expanded": (
        lambda: with_state(decoder__gain=torch.zeros(1).expand(2**40)),
        "'decoder.gain' has more elements than the file holds",
    ),
    "no tensor": (lambda: with_state(decoder__gain=[1.0]), "'decoder.gain' is not a tensor"),
    "names": (lambda: {**tiny_state(), 7: GAIN}, "names that are not text"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(case, recipe, tmp_path):
    make, message = UNUSABLE[case]
    path = tmp_path / "x.th"
    torch.save(make(), path)
    with pytest.raises(ValueError) as caught:
        read_release(path, recipe)
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < 2200


# ---- from runs of ours


def run_checkpoint(folder: Path, **sections: dict) -> Checkpoint:
    make_run(folder, tiny_vdvae_settings(**sections))
    return read_folder(folder / "checkpoints" / "step_00000007")


@pytest.mark.parametrize("kept", ["average", "last"])
def test_a_run_with_a_moving_average_needs_a_choice(kept, recipe, tmp_path):
    checkpoint = run_checkpoint(tmp_path / "run", train={"ema_decay": 0.9})
    with pytest.raises(ValueError, match=r"train.ema_decay.*--weights average or --weights last"):
        write_release(tmp_path / "x.th", checkpoint)
    write_release(tmp_path / "x.th", checkpoint, kept)
    stem = {"average": "ema", "last": "model"}[kept]
    assert {name: tuple(tensor.shape) for name, tensor in torch.load(tmp_path / "x.th").items()} == tiny_shapes()
    found, expected = read_release(tmp_path / "x.th", recipe).weights, checkpoint.tensors[stem]
    assert same_tensors(found, {name: expected[name] for name in found})


def test_the_options_that_the_file_does_not_state_are_printed(tmp_path, caplog):
    caplog.set_level("INFO", logger="pipeline")
    write_release(tmp_path / "x.th", run_checkpoint(tmp_path / "run"))
    assert (
        "--dataset cifar10 --enc_blocks 16x2,16d2,8x1,8d4,2x1 --dec_blocks 2x1,8m2,8x1,16m8,16x2 --width 6 "
        "--custom_width_str 2:10 --bottleneck_multiple 0.5 --zdim 2 --no_bias_above 8 --num_mixtures 2"
    ) in caplog.text


MIXTURE = {"name": "logistic_mixture", "num_components": 2}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"bits": 5}}, r"data.bits=5 \(it has 8\)"),
        ({"data": {"size": 12, "pad": 2}}, r"data.pad=2 \(it has 0\)"),
        ({"train": {"precision": "fp64"}}, "train.precision=fp64"),
        ({"condition": {"name": "class", "num_classes": 3}}, "condition.name=class"),
        ({"model": {"likelihood": {"name": "normal", "sigma": 0.5}}}, "model.likelihood.name=normal"),
        ({"model": {"pixel_mean": 127.5}}, r"model.pixel_mean=127.5, .* 120.638 and 64.1674 \(cifar10\)"),
        (
            {"model": {"likelihood": MIXTURE | {"bin_rule": "vdvae_overlapping_5_bit"}}},
            r"bin_rule=vdvae_overlapping_5_bit \(it has vdvae\) with images like those of its data set cifar10",
        ),
        (
            {"model": {"likelihood": MIXTURE | {"bin_rule": "vdvae", "scale": "softplus"}}},
            r"model.likelihood.scale=softplus \(it has exp\)",
        ),
        (
            {"model": {"likelihood": MIXTURE | {"bin_rule": "vdvae", "min_log_scale": -5.0}}},
            r"model.likelihood.min_log_scale=-5.0 \(it has -7.0\)",
        ),
    ],
)
def test_what_the_release_has_no_option_for_is_refused_by_name(sections, message, tmp_path):
    checkpoint = run_checkpoint(tmp_path / "run", **sections)
    with pytest.raises(ValueError, match=f"cannot be written in the release's format: .*{message}"):
        write_release(tmp_path / "x.th", checkpoint)
    assert os.listdir(tmp_path) == ["run"]


def test_another_model_is_refused_by_name(tmp_path):
    settings = tiny_vdvae_settings() | {"model": {"name": "mlp_vae", "hidden": 8, "latent_size": 2}}
    make_run(tmp_path / "run", settings)
    with pytest.raises(ValueError, match="model.name=mlp_vae; it has only VDVAE"):
        write_release(tmp_path / "x.th", read_folder(tmp_path / "run" / "checkpoints" / "step_00000007"))


def test_an_exact_rule_is_written_as_the_release_s_own(tmp_path):
    """At 8 bits they differ in improbable bins only. The shapes are the table's, the names in its order."""
    recipe = build(Recipe, tiny_vdvae_settings(model={"likelihood": MIXTURE | {"bin_rule": "exact"}}))
    assert release_options(recipe)["dataset"] == "cifar10"
    written = state_dict_to_reference(build_model(recipe).state_dict())
    assert [(name, tuple(tensor.shape)) for name, tensor in written.items()] == list(tiny_shapes().items())
