"""convert.py: a file of the release becomes a folder that all tools take, and the reverse; errors leave nothing."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline
from pipeline import convert, evaluate, export
from pipeline.inference import export_run
from pipeline.models.noise import draw_noise
from tests.helpers import golden
from tests.helpers.command_lines import shown_facts
from tests.helpers.golden import close
from tests.helpers.hostile_pickles import hostile
from tests.helpers.release_files import TINY, release_content, release_state, write_release_file
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.vdvae_files import tiny_state, write_vdvae_file, write_vdvae_recipe
from tests.models import nvae_restatement as restatement


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_release_file(tmp_path_factory.mktemp("release") / "mnist.pt")


@pytest.fixture(scope="module")
def folder(file) -> Path:
    assert convert.main(["--from", "nvlabs", str(file), "--out", str(file.parent / "model")]) == 0
    return file.parent / "model"


def refused(capsys, *arguments: str) -> str:
    """The message of a command that ends with code 2: one line."""
    assert convert.main(list(arguments)) == 2
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1, text
    return text


def test_what_is_converted_and_what_was_written_is_said(file, folder, tmp_path, capsys):
    model, pickled = str(tmp_path / "model"), str(tmp_path / "x.pt")
    for words, what, origin in (
        (["--from", "nvlabs", str(file), "--out", model], "model folder", "reads"),
        (["--to", "nvlabs", str(folder), "--out", pickled], "nvlabs checkpoint", "model"),
    ):
        assert convert.main(words) == 0
        title, *lines = capsys.readouterr().err.splitlines()
        assert title == f"{what} of nvae at step 153"
        facts = shown_facts(lines)
        assert facts[origin][0].split(",")[0] == words[2]
        assert facts["writes"] == [words[-1]]
        assert lines[-1].startswith(f"written to {words[-1]}")


def test_the_card_states_license_and_origin(folder):
    card = (folder / "README.md").read_text()
    front = card.split("---")[1]
    for line in ("license: other", "license_name: nvlabs-nvae-non-commercial", "license_link: https://github.com/NV"):
        assert line in front
    assert "non-commercial use only" in card
    assert "mnist.pt" in card
    assert set(os.listdir(folder)) == {"README.md", "config.yaml", "meta.json", "model.safetensors"}


def test_the_folder_is_measured_by_the_release_s_protocol(folder, tmp_path, make_runtime):
    """Black and white pixels stay as they are under dynamic binarization; the padding is not counted."""
    samples = {name: random_samples(5, 28, 28, 1, seed=len(name)) for name in ("train", "test")}
    samples = {name: replace(split, images=split.images // 128 * np.uint8(255)) for name, split in samples.items()}
    write_set(tmp_path / "set", samples, [5])
    out = tmp_path / "report.json"
    words = [str(folder), "--data", str(tmp_path / "set"), "--precision", "fp64", "--out", str(out)]
    evaluate.evaluate(evaluate.build_request(evaluate.build_parser().parse_args(words)), make_runtime("fp64"))
    found = json.loads(out.read_text())["figures"]

    x = torch.from_numpy(samples["test"].images).permute(0, 3, 1, 2).double() / 255
    groups = pipeline.load(folder).model.groups
    noise = draw_noise(groups, TINY["seed"], "validate/0", range(5), torch.device("cpu"), torch.float64)
    net = restatement.Net(TINY, golden.double(release_state(TINY)), False)
    expected = restatement.forward(net, torch.nn.functional.pad(x, [2] * 4), noise)["nelbo"].mean()
    close(-found["elbo"], float(expected))
    close(found["bpd"], float(expected) / 784 / np.log(2))


def test_the_folder_is_loaded_and_sampled(folder):
    model = pipeline.load(folder)
    assert model.step == 153
    images = model.sample(3, temperature=0.7, seed=1)
    assert images.shape == (3, 1, 28, 28)
    assert 0 <= images.min() < images.max() <= 1


def test_there_and_back_through_the_command(file, folder, tmp_path):
    assert convert.main(["--to", "nvlabs", str(folder), "--out", str(tmp_path / "new" / "x.pt")]) == 0
    assert convert.main(["--from", "nvlabs", str(tmp_path / "new" / "x.pt"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again/config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()


def test_batch_norm_for_a_temperature_is_saved_with_the_folder(file, folder, tmp_path):
    words = ["--readjust", "2", "--temperature", "0.6", "--batch-size", "3", "--seed", "4"]
    for name in ("one", "two"):
        assert convert.main(["--from", "nvlabs", str(file), "--out", str(tmp_path / name), *words]) == 0
    one, two, plain = (pipeline.load(path).model.state_dict() for path in (tmp_path / "one", tmp_path / "two", folder))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {name.split(".")[0] for name in one if not torch.equal(one[name], plain[name])} == {"decoder", "postprocess"}
    facts = pipeline.load(tmp_path / "one").facts["readjusted"]
    assert facts == {"iterations": 2, "temperature": 0.6, "batch_size": 3, "seed": 4}
    line = "samples at temperature `0.6` (`2` batches of `3`, seed `4`)"
    assert line in (tmp_path / "one" / "README.md").read_text()
    assert "Batch norm" not in (folder / "README.md").read_text()


def test_a_folder_that_is_exported_again_keeps_license_and_statistics(folder, tmp_path, monkeypatch):
    """export.py re-estimates in the same manner as convert.py, and its picture is of that temperature. The figures of
    the weights before are not those of the new ones."""
    monkeypatch.setattr(export_run, "reports_of", lambda *_: {"of_the_weights_before.json": {"figures": {"bpd": 1.0}}})
    words = ["--readjust", "2", "--temperature", "0.6", "--batch-size", "3", "--seed", "4"]
    assert export.main([str(folder), "--out", str(tmp_path / "one"), "--picture", "yes", *words]) == 0
    assert export.main([str(tmp_path / "one"), "--out", str(tmp_path / "two"), "--picture", "no"]) == 0
    assert (
        convert.main(["--from", "nvlabs", str(folder.parent / "mnist.pt"), "--out", str(tmp_path / "x"), *words]) == 0
    )
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "x")}
    assert weights["one"] == weights["two"] == weights["x"]
    for name in ("one", "two"):
        card = (tmp_path / name / "README.md").read_text()
        assert "license_name: nvlabs-nvae-non-commercial" in card
        assert "samples at temperature `0.6`" in card
    card = (tmp_path / "one" / "README.md").read_text()
    assert "Samples of the prior at temperature 0.6" in card
    assert "No evaluation of these weights was at hand." in card


def test_the_license_of_a_release_cannot_be_replaced(folder, tmp_path, capsys):
    assert export.main([str(folder), "--out", str(tmp_path / "new"), "--license", "mit"]) == 2
    assert "the weights have a license already, nvlabs-nvae-non-commercial" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_export_readjusts_only_what_it_writes(folder, capsys):
    words = ["--push", "alice/faces", "--readjust", "2", "--temperature", "0.6"]
    assert export.main([str(folder), *words]) == 2
    assert "--readjust: applies to a model folder that is written" in capsys.readouterr().err


HOSTILE = ("runs a command in the options", "allocates by a function that torch allows", "a pickle", "truncated")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_is_left(case, tmp_path, capsys):
    data, message = hostile(tmp_path / "it_ran")[case]
    (tmp_path / "x.pt").write_bytes(data)
    assert message in refused(capsys, "--from", "nvlabs", str(tmp_path / "x.pt"), "--out", str(tmp_path / "model"))
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_file_that_is_no_checkpoint_of_the_release_leaves_nothing(tmp_path, capsys):
    content = release_content()
    content["state_dict"]["more.weight"] = torch.zeros(2)
    write_release_file(tmp_path / "x.pt", content)
    message = refused(capsys, "--from", "nvlabs", str(tmp_path / "x.pt"), "--out", str(tmp_path / "model"))
    assert "'more.weight' is unknown" in message
    assert os.listdir(tmp_path) == ["x.pt"]
    assert "No such file" in refused(capsys, "--from", "nvlabs", str(tmp_path / "y.pt"), "--out", str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--readjust", "5"], "--temperature T"),
        (["--temperature", "0.7"], "--temperature: applies to --readjust N"),
        (["--readjust", "0", "--temperature", "0.7"], "--readjust 0: must be at least 1"),
        (["--readjust", "1", "--temperature", "nan"], "--temperature nan"),
        (["--readjust", "1", "--temperature", "1", "--batch-size", "1"], "--batch-size 1"),
        (["--readjust", "1", "--temperature", "1", "--seed", "-1"], "--seed -1"),
        (["--weights", "last"], "apply to --to"),
        (["--device", "cpu"], "--device: applies to --readjust N"),
    ],
)
def test_arguments_out_of_range(words, message, file, tmp_path, capsys):
    assert message in refused(capsys, "--from", "nvlabs", str(file), "--out", str(tmp_path / "model"), *words)
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(file, folder, capsys):
    before = (folder / "meta.json").read_bytes(), file.read_bytes()
    assert "is not empty" in refused(capsys, "--from", "nvlabs", str(file), "--out", str(folder))
    assert "is there" in refused(capsys, "--to", "nvlabs", str(folder), "--out", str(file))
    assert ((folder / "meta.json").read_bytes(), file.read_bytes()) == before


# ---- VDVAE


@pytest.fixture(scope="module")
def vdvae(tmp_path_factory) -> tuple[str, str]:
    """A file of VDVAE's release, and its recipe."""
    root = tmp_path_factory.mktemp("vdvae")
    return str(write_vdvae_file(root / "x.th", prefix="module.")), str(write_vdvae_recipe(root / "tiny.yaml"))


