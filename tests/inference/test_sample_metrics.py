"""evaluate.py --metrics fid kid precision_recall, with a small feature network, against figures computed by hand."""

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.evaluate import build_parser, build_request, evaluate
from pipeline.evaluation.inception import network_input
from pipeline.evaluation.kernel_distance import kernel_distance
from pipeline.evaluation.precision_recall import precision_recall
from pipeline.inference import evaluate_run
from pipeline.inference.load_model import load
from pipeline.inference.repeat import load_report, repeat, request_of
from pipeline.inference.sample_metrics import SampleSets
from pipeline.models.noise import draw_noise
from tests.helpers.feature_networks import SmallNetwork
from tests.helpers.launching import ROOT, launch
from tests.helpers.recipes import merged, tiny_settings
from tests.helpers.shard_sets import flip_byte, random_samples, write_set
from tests.helpers.trained_runs import make_run

SETTINGS = ("--samples", "70", "--kid-subsets", "5", "--kid-subset-size", "40")
BERNOULLI = {"name": "mlp_vae", "hidden": 12, "latent_size": 3, "likelihood": {"name": "bernoulli"}}
ALL = ("--metrics", "fid", "kid", "precision_recall", *SETTINGS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    splits = {"train": random_samples(20, 16, 16), "test": random_samples(53, 16, 16, seed=2)}
    return write_set(tmp_path_factory.mktemp("shards") / "set", splits, [30])


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_settings(shards))


@pytest.fixture(autouse=True)
def _small_network(tmp_path, monkeypatch):
    monkeypatch.setenv("NVAE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate_run, "load_feature_network", lambda _path, _device, dtype: SmallNetwork().to(dtype))


@pytest.fixture
def small_run(shards, tmp_path) -> Path:
    """A new one for each test, of a fast model."""
    settings = tiny_settings(shards) | {"model": BERNOULLI, "regularizers": {"strength": 0.0}}
    return make_run(tmp_path / "run", settings, fingerprint=TarShards(shards, "test").fingerprint)


@pytest.fixture
def measure(run, make_runtime, tmp_path):
    """(arguments) -> the report of an evaluation in this process, in float64 by default."""

    def report(*words: str, of: Path = run) -> dict:
        out = tmp_path / "out.json"
        parsed = build_parser().parse_args([str(of), "--out", str(out), "--precision", "fp64", *words])
        evaluate(build_request(parsed), make_runtime(parsed.precision))
        return json.loads(out.read_text())

    return report


def features(images: Tensor, rounds: bool = True, rule: str = "pytorch-fid") -> Tensor:
    """(n, 12) of images in [0, 1], all in one pass."""
    pixels = (images * 255).round() if rounds else images * 255
    return SmallNetwork().double()(network_input(pixels, rule))


def real_images(shards: Path, split: str = "test") -> Tensor:
    shards = TarShards(shards, split)
    return torch.from_numpy(shards.images(range(len(shards))).transpose(0, 3, 1, 2)).double() / 255


def frechet(x: Tensor, y: Tensor) -> float:
    """By numpy, from eigenvalues of the product of the covariances."""
    a, b = (np.cov(rows.numpy(), rowvar=False) for rows in (x, y))
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b) - 2 * roots


@pytest.mark.parametrize(("rounding", "resize"), [("uint8", "pytorch-fid"), ("float", "tf1")])
def test_the_figures_are_those_computed_from_samples_and_images(run, shards, measure, rounding, resize):
    """The samples are those of TrainedModel.sample; ragged passes and blocks change nothing."""
    words = ("--seed", "4", "--temperature", "0.8", "--batch-size", "16", "--rounding", rounding, "--resize", resize)
    found = measure(*ALL, *words)["figures"]
    sampled = load(run, dtype=torch.float64).sample(70, 0.8, seed=4)
    x, y = (features(images, rounding == "uint8", resize) for images in (real_images(shards), sampled))
    assert found["fid"] > 1
    assert found["fid"] == pytest.approx(frechet(x, y), rel=1e-9)
    expected = kernel_distance(x, y, 5, 40, seed=4) | precision_recall(x, y)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found.keys() == {"fid", *expected}


