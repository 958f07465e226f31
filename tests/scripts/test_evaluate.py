"""evaluate.py: figures of a whole split, equal to those computed by hand, on one process and on two."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from pipeline.data.preprocess import to_model_input
from pipeline.data.shards import TarShards
from pipeline.evaluate import build_parser, build_request, evaluate, main
from pipeline.inference.load_model import load
from pipeline.inference.report import headline
from pipeline.models.base import LatentGroup
from pipeline.models.classifier import Classifier
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.launching import ROOT, launch
from tests.helpers.recipes import merged, tiny_settings
from tests.helpers.shard_sets import flip_byte, random_samples, write_set
from tests.helpers.trained_runs import STEP, make_judge, make_run

SCRIPT = str(ROOT / "pipeline" / "evaluate.py")
WEIGHTS = f"checkpoints/step_{STEP:08d}/ema.safetensors"
GROUPS = ("4x4_group00", "8x8_group00", "8x8_group01")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    splits = {"train": random_samples(20, 16, 16), "test": random_samples(13, 16, 16, seed=2)}
    return write_set(tmp_path_factory.mktemp("shards") / "set", splits, [10, 7])


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_settings(shards))


def measured(run: Path, make_runtime, *words: str, precision: str = "fp64") -> dict:
    """The report of an evaluation in this process."""
    out = run / "out.json"
    parsed = build_parser().parse_args([str(run), "--out", str(out), "--precision", precision, *words])
    evaluate(build_request(parsed), make_runtime(precision))
    return json.loads(out.read_text())


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_figures_are_those_computed_image_by_image(run, shards, make_runtime, batch_size):
    """13 images in ragged batches: each figure to 1e-10 of sums over single images and single draws."""
    found = measured(run, make_runtime, "--batch-size", str(batch_size), "--importance-samples", "5")["figures"]
    model = load(run, dtype=torch.float64).model
    x = to_model_input(
        torch.from_numpy(TarShards(shards, "test").images(range(13)).transpose(0, 3, 1, 2)), dtype=torch.float64
    )
    outs = [
        [model(x[i : i + 1], draw_noise(model.groups, 1, f"validate/{d}", [i], dtype=torch.float64)) for d in range(5)]
        for i in range(13)
    ]
    first = [draws[0] for draws in outs]
    weights = [torch.cat([out.log_px + out.log_pz - out.log_qz for out in draws]) for draws in outs]
    nll = -float(torch.stack([w.logsumexp(0) for w in weights]).mean() - np.log(5))
    kl = torch.cat([out.kl for out in first]).mean(0)
    elbo = float(torch.cat([out.elbo for out in first]).mean())
    log_px = float(torch.cat([out.log_px for out in first]).mean())
    expected = {"elbo": elbo, "nll": nll, "kl": float(kl.sum()), "log_px": log_px}
    expected |= {"bpd": -elbo / (16 * 16 * 3 * np.log(2)), "bpd_nll": nll / (16 * 16 * 3 * np.log(2))}
    elbos, nlls = torch.cat([out.elbo for out in first]), torch.stack([np.log(5) - w.logsumexp(0) for w in weights])
    for name, values in {"elbo": elbos, "nll": nlls}.items():
        error = float(np.std(values.numpy(), ddof=1) / np.sqrt(13))
        bits = {"elbo": "bpd_se", "nll": "bpd_nll_se"}[name]
        expected |= {f"{name}_se": error, bits: error / (16 * 16 * 3 * np.log(2))}
    expected |= {f"kl/{name}": float(value) for name, value in zip(GROUPS, kl, strict=True)}
    units = [torch.stack([out.kl_units[g] for out in first]).mean(0) for g in range(3)]
    expected |= {f"active_units/{name}": float((u > 0.1).sum()) for name, u in zip(GROUPS, units, strict=True)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_the_figures_of_a_vae_are_those_of_torch_distributions(shards, make_runtime, tmp_path):
    """Of an MLP VAE with Bernoulli pixels, computed from its stored weights: the model's own terms are not used."""
    mlp = {"name": "mlp_vae", "hidden": 12, "latent_size": 3, "likelihood": {"name": "bernoulli"}}
    run = make_run(tmp_path, tiny_settings(shards) | {"model": mlp, "regularizers": {"strength": 0.0}})
    found = measured(run, make_runtime, "--batch-size", "5", "--importance-samples", "4")["figures"]
    stored = Checkpoints(run / "checkpoints").latest().tensors["ema"]
    weights = {name: tensor.double() for name, tensor in stored.items()}

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    prior, sums = Normal(torch.zeros(3).double(), 1.0), {"elbo": 0.0, "log_px": 0.0, "kl": 0.0, "nll": 0.0}
    for i, image in enumerate(TarShards(shards, "test").images(range(13))):
        x = torch.from_numpy(image.transpose(2, 0, 1).copy()).double().flatten() / 255
        hidden = layer("encoder", x).relu()
        q = Normal(layer("posterior.mean", hidden), (layer("posterior.log_variance", hidden) / 2).exp())
        log_weights, log_px = [], []
        for draw in range(4):
            z = q.mean + q.stddev * draw_noise([LatentGroup("", (3, 1, 1))], 1, f"validate/{draw}", [i])[0].flatten()
            p = Bernoulli(logits=layer("output", layer("decoder", z).relu()), validate_args=False)
            log_px.append(p.log_prob(x).sum())
            log_weights.append(log_px[-1] + prior.log_prob(z).sum() - q.log_prob(z).sum())
        kl = kl_divergence(q, prior).sum()
        nll = np.log(4) - torch.stack(log_weights).logsumexp(0)
        for name, value in {"elbo": log_px[0] - kl, "log_px": log_px[0], "kl": kl, "nll": nll}.items():
            sums[name] += float(value)
    assert sums["kl"] > 1
    for name, total in (*sums.items(), ("kl/1x1_group00", sums["kl"])):
        assert found[name] == pytest.approx(total / 13, rel=1e-9), name