def test_a_file_of_vdvae_becomes_a_folder_and_the_reverse(vdvae, tmp_path, capsys):
    file, recipe = vdvae
    out = str(tmp_path / "model")
    assert convert.main(["--from", "openai-vdvae", file, "--recipe", recipe, "--out", out]) == 0
    model = pipeline.load(out)
    assert model.sample(2, temperature=0.7, seed=1).shape == (2, 3, 16, 16)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Child 2020" in card
    assert "An unknown number of optimizer steps" in card
    assert "None is stated." in card
    assert convert.main(["--to", "openai-vdvae", out, "--out", str(tmp_path / "y.th")]) == 0
    expected, written = tiny_state(), torch.load(tmp_path / "y.th", weights_only=True)
    assert list(written) == list(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_of_vdvae_is_refused_and_nothing_is_left(case, vdvae, tmp_path, capsys):
    data, message = hostile(tmp_path / "it_ran")[case]
    path = tmp_path / "x.th"
    path.write_bytes(data)
    words = ["--from", "openai-vdvae", str(path), "--recipe", vdvae[1], "--out", str(tmp_path / "model")]
    assert message in refused(capsys, *words)
    assert os.listdir(tmp_path) == ["x.th"]


def test_a_file_of_the_other_release_is_refused(vdvae, file, tmp_path, capsys):
    out = ["--out", str(tmp_path / "model")]
    assert "--from nvlabs" in refused(capsys, "--from", "openai-vdvae", str(file), "--recipe", vdvae[1], *out)
    assert "not a checkpoint of the release" in refused(capsys, "--from", "nvlabs", vdvae[0], *out)
    assert "--recipe: applies to" in refused(capsys, "--from", "nvlabs", str(file), "--recipe", vdvae[1], *out)
    assert os.listdir(tmp_path) == []