def test_batch_norm_is_re_estimated_for_the_samples(run, shards, measure):
    """By samples of the same temperature."""
    words = ("--metrics", "fid", "--samples", "70", "--temperature", "0.7")
    found = measure(*words, "--readjust", "2")
    trained = load(run, dtype=torch.float64)
    trained.model.train()
    for batch in range(2):
        positions = range(70 * batch, 70 * (batch + 1))
        trained.model.sample(draw_noise(trained.model.groups, 1, "readjust", positions, "cpu", trained.dtype), 0.7)
    trained.model.eval()
    x, y = features(real_images(shards)), features(trained.sample(70, 0.7, seed=1))
    assert found["figures"]["fid"] == pytest.approx(frechet(x, y), rel=1e-9)
    assert found["readjust"] == 2
    assert found["figures"] != measure(*words)["figures"]


def test_several_temperatures_give_a_report_each(small_run, measure, make_runtime, monkeypatch):
    """The real images are read once. A report of an earlier version, which states no `readjust`, is replaced."""
    reads, plain = [], SampleSets._compute_real
    monkeypatch.setattr(SampleSets, "_compute_real", lambda self: reads.append(0) or plain(self))
    words = ["--metrics", "elbo", "fid", "--samples", "60", "--precision", "fp64"]
    parsed = build_parser().parse_args([str(small_run), *words, "--temperature", "1", "0.5", "1"])
    evaluate(build_request(parsed), make_runtime("fp64"))
    assert reads == [0]
    reports = {path.name: json.loads(path.read_text()) for path in (small_run / "evaluations").glob("*.json")}
    stem = "test_step_00000007"
    names = [f"fid_{stem}_samples_60_fp64.json", f"fid_{stem}_samples_60_temperature_0.5_fp64.json"]
    assert reports.keys() == {f"elbo_{stem}_fp64.json", *names}
    for name, temperature in zip(names, ("1", "0.5"), strict=True):
        alone = measure("--metrics", "fid", "--samples", "60", "--temperature", temperature, of=small_run)
        assert reports[name]["figures"] == alone["figures"]
    earlier = small_run / "evaluations" / names[0]
    earlier.write_text(json.dumps({key: value for key, value in reports[names[0]].items() if key != "readjust"}))
    evaluate(build_request(parsed), make_runtime("fp64"))
    assert {path.name for path in (small_run / "evaluations").glob("*.json")} == reports.keys()


def test_a_set_compared_with_itself(measure, monkeypatch, shards):
    images = real_images(shards)
    monkeypatch.setattr(SampleSets, "_sample", lambda self, positions: images[positions.start : positions.stop])
    found = measure(*ALL, "--samples", "53", "--kid-subset-size", "53")["figures"]
    assert found["fid"] < 1e-6
    assert found["precision"] == found["recall"] == 1.0
    assert found["kid"] < 0  # unbiased: the kernel's values of an image with itself count in one of its terms only


def test_samples_of_the_decoder_are_not_its_means(small_run, measure, monkeypatch):
    run, seen = small_run, []
    plain = SampleSets._sample

    def noted(self, positions: range) -> Tensor:
        seen.append(plain(self, positions))
        return seen[-1]

    monkeypatch.setattr(SampleSets, "_sample", noted)
    means = measure("--metrics", "fid", "--samples", "60", of=run)["figures"]
    samples = measure("--metrics", "fid", "--samples", "60", "--decoder", "sample", of=run)["figures"]
    assert set(seen[-1].unique().tolist()) == {0.0, 1.0}
    assert 0 < seen[0].min() < seen[0].max() < 1
    assert (seen[-1] - seen[0]).mean().abs() < 0.01
    assert samples["fid"] != pytest.approx(means["fid"], rel=0.01)