def test_what_no_draw_changes_is_computed_once(run, make_runtime, monkeypatch):
    from pipeline.models.nvae import NVAE

    calls = {"features": 0, "bound": 0}
    for name in calls:
        plain = getattr(NVAE, name)

        def counted(self, *arguments, plain=plain, name=name):
            calls[name] += 1
            return plain(self, *arguments)

        monkeypatch.setattr(NVAE, name, counted)
    measured(run, make_runtime, "--batch-size", "5", "--importance-samples", "6")
    assert calls["features"] == 3  # batches of 5, 5 and 3
    assert calls["bound"] == 18


def test_small_batches_take_several_draws_in_one_pass(run, make_runtime, monkeypatch):
    from pipeline.models.nvae import NVAE

    rows = []
    plain = NVAE.bound
    monkeypatch.setattr(NVAE, "bound", lambda self, x, *rest: rows.append(len(x)) or plain(self, x, *rest))
    measured(run, make_runtime, "--images", "2", "--batch-size", "20", "--importance-samples", "31")
    assert rows == [2, 20, 20, 20]


def test_many_draws_make_batches_of_few_images_and_passes_stay_as_large(run, make_runtime, monkeypatch):
    """A batch, which a kill loses, takes at most 50 passes or one image."""
    from pipeline.models.nvae import NVAE

    rows, features = [], []
    plain, plain_features = NVAE.bound, NVAE.features
    monkeypatch.setattr(NVAE, "bound", lambda self, x, *rest: rows.append(len(x)) or plain(self, x, *rest))
    monkeypatch.setattr(NVAE, "features", lambda self, x, *r: features.append(len(x)) or plain_features(self, x, *r))
    measured(run, make_runtime, "--images", "5", "--batch-size", "5", "--importance-samples", "101")
    assert features == [2, 2, 1]
    assert rows == 2 * [2, *50 * [4]] + [1, *20 * [5]]


