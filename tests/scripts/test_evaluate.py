"""evaluate.py: figures of a whole split, equal to those computed by hand, on one process and on two."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.preprocess import to_model_input
from pipeline.data.shards import TarShards
from pipeline.evaluate import build_parser, evaluate, main
from pipeline.inference.report import report_path
from pipeline.inference.trained import load
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.noise import draw_noise
from pipeline.run.classifier_folder import save_classifier
from pipeline.tracking.meters import ActiveUnits
from tests.helpers.launching import ROOT, launch, run_command
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import STEP, make_run

SCRIPT = str(ROOT / "pipeline" / "evaluate.py")
GROUPS = ("4x4_group00", "8x8_group00", "8x8_group01")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    splits = {"train": random_samples(20, 16, 16), "test": random_samples(13, 16, 16, seed=2)}
    return write_set(tmp_path_factory.mktemp("shards") / "set", splits, [10, 7])


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_settings(shards))


def command(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    if processes == 1:
        return run_command(sys.executable, SCRIPT, *arguments)
    return launch(processes, SCRIPT, *arguments)


def measured(run: Path, make_runtime, *words: str, precision: str = "fp64") -> dict:
    """The report of an evaluation in this process."""
    out = run / "out.json"
    parsed = build_parser().parse_args([str(run), "--out", str(out), "--precision", precision, *words])
    evaluate(parsed, make_runtime(precision))
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
    expected = {"elbo": elbo, "nll": nll, "kl": float(kl.sum())}
    expected |= {"bpd": -elbo / (16 * 16 * 3 * np.log(2)), "bpd_nll": nll / (16 * 16 * 3 * np.log(2))}
    expected |= {f"kl/{name}": float(value) for name, value in zip(GROUPS, kl, strict=True)}
    units = [torch.stack([out.kl_units[g] for out in first]).mean(0) for g in range(3)]
    expected |= {f"active_units/{name}": float((u > 0.1).sum()) for name, u in zip(GROUPS, units, strict=True)}
    assert found.keys() == expected.keys() | {"log_px"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_active_units_count_the_images_not_the_batches():
    """A last batch of one image with a large KL does not outweigh nine with none."""
    active = ActiveUnits(["a"])
    active.add([torch.zeros(2)], count=0)
    active.add([torch.tensor([0.0, 0.2])], count=9)
    active.add([torch.tensor([0.9, 0.0])], count=1)
    assert active.reduce(lambda totals: totals) == {"active_units/a": 1.0}


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


def test_the_report_says_all_that_the_figures_depend_on(run, shards, make_runtime):
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


def test_the_default_seed_is_that_of_the_training(run, make_runtime):
    assert measured(run, make_runtime) == measured(run, make_runtime, "--seed", "1")
    assert measured(run, make_runtime)["figures"] != measured(run, make_runtime, "--seed", "2")["figures"]


def test_two_processes_give_the_figures_of_one(run, make_runtime, tmp_path):
    """Float64: 1e-9. Seven images of thirteen on one, six on the other, batches that end ragged."""
    words = ["--importance-samples", "3", "--batch-size", "4"]
    one = measured(run, make_runtime, *words)
    result = command(str(run), *words, "--precision", "fp64", "--out", str(tmp_path / "two.json"), processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("active_units/8x8_group01") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-9)
    assert {k: v for k, v in two.items() if k != "figures"} == {k: v for k, v in one.items() if k != "figures"}


def test_more_processes_than_images(run, make_runtime, tmp_path):
    one = measured(run, make_runtime, "--images", "1", precision="fp32")
    result = command(str(run), "--images", "1", "--out", str(tmp_path / "two.json"), processes=2)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-5)


def test_the_command_writes_into_the_run_folder(run):
    result = command(str(run), "--split", "train", "--images", "3", "--threads", "1")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads((run / f"evaluation_train_step_{STEP:08d}.json").read_text())
    assert report["data"]["split"] == "train"
    assert not list(run.glob("*.partial"))
    assert f"{report['figures']['elbo']:.4f}" in result.stdout


def test_another_set_is_measured_and_named(run, tmp_path, make_runtime):
    other = write_set(tmp_path / "other", {"extra": random_samples(3, 16, 16, seed=5)}, [2])  # no train split
    report = measured(run, make_runtime, "--data", str(other), "--split", "extra")
    assert report["images"] == 3
    assert report["data"]["root"] == str(other)


def test_a_conditional_model_is_told_the_labels(shards, tmp_path, make_runtime):
    settings = tiny_settings(shards) | {"condition": {"name": "class", "num_classes": 10}}
    run = make_run(tmp_path, settings)
    report = measured(run, make_runtime)
    model = load(run, dtype=torch.float64)
    split = TarShards(shards, "test")
    images = torch.from_numpy(split.images(range(13)).transpose(0, 3, 1, 2))
    labels = split.labels(range(13))
    told = float(model.log_likelihood(images, torch.from_numpy(labels), 1, seed=1).mean())
    lied = float(model.log_likelihood(images, torch.from_numpy((labels + 1) % 10), 1, seed=1).mean())
    one_draw = measured(run, make_runtime, "--importance-samples", "1")["figures"]
    assert -one_draw["nll"] == pytest.approx(told, abs=1e-4)
    assert abs(told - lied) > 1e-2
    assert report["condition"]["num_classes"] == 10


def judge(folder: Path, kind: str, names: list[str]) -> str:
    """A classifier that knows nothing."""
    config = ClassifierConfig(kind=kind, names=names, image_shape=(3, 16, 16), width=4)
    torch.manual_seed(2)
    save_classifier(Classifier(config), folder, 0, {})
    return str(folder)


def test_edits_and_recognition_are_measured_where_asked(tmp_path, make_runtime):
    data = write_set(tmp_path / "set", {"test": random_samples(9, 16, 16, attributes=2, seed=3)}, [9])
    names = ["Attribute_0", "Attribute_1"]
    told = tiny_settings(data) | {"condition": {"name": "attributes", "chosen": names}}
    run = make_run(tmp_path / "faces", told)
    words = ["--classifier", judge(tmp_path / "judge", "attributes", names), "--metrics"]
    alone = measured(run, make_runtime, *words, "edit")["figures"]
    both = measured(run, make_runtime, *words, "elbo", "edit")["figures"]
    assert {"edit/set", "edit/clear", "edit/set/Attribute_0", "edit/set_others"} <= alone.keys()
    assert "elbo" not in alone
    assert both == measured(run, make_runtime)["figures"] | alone
    told = tiny_settings(data) | {"condition": {"name": "class", "num_classes": 10}}
    run = make_run(tmp_path / "digits", told)
    words = ["--classifier", judge(tmp_path / "other", "classes", list("0123456789")), "--metrics", "recognition"]
    report = measured(run, make_runtime, *words, "--per-class", "4", "--temperature", "0.5")
    shares = report["figures"]
    assert (report["per_class"], report["temperature"]) == (4, 0.5)
    assert shares["recognised"] == pytest.approx(np.mean([shares[f"recognised/{i}"] for i in range(10)]))
    assert all(4 * share == int(4 * share) for name, share in shares.items() if "/" in name)


def test_other_metrics_need_a_judge(shards, tmp_path, capfd, make_runtime):
    told = tiny_settings(shards) | {"condition": {"name": "class", "num_classes": 10}}
    make_runtime()
    assert main([str(make_run(tmp_path, told)), "--metrics", "recognition", "--threads", "1"]) == 2
    assert "need a judge: --classifier FOLDER" in capfd.readouterr().err


def test_reports_of_other_metrics_lie_beside(run):
    assert report_path(run, "test", 7).name == "evaluation_test_step_00000007.json"
    assert report_path(run, "test", 7, ["edit"]).name == "evaluation_test_step_00000007_edit.json"


def test_a_damaged_sample_ends_both_processes_with_one_message(run, tmp_path):
    root = write_set(tmp_path / "bad", {"test": random_samples(13, 16, 16)}, [13])
    offset = int(np.load(root / "test-000000.index.npy")["offset"][11])
    with (root / "test-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    result = command(str(run), "--data", str(root), "--out", str(tmp_path / "none.json"), processes=2)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "test-000000.tar" in result.stderr
    assert not (tmp_path / "none.json").exists()


BAD = {
    "a judge that is not": (["--metrics", "edit", "--classifier", "nowhere"], "was not trained with attributes"),
    "a judge of classes": (["--metrics", "recognition", "--classifier", "nowhere"], "was not trained with classes"),
    "no run": (["nowhere"], "nowhere: no run with checkpoints there"),
    "no data": (["--data", "nowhere"], "nowhere: no such folder"),
    "no split": (["--split", "dev"], "no split 'dev'; it has: train, test"),
    "no checkpoint": (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
    "no images": (["--images", "0"], "validation.images"),
    "fewer than no samples": (["--importance-samples", "-1"], "validation.importance_samples"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_input_gets_one_line_and_exit_code_2(run, capfd, make_runtime, what):
    words, message = BAD[what]
    words = words if what == "no run" else [str(run), *words]
    make_runtime()
    assert main([*words, "--threads", "1"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_data_of_another_size_are_refused(run, tmp_path, capfd, make_runtime):
    other = write_set(tmp_path / "other", {"test": random_samples(3, 12, 12)}, [3])
    make_runtime()
    assert main([str(run), "--data", str(other), "--threads", "1"]) == 2
    assert "data.size is 16, but" in capfd.readouterr().err