def test_a_likelihood_that_cannot_be_sampled_is_refused(shards, measure, tmp_path):
    model = BERNOULLI | {"likelihood": {"name": "squared_error"}}
    run = make_run(tmp_path / "run", tiny_settings(shards) | {"model": model, "regularizers": {"strength": 0.0}})
    with pytest.raises(ValueError, match="--decoder sample: likelihood squared_error"):
        measure("--metrics", "fid", "--decoder", "sample", of=run)
    with pytest.raises(ValueError, match="--readjust: model.name=mlp_vae has no batch norm"):
        measure("--metrics", "fid", "--readjust", "2", of=run)


def test_a_conditional_model_samples_the_classes_of_the_images(shards, measure, tmp_path):
    run = make_run(tmp_path / "run", tiny_settings(shards) | {"condition": {"name": "class", "num_classes": 10}})
    found = measure("--metrics", "fid", "--samples", "70", of=run)["figures"]
    labels = torch.from_numpy(TarShards(shards, "test").labels(range(53)))
    sampled = load(run, dtype=torch.float64).sample(70, seed=1, condition=labels.repeat(2)[:70])
    assert found["fid"] == pytest.approx(frechet(features(real_images(shards)), features(sampled)), rel=1e-9)


def test_real_images_are_those_that_the_model_is_trained_on(shards, measure, tmp_path):
    """In its bits, and without the padding."""
    run = make_run(tmp_path / "run", merged(tiny_settings(shards), {"data": {"bits": 3, "pad": 8}}))
    found = measure("--metrics", "fid", "--samples", "60", "--rounding", "float", of=run)["figures"]
    levels = (real_images(shards) * 255).round().div(32).floor() / 7
    sampled = load(run, dtype=torch.float64).sample(60, seed=1)
    assert sampled.shape[-1] == 16
    expected = frechet(features(levels, rounds=False), features(sampled, rounds=False))
    assert found["fid"] == pytest.approx(expected, rel=1e-9)


# ---- the cache of real images ----------------------------------------------------------------------------------------


def count_reads(monkeypatch) -> list:
    """Grows by one for each set of real images that is read."""
    reads, plain = [], SampleSets._compute_real
    monkeypatch.setattr(SampleSets, "_compute_real", lambda self: reads.append(0) or plain(self))
    return reads


def test_real_images_are_read_once_for_each_protocol(measure, monkeypatch, small_run):
    reads, measure = count_reads(monkeypatch), partial(measure, of=small_run)
    first = measure(*ALL)
    assert len(reads) == 1
    assert measure(*ALL)["figures"] == first["figures"]
    assert measure("--metrics", "fid", *SETTINGS)["figures"]["fid"] == first["figures"]["fid"]
    assert measure(*ALL, "--seed", "9")["figures"]["fid"] != first["figures"]["fid"]
    assert len(reads) == 1
    others = [("--images", "52"), ("--split", "train", "--kid-subset-size", "20"), ("--resize", "tf1"),
              ("--rounding", "float"), ("--precision", "fp32")]  # fmt: skip
    for number, words in enumerate(others, start=2):
        measure(*ALL, *words)
        assert len(reads) == number


def test_moments_alone_do_not_serve_metrics_of_features(measure, monkeypatch):
    reads = count_reads(monkeypatch)
    alone = measure("--metrics", "fid", *SETTINGS)["figures"]
    assert measure(*ALL)["figures"]["fid"] == alone["fid"]
    assert len(reads) == 2


def test_a_damaged_cache_is_replaced(measure, monkeypatch, tmp_path, caplog):
    expected, reads = measure(*ALL)["figures"], count_reads(monkeypatch)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with caplog.at_level(logging.WARNING, "pipeline"):
            logging.getLogger("pipeline").propagate = True
            assert measure(*ALL)["figures"] == expected
        assert "sha256 differs" in caplog.text
        assert "computed again" in caplog.text
        caplog.clear()
    assert len(reads) == 2
    assert measure(*ALL)["figures"] == expected
    assert len(reads) == 2