def test_the_report_holds_all_that_the_figures_depend_on(run, shards, make_runtime):
    report = measured(run, make_runtime, "--images", "7", "--importance-samples", "2", "--seed", "9")
    fingerprint = TarShards(shards, "test").fingerprint
    assert report["data"]["fingerprint"] == fingerprint
    assert report["data"]["split"] == "test"
    assert report["images"] == 7
    assert report["step"] == STEP
    assert report["importance_samples"] == 2
    assert report["seed"] == 9
    assert report["bin_rule"] == "published"
    assert report["likelihood"] == "logistic_mixture"
    assert report["precision"] == "fp64"
    assert report["averaged_weights"] is True
    assert report["num_dimensions"] == 16 * 16 * 3
    assert len(report["code"]["version"]) == 64
    assert report["groups"][GROUPS[0]] == [2, 4, 4]
    assert report["split_images"] == 13
    assert report["weights_sha256"] == hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()
    assert {"command", "time", "device", "num_processes", "batch_size"} <= report.keys()


def test_the_default_seed_is_that_of_the_training(run, make_runtime):
    default, same, other = (measured(run, make_runtime, *words) for words in ([], ["--seed", "1"], ["--seed", "2"]))
    assert (default["seed"], default["figures"]) == (same["seed"], same["figures"])
    assert default["figures"] != other["figures"]


