"""Figures of binarized images: which binarization they are of, and means over several."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import build, overlay
from pipeline.data.preprocess import Preprocess
from pipeline.data.shards import TarShards
from pipeline.evaluate import main
from pipeline.inference.load_model import load
from pipeline.models.noise import draw_noise
from pipeline.recipe import Recipe
from pipeline.run.data import RunData
from tests.helpers.model_cases import MLP
from tests.helpers.recipes import merged, tiny_settings
from tests.helpers.shard_sets import edit_manifest, random_samples, setting, write_set
from tests.helpers.trained_runs import make_run

COUNT, DRAWS, SEED = 7, 4, 3


def settings(root: Path, binarize: str) -> dict:
    model = dict(MLP) | {"likelihood": {"name": "bernoulli"}}
    sections = {
        "data": {"binarize": binarize, "flip": False},
        "train": {"seed": SEED},
        "regularizers": {"strength": 0.0},
    }
    return merged(tiny_settings(root) | {"model": model}, sections)


@pytest.fixture(scope="module")
def gray(tmp_path_factory) -> Path:
    splits = {"train": random_samples(5, 16, 16), "test": random_samples(COUNT, 16, 16, seed=2)}
    return write_set(tmp_path_factory.mktemp("gray") / "set", splits, [4])


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    """As shard_data marks a binarized set."""
    splits = {"train": random_samples(5, 16, 16), "test": random_samples(COUNT, 16, 16, seed=2)}
    for samples in splits.values():
        samples.images[:] = np.where(samples.images > 127, 255, 0)
    root = write_set(tmp_path_factory.mktemp("binary") / "set", splits, [4])
    edit_manifest(root, setting("transform", value={"binarization": "fixed"}))
    return root


@pytest.fixture
def ask(make_runtime, capfd):
    def call(*words: str | Path) -> tuple[int, str]:
        make_runtime()
        code = main([*map(str, words), "--threads", "1"])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return call


def by_hand(run: Path, root: Path, binarizations: int) -> dict[str, np.ndarray]:
    """ELBO and NLL (R, N), image by image, draw by draw, in float64."""
    model = load(run, dtype=torch.float64).model
    elbos, nlls = np.empty((2, binarizations, COUNT))
    for r in range(binarizations):
        for i in range(COUNT):
            pixels = Preprocess(SEED, binarize="dynamic")(
                TarShards(root, "test").images([i]), np.array([r]), np.array([i])
            )
            x = torch.from_numpy(pixels).double() / 255
            which = f"/binarization {r}" if r else ""
            outs = [
                model(x, draw_noise(model.noise_groups, SEED, f"validate/{d}{which}", [i], dtype=torch.float64))
                for d in range(DRAWS)
            ]
            weights = [float(out.log_px + out.log_pz - out.log_qz) for out in outs]
            top = max(weights)
            nlls[r, i] = -(top + np.log(np.mean(np.exp(np.array(weights) - top))))
            elbos[r, i] = float(outs[0].log_px) - float(outs[0].kl.sum())
    return {"elbo": elbos, "nll": nlls}


@pytest.mark.parametrize("batch_size", ["3", "100"])
def test_means_over_binarizations_and_both_standard_errors(gray, tmp_path, ask, batch_size):
    run = make_run(tmp_path / "run", settings(gray, "dynamic"))
    words = ["--importance-samples", str(DRAWS), "--precision", "fp64", "--batch-size", batch_size]
    code, printed = ask(run, "--binarizations", "3", *words)
    assert code == 0, printed
    assert f"{gray} (binarized at random, seed {SEED})" in printed
    (path,) = (run / "evaluations").iterdir()
    assert "_binarizations_3_" in path.name
    report = json.loads(path.read_text())
    for name, values in by_hand(run, gray, 3).items():
        expected = {
            name: values.mean(),
            f"{name}_se": values.mean(axis=0).std(ddof=1) / np.sqrt(COUNT),
            f"{name}_binarization_se": values.mean(axis=1).std(ddof=1) / np.sqrt(3),
        }
        assert {key: report["figures"][key] for key in expected} == pytest.approx(expected, rel=1e-10)
    assert (report["binarizations"], report["data"]["binarize"], report["data"]["binarization_seed"]) == (
        3,
        "dynamic",
        SEED,
    )
    assert ask("--repeat", path)[0] == 0


def test_one_binarization_is_the_first_of_several(gray, tmp_path, ask):
    run = make_run(tmp_path / "run", settings(gray, "dynamic"))
    ask(run, "--precision", "fp64", "--out", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["elbo"] == pytest.approx(by_hand(run, gray, 1)["elbo"].mean(), rel=1e-10)
    assert not [name for name in figures if "binarization" in name]


@pytest.mark.parametrize("limit", [[], ["--images", "4"]])
def test_the_hash_is_that_of_the_evaluated_pixels(gray, tmp_path, ask, limit):
    """Computed from the stored images with Preprocess alone; with several binarizations, one after the other."""
    run = make_run(tmp_path / "run", merged(settings(gray, "dynamic"), {"data": {"pad": 2}}))
    assert ask(run, "--binarizations", "2", *limit, "--out", tmp_path / "out.json")[0] == 0
    count = 4 if limit else COUNT
    images, indices = TarShards(gray, "test").images(range(count)), np.arange(count)
    plain = Preprocess(SEED, binarize="dynamic")
    pixels = [plain(images, np.full(count, r), indices).tobytes() for r in range(2)]
    found = json.loads((tmp_path / "out.json").read_text())["data"]["pixels_sha256"]
    assert found == hashlib.sha256(b"".join(pixels)).hexdigest()


def test_a_binarized_set_is_measured_as_it_is_and_says_so(gray, binary, tmp_path, ask):
    """By a model of dynamic binarization, too: the report does not call it dynamic."""
    run = make_run(tmp_path / "run", settings(gray, "dynamic"))
    plain = make_run(tmp_path / "plain", settings(binary, "none"))
    code, printed = ask(run, "--data", binary, "--out", tmp_path / "fixed.json")
    assert code == 0
    assert f"{binary} is binarized already: measured as it is (fixed), not by dynamic binarization" in printed
    assert ask(plain, "--out", tmp_path / "plain.json")[0] == 0
    fixed, as_stored = (json.loads((tmp_path / name).read_text()) for name in ("fixed.json", "plain.json"))
    assert fixed["figures"] == as_stored["figures"]
    assert (fixed["data"]["binarize"], fixed["data"]["binarization_seed"]) == ("fixed", None)
    assert fixed["data"]["transform"] == {"binarization": "fixed"}
    assert ask("--repeat", tmp_path / "fixed.json")[0] == 0
    code, printed = ask(run, "--data", binary, "--binarizations", "2")
    assert code == 2
    assert f"--binarizations 2: the images of {binary} are not binarized at random (data.binarize is fixed)" in printed


@pytest.mark.parametrize(("stored", "binarize"), [("gray", "fixed"), ("binary", "dynamic")])
def test_training_refuses_what_would_have_the_wrong_name(request, make_runtime, stored, binarize):
    root = request.getfixturevalue(stored)
    recipe = build(Recipe, overlay(settings(root, binarize), []))
    message = {"fixed": "not a binarized set; make one with", "dynamic": "binarized already.*set data.binarize=fixed"}
    with pytest.raises(ValueError, match=f"data.binarize is {binarize}, but {root} is {message[binarize]}"):
        RunData(recipe, make_runtime())


def test_a_model_of_fixed_binarization_trains_on_the_pixels_as_they_are(binary, make_runtime):
    recipe = build(Recipe, settings(binary, "fixed"))
    batch = next(iter(RunData(recipe, make_runtime()).batches(0)))
    images = TarShards(binary, "train").images(batch.indices.numpy())
    assert (batch.images.numpy() == images.transpose(0, 3, 1, 2)).all()