def test_features_under_another_name_are_not_used(measure, monkeypatch, tmp_path):
    """A folder that was intact, and moved to the name of another protocol."""
    measure("--metrics", "fid", *SETTINGS)
    (moments,) = (tmp_path / "cache" / "features").iterdir()
    content = {file.name: file.read_bytes() for file in moments.iterdir()}
    expected = measure("--metrics", "fid", *SETTINGS, "--resize", "tf1")["figures"]
    (other,) = set((tmp_path / "cache" / "features").iterdir()) - {moments}
    for name, data in content.items():
        (other / name).write_bytes(data)
    reads = count_reads(monkeypatch)
    assert measure("--metrics", "fid", *SETTINGS, "--resize", "tf1")["figures"] == expected
    assert len(reads) == 1


def test_a_cache_that_cannot_be_written_to_changes_nothing(measure, tmp_path):
    expected = measure(*ALL)["figures"]
    cache = tmp_path / "cache" / "features"
    for folder in cache.iterdir():
        folder.rename(folder.with_name("." + folder.name))
    cache.rename(tmp_path / "elsewhere")
    cache.write_text("a file")
    assert measure(*ALL)["figures"] == expected


# ---- bad input, and reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metrics", "kid"), "--metrics kid: needs at least 1,000 real images, has 53; take more with --split or "),
        (("--metrics", "kid", "--kid-subset-size", "30", "--samples", "20"), "needs at least 30 samples, has 20;"),
        (("--metrics", "precision_recall", "--images", "3"), "needs at least 4 real images, has 3"),
        (("--metrics", "fid", "--images", "1"), "needs at least 2 real images, has 1"),
    ],
)
def test_too_few_images_are_refused_before_anything_is_computed(measure, monkeypatch, words, message):
    monkeypatch.setattr(SampleSets, "_sample", None)
    with pytest.raises(ValueError, match=message):
        measure(*words)


def test_fewer_images_than_dimensions_are_computed_and_warned_about(measure, caplog):
    with caplog.at_level(logging.WARNING, "pipeline"):
        logging.getLogger("pipeline").propagate = True
        found = measure("--metrics", "fid", "--samples", "12")["figures"]
    assert found["fid"] > 0
    assert "the covariance of 12 samples has no full rank in 12 dimensions" in caplog.text
    assert "real images" not in caplog.text


def test_samples_that_are_not_finite_are_named(measure, monkeypatch):
    monkeypatch.setattr(SampleSets, "_sample", lambda self, positions: torch.full((len(positions), 3, 16, 16), np.nan))
    with pytest.raises(ValueError, match="NaN"):
        measure("--metrics", "fid", *SETTINGS)


def test_reports_state_the_protocol_and_protocols_are_different_files(small_run, make_runtime):
    run = small_run
    changes = [(), ("--samples", "60"), ("--temperature", "0.5"), ("--decoder", "sample"), ("--rounding", "float"),
               ("--resize", "tf1"), ("--seed", "3"), ("--images", "52")]  # fmt: skip
    for words in changes:
        parsed = build_parser().parse_args([str(run), "--metrics", "fid", "--samples", "70", *words])
        evaluate(build_request(parsed), make_runtime())
    names = {path.stem.removeprefix("fid_test_step_00000007_") for path in (run / "evaluations").iterdir()}
    plain = "samples_70"
    assert names == {
        plain, "samples_60", f"{plain}_temperature_0.5", f"{plain}_decoder_sample", f"{plain}_rounding_float",
        f"{plain}_resize_tf1", f"{plain}_seed_3", f"images_52_{plain}",
    }  # fmt: skip
    report = json.loads((run / "evaluations" / f"fid_test_step_00000007_{plain}.json").read_text())
    protocol = {"samples": 70, "decoder": "mean", "rounding": "uint8", "resize": "pytorch-fid", "temperature": 1.0}
    assert report.items() >= protocol.items()
    assert report["feature_weights_sha256"].startswith("6726825d")
    assert (report["images"], report["data"]["split"], report["seed"]) == (53, "test", 1)
    assert "kid_subsets" not in report


def test_subsets_of_kid_make_another_question(small_run, make_runtime):
    run = small_run
    for words in ((), ("--kid-subsets", "6"), ("--kid-subset-size", "41")):
        parsed = build_parser().parse_args([str(run), "--metrics", "kid", *SETTINGS, *words])
        evaluate(build_request(parsed), make_runtime())
    assert len(list((run / "evaluations").iterdir())) == 3