ON_RANKS = """
import sys
from pipeline.distributed.runtime import Runtime
from pipeline.evaluate import build_parser, build_request, evaluate
runtime = Runtime("fp64", 1)
with runtime.closing():
    for words in sys.argv[1:]:
        evaluate(build_request(build_parser().parse_args(words.split("|"))), runtime)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_figures_of_one(run, make_runtime, tmp_path, processes):
    """Float64: 1e-9, standard errors included. Thirteen images in unequal shares and smaller last batches; and one
    image in all, so that a process has none.
    """
    questions = {
        "many.json": ["--importance-samples", "3", "--batch-size", "4", "--precision", "fp64"],
        "one.json": ["--images", "1", "--precision", "fp64"],
    }
    script = tmp_path / "script.py"
    script.write_text(ON_RANKS)
    lines = ["|".join([str(run), *words, "--out", str(tmp_path / name)]) for name, words in questions.items()]
    result = launch(processes, script, *lines, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("active_units") == 2
    assert result.stdout.count("8x8_group01") == 2
    for name, words in questions.items():
        one, several = measured(run, make_runtime, *words), json.loads((tmp_path / name).read_text())
        undefined = {figure for figure, value in one["figures"].items() if value is None}
        assert undefined == {figure for figure, value in several["figures"].items() if value is None}
        expected = {figure: value for figure, value in one["figures"].items() if value is not None}
        assert {figure: several["figures"][figure] for figure in expected} == pytest.approx(expected, rel=1e-9)
        assert (one["figures"]["elbo_se"] is None) == (name == "one.json")
        assert (one["num_processes"], several["num_processes"]) == (1, processes)
        other = {"figures", "num_processes", "command", "time"}
        assert {k: v for k, v in several.items() if k not in other} == {k: v for k, v in one.items() if k not in other}


def test_another_set_is_measured_and_named(run, tmp_path, make_runtime):
    other = write_set(tmp_path / "other", {"extra": random_samples(3, 16, 16, seed=5)}, [2])  # no train split
    report = measured(run, make_runtime, "--data", str(other), "--split", "extra")
    assert report["images"] == 3
    assert report["data"]["root"] == str(other)


def test_a_conditional_model_is_measured_under_the_labels(shards, tmp_path, make_runtime):
    settings = tiny_settings(shards) | {"condition": {"name": "class", "num_classes": 10}}
    run = make_run(tmp_path, settings)
    report = measured(run, make_runtime)
    model = load(run, dtype=torch.float64)
    split = TarShards(shards, "test")
    images = torch.from_numpy(split.images(range(13)).transpose(0, 3, 1, 2))
    labels = split.labels(range(13))
    right = float(model.log_likelihood(images, torch.from_numpy(labels), 1, seed=1).mean())
    wrong = float(model.log_likelihood(images, torch.from_numpy((labels + 1) % 10), 1, seed=1).mean())
    one_draw = measured(run, make_runtime, "--importance-samples", "1")["figures"]
    assert -one_draw["nll"] == pytest.approx(right, abs=1e-4)
    assert abs(right - wrong) > 1e-2
    assert report["condition"]["num_classes"] == 10


def test_edits_and_recognition_are_measured_with_a_judge(tmp_path, make_runtime):
    data = write_set(tmp_path / "set", {"test": random_samples(9, 16, 16, attributes=2, seed=3)}, [9])
    names = ["Attribute_0", "Attribute_1"]
    settings = tiny_settings(data) | {"condition": {"name": "attributes", "chosen": names}}
    run = make_run(tmp_path / "faces", settings)
    words = ["--classifier", make_judge(tmp_path / "judge", "attributes", names), "--metrics"]
    alone = measured(run, make_runtime, *words, "edit")["figures"]
    both = measured(run, make_runtime, *words, "elbo", "edit")["figures"]
    assert {"edit/set", "edit/clear", "edit/set/Attribute_0", "edit/set_others"} <= alone.keys()
    assert "elbo" not in alone
    assert both == measured(run, make_runtime)["figures"] | alone
    settings = tiny_settings(data) | {"condition": {"name": "class", "num_classes": 10}}
    run = make_run(tmp_path / "digits", settings)
    words = ["--classifier", make_judge(tmp_path / "other", "classes", list("0123456789")), "--metrics", "recognition"]
    report = measured(run, make_runtime, *words, "--per-class", "4", "--temperature", "0.5", "--readjust", "1")
    shares = report["figures"]
    assert (report["per_class"], report["temperature"], report["readjust"]) == (4, 0.5, 1)
    assert shares["recognized"] == pytest.approx(np.mean([shares[f"recognized/{i}"] for i in range(10)]))
    assert all(4 * share == int(4 * share) for name, share in shares.items() if "/" in name)


@pytest.fixture
def judged(tmp_path) -> tuple[Path, list[str]]:
    """A run conditional on attributes, one of whose nine test images cannot be read; and the words for its judge."""
    samples = random_samples(9, 16, 16, attributes=2, seed=3)
    data = write_set(tmp_path / "set", {"train": samples, "test": samples}, [9], encoding="png")
    flip_byte(data / "test-000000.tar", int(np.load(data / "test-000000.index.npy")["offset"][4]) + 20)
    names = ["Attribute_0", "Attribute_1"]
    settings = merged(tiny_settings(data), {"data": {"on_error": "skip", "verify": False}})
    run = make_run(tmp_path / "faces", settings | {"condition": {"name": "attributes", "chosen": names}})
    return run, ["--classifier", make_judge(tmp_path / "judge", "attributes", names), "--metrics", "edit"]


def test_faces_that_cannot_be_read_are_counted(judged, make_runtime):
    run, words = judged
    report = measured(run, make_runtime, *words)
    assert (report["figures"]["skipped_samples"], report["images"], report["split_images"]) == (1, 8, 9)
    assert headline(report).startswith("edit/clear ")


@pytest.mark.parametrize(("precision", "in_bf16"), [("fp32", False), ("bf16", True)])
def test_the_model_computes_in_the_stated_precision_and_the_judge_in_float32(
    judged, shards, tmp_path, make_runtime, monkeypatch, precision, in_bf16
):
    """Edits and recognition, whose reports state the precision."""
    seen = {NVAE: set(), Classifier: set()}
    for kind, name in ((NVAE, "pixel_distribution"), (Classifier, "forward")):
        plain = getattr(kind, name)

        def watched(self, *arguments, plain=plain, kind=kind):
            seen[kind].add(torch.is_autocast_enabled("cpu"))
            return plain(self, *arguments)

        monkeypatch.setattr(kind, name, watched)
    run, words = judged
    measured(run, make_runtime, *words, precision=precision)
    assert seen == {NVAE: {in_bf16}, Classifier: {False}}
    digits = make_run(tmp_path / "run", tiny_settings(shards) | {"condition": {"name": "class", "num_classes": 10}})
    words = ["--classifier", make_judge(tmp_path / "other", "classes", list("0123456789")), "--metrics", "recognition"]
    measured(digits, make_runtime, *words, "--per-class", "2", "--readjust", "1", precision=precision)
    assert seen == {NVAE: {in_bf16}, Classifier: {False}}


def test_other_metrics_need_a_judge(shards, tmp_path, capfd, make_runtime):
    settings = tiny_settings(shards) | {"condition": {"name": "class", "num_classes": 10}}
    make_runtime()
    assert main([str(make_run(tmp_path, settings)), "--metrics", "recognition", "--threads", "1"]) == 2
    assert "--metrics recognition: needs a judge: --classifier FOLDER" in capfd.readouterr().err


@pytest.mark.slow
def test_a_damaged_sample_ends_both_processes_with_one_message(run, tmp_path):
    root = write_set(tmp_path / "bad", {"test": random_samples(13, 16, 16)}, [13])
    offset = int(np.load(root / "test-000000.index.npy")["offset"][11])
    with (root / "test-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    result = launch(2, SCRIPT, str(run), "--data", str(root), "--out", str(tmp_path / "none.json"))
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "test-000000.tar" in result.stderr
    assert not (tmp_path / "none.json").exists()


BAD = {
    "edit of a plain model": (["--metrics", "edit"], "not trained with attributes; choose from elbo"),
    "recognition of a plain model": (["--metrics", "recognition"], "not trained with classes; choose from elbo"),
    "no run": (["nowhere"], "nowhere: no such folder; give the folder of a run"),
    "no data": (["--data", "nowhere"], "nowhere: no such folder"),
    "no split": (["--split", "dev"], "--split: DATA: no split 'dev'; it has: train, test"),
    "no checkpoint": (["--checkpoint", "nowhere"], "no checkpoint at nowhere; available steps: 7"),
    "a folder of something else": (["--checkpoint", "tests"], "tests: not the folder of a checkpoint; available"),
    "no such step": (["--checkpoint", "800"], "no checkpoint of step 800; available steps: 7"),
    "no images": (["--images", "0"], "--images 0: must be at least 1"),
    "fewer than no samples": (["--importance-samples", "-1"], "--importance-samples -1: must be at least 0"),
    "no batch": (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    "a negative seed": (["--seed", "-1"], "--seed -1: must be from 0 to 2^63 - 1"),
    "a seed for all images": (["--images-seed", "1"], "--images-seed 1: chooses among the images of --images N"),
    "no threads": (["--threads", "0"], "--threads 0: must be at least 1"),
    "no samples of a class": (["--per-class", "0"], "--per-class 0: must be at least 1"),
    "an endless temperature": (["--temperature", "inf"], "--temperature inf: must be a finite number"),
    "one file for two temperatures": (
        ["--metrics", "fid", "--temperature", "1", "0.7", "--out", "a.json"],
        "--out a.json: one file is of one temperature; omit --out, or give one --temperature",
    ),
    "samples readjusted for the bound": (
        ["--readjust", "2"],
        "--readjust 2: is for samples; add one of --metrics recognition fid kid precision_recall",
    ),
    "a folder for the report": (["--out", "."], "--out .: is a folder; name a file"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_input_gets_one_line_and_exit_code_2(run, shards, capfd, make_runtime, what):
    words, message = BAD[what]
    words = words if what == "no run" else [str(run), *words]
    words = words if "--threads" in words else [*words, "--threads", "1"]
    make_runtime()
    assert main(words) == 2
    error = capfd.readouterr().err
    assert message.replace("DATA", str(shards)) in error
    assert "Traceback" not in error


def test_data_of_another_size_are_refused(run, tmp_path, capfd, make_runtime):
    other = write_set(tmp_path / "other", {"test": random_samples(3, 12, 12)}, [3])
    make_runtime()
    assert main([str(run), "--data", str(other), "--threads", "1"]) == 2
    error = capfd.readouterr().err
    assert f"data.size is 16, but {other} holds images of 12x12; name a set of 16x16 images with --data" in error
    assert "--size" not in error  # an option that not every source has