def test_a_report_is_repeated(measure, run, make_runtime, tmp_path):
    """The whole protocol comes from the report."""
    measure(
        *ALL, "--decoder", "sample", "--resize", "tf1", "--rounding", "float", "--temperature", "0.6", "--seed", "8"
    )
    report = load_report(tmp_path / "out.json")
    request = request_of(report, None, None, [], feature_weights=tmp_path / "weights.pth")
    options = request.options
    assert (options.decoder, options.resize, options.rounding) == ("sample", "tf1", "float")
    assert (options.temperature, options.seed, options.kid_subset_size, options.samples) == (0.6, 8, 40, 70)
    assert options.feature_weights == tmp_path / "weights.pth"
    assert repeat(report, request, make_runtime("fp64"))


def test_images_that_cannot_be_read_are_counted_and_not_kept(measure, tmp_path, monkeypatch):
    """The figures are those of the others, and the features are computed again the next time."""
    samples = random_samples(50, 16, 16, seed=2)
    root = write_set(tmp_path / "set", {"train": samples, "test": samples}, [30], encoding="png")
    row = np.load(root / "test-000000.index.npy")[7]
    flip_byte(root / "test-000000.tar", int(row["offset"]) + 20)
    run = make_run(tmp_path / "run", merged(tiny_settings(root), {"data": {"on_error": "skip", "verify": False}}))
    words = (*ALL, "--samples", "60", "--kid-subset-size", "49")
    first, reads = measure(*words, of=run), count_reads(monkeypatch)
    assert first["figures"]["skipped_samples"] == 1
    assert first["images"] == 49
    assert measure(*words, of=run)["figures"] == first["figures"]
    assert len(reads) == 1
    kept = torch.from_numpy(np.delete(samples.images, 7, axis=0).transpose(0, 3, 1, 2)).double() / 255
    x, y = features(kept), features(load(run, dtype=torch.float64).sample(60, seed=1))
    expected = {"fid": frechet(x, y)} | precision_recall(x, y) | kernel_distance(x, y, 5, 49, seed=1)
    assert {name: first["figures"][name] for name in expected} == pytest.approx(expected, rel=1e-9)


# ---- several processes ---------------------------------------------------------------------------------------------

ON_RANKS = """
import sys
from pipeline.distributed.runtime import Runtime
from pipeline.evaluate import build_parser, build_request, evaluate
from pipeline.inference import evaluate_run
from tests.helpers.feature_networks import SmallNetwork
evaluate_run.load_feature_network = lambda _path, _device, dtype: SmallNetwork().to(dtype)
runtime = Runtime("fp32", 1)
with runtime.closing():
    for words in sys.argv[1:]:
        evaluate(build_request(build_parser().parse_args(words.split("|"))), runtime)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_find_the_same(run, make_runtime, tmp_path, processes):
    """In float32. Rows, and so KID, precision and recall, are equal to the bit; the sums behind FID are added in
    another order: 1e-12. The second time the real images come from the cache of the main process.
    """
    script = tmp_path / "script.py"
    script.write_text(ON_RANKS)
    words = [str(run), *ALL, "--batch-size", "8", "--readjust", "2", "--rounding", "float", "--out"]
    outs = [str(tmp_path / name) for name in ("first.json", "cached.json", "alone.json")]
    lines = ["|".join([*words, out]) for out in outs[:2]]
    result = launch(processes, script, *lines, PYTHONPATH=str(ROOT), NVAE_CACHE_DIR=str(tmp_path / "of_ranks"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("kid_std") == 2
    evaluate(build_request(build_parser().parse_args([*words, outs[2]])), make_runtime())
    first, cached, alone = (json.loads(Path(out).read_text()) for out in outs)
    assert (first["num_processes"], alone["num_processes"]) == (processes, 1)
    for found in (first["figures"], cached["figures"]):
        assert found.pop("fid") == pytest.approx(alone["figures"]["fid"], rel=1e-12)
        assert found == {name: value for name, value in alone["figures"].items() if name != "fid"}
