"""evaluate.py --repeat: the same figures from a report, whatever moved; and what is not the same is named."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate import main
from pipeline.inference.repeat import compare, show
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import fast_settings, make_judge, make_run

OLD = Path(__file__).parents[1] / "old_runs"


@pytest.fixture
def ask(make_runtime, capfd):
    """(words) -> the exit code, and what evaluate.py printed."""

    def call(*words: str | Path) -> tuple[int, str]:
        make_runtime()
        code = main([*map(str, words), "--threads", "1"] if "--threads" not in words else [*map(str, words)])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return call


@pytest.fixture
def report(shards, tmp_path, ask) -> Path:
    """Of five images at random with three importance samples and a seed."""
    run = make_run(tmp_path / "run", fast_settings(shards))
    words = ["--importance-samples", "3", "--images", "5", "--images-seed", "5", "--seed", "9", "--batch-size", "2"]
    assert ask(run, *words)[0] == 0
    (path,) = (run / "evaluations").iterdir()
    return path


def edited(report: Path, **changes) -> Path:
    """Another file with these entries of the report changed."""
    path = report.with_name("edited.json")
    path.write_text(json.dumps(json.loads(report.read_text()) | changes))
    return path


def figures_with(report: Path, name: str, value: float | None) -> dict:
    return {"figures": json.loads(report.read_text())["figures"] | {name: value}}


def test_a_report_is_repeated_to_the_bit_and_not_touched(report, ask):
    before = report.read_bytes()
    code, printed = ask("--repeat", report)
    assert code == 0, printed
    assert "all figures agree" in printed
    assert printed.count("0.00e+00    0.0e+00") == len(json.loads(before)["figures"]) > 8
    assert report.read_bytes() == before
    assert [path.name for path in report.parent.iterdir()] == [report.name]


@pytest.mark.parametrize("name", ["elbo", "nll_se", "kl/1x1_group00"])
def test_a_last_digit_that_differs_is_named(report, ask, name):
    value = json.loads(report.read_text())["figures"][name]
    code, printed = ask("--repeat", edited(report, **figures_with(report, name, float(np.nextafter(value, 1e9)))))
    assert code == 1
    assert f"these figures do not agree: {name}" in printed
    code, printed = ask("--repeat", edited(report, **figures_with(report, name, None)))
    assert (code, f"do not agree: {name}" in printed) == (1, True)


def test_other_conditions_allow_rounding_and_no_more(report, ask):
    """Of a report by two threads, repeated with one."""
    elbo = json.loads(report.read_text())["figures"]["elbo"]
    for change, expected in ((1e-6, 0), (1e-3, 1)):
        figures = figures_with(report, "elbo", elbo * (1 + change))
        code, printed = ask("--repeat", edited(report, threads=2, batch_size=3, **figures))
        assert code == expected, printed
        assert "not to the bit, since conditions changed: threads 2, now 1" in printed


def test_a_run_and_a_set_that_moved_are_found_where_they_are_named(report, shards, tmp_path, ask):
    run, root = report.parents[1], tmp_path / "moved_set"
    shutil.copytree(shards, root)
    moved = run.rename(tmp_path / "moved")
    report = edited(
        moved / "evaluations" / report.name, data={**read(moved / "evaluations" / report.name)["data"], "root": "gone"}
    )
    code, printed = ask("--repeat", report)
    assert (code, f"no checkpoint at {run}" in printed, "name the model's place" in printed) == (2, True, True)
    code, printed = ask(moved, "--repeat", report)
    assert (code, "gone: no such folder" in printed) == (2, True)
    assert ask(moved, "--repeat", report, "--data", root)[0] == 0


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_other_weights_and_other_data_are_named_in_one_line(report, shards, tmp_path, ask):
    other_run = make_run(tmp_path / "other", fast_settings(shards), seed=6)
    other_set = write_set(tmp_path / "set", {"test": random_samples(6, 16, 16, seed=3)}, [6])
    other_pixels = edited(report, data=read(report)["data"] | {"pixels_sha256": "0" * 64})
    for words, what in (
        ([other_run, "--repeat", report], ("weights_sha256 was", "other weights", "MODEL")),
        (["--repeat", report, "--data", other_set], ("fingerprint was", "other data", "--data")),
        (["--repeat", other_pixels], (f"pixels_sha256 was {'0' * 64}", "other pixels")),
    ):
        code, printed = ask(*words)
        assert code == 2
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert all(part in line for part in what)
        assert "all figures" not in printed


def test_recognition_is_repeated_with_its_judge(tmp_path, ask):
    run = make_run(
        tmp_path / "run", fast_settings(tmp_path / "gone") | {"condition": {"name": "class", "num_classes": 10}}
    )
    judge = make_judge(tmp_path / "judge", "classes", list("0123456789"))
    ask(run, "--metrics", "recognition", "--classifier", judge, "--per-class", "2", "--temperature", "0.5")
    (report,) = (run / "evaluations").iterdir()
    assert ask("--repeat", report)[0] == 0
    other = Path(judge).rename(tmp_path / "elsewhere")
    assert ask("--repeat", report)[0] == 2
    assert ask("--repeat", report, "--classifier", other)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "3"], "--images: not with --repeat"),
        (["--precision", "fp64"], "--precision: not with --repeat"),
        (["--metrics", "edit"], "--metrics: not with --repeat"),
    ],
)
def test_what_the_report_states_cannot_be_changed(report, ask, words, message):
    code, printed = ask("--repeat", report, *words)
    assert (code, message in printed) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["fame"]}, "no metric 'fame'"),
        ({"figures": {"elbo": "1"}}, "figures.elbo"),
        ({"seed": -1}, "seed"),
        ({"importance_samples": "x"}, "importance_samples"),
        ({"step": None}, "step"),
        ({"precision": "fp8"}, "precision"),
        ({"checkpoint": "nowhere"}, "no checkpoint at nowhere"),
    ],
)
def test_a_report_that_is_not_whole_is_refused_in_one_line(report, ask, changes, message):
    code, printed = ask("--repeat", edited(report, **changes))
    assert code == 2
    assert message in printed
    assert len([line for line in printed.splitlines() if "error" in line]) == 1


def test_a_report_of_an_earlier_version_is_repeated_if_it_names_the_weights(report, ask):
    """The last one stated no threads, pixels and standard errors; those before not even the weights."""
    content = read(report)
    for place, name in (
        (content, "threads"),
        (content, "binarizations"),
        (content["data"], "pixels_sha256"),
        (content["figures"], "elbo_se"),
    ):
        del place[name]
    report.write_text(json.dumps(content))
    code, printed = ask("--repeat", report)
    assert code == 0, printed
    assert "threads None, now 1" in printed
    code, printed = ask(OLD / "nvae", "--repeat", OLD / "nvae" / "evaluation_val_step_00000008.json")
    assert (code, "not a whole report: metrics: Field required" in printed) == (2, True)


def test_other_noise_is_compared_by_standard_errors(capsys):
    """On another kind of device: 4 x sqrt(2) standard errors; figures without one are not compared, and are named."""
    before = {"device": "CPU", "figures": {"elbo": -80.0, "elbo_se": 0.3, "kl": 10.0}}
    for elbo, agrees in ((-81.6, True), (-81.8, False)):
        now = {"device": "GPU", "precision": "fp32", "figures": {"elbo": elbo, "elbo_se": 0.3, "kl": 20.0}}
        found = {difference.name: difference for difference in compare(before, now, ["device"])}
        assert found["elbo"].agrees == agrees
        assert math.isinf(found["kl"].allowed)
        show(list(found.values()), ["device"])
        *_, skipped, last = capsys.readouterr().out.splitlines()
        assert skipped.endswith("no standard error: elbo_se, kl")
        assert last == ("all other figures agree" if agrees else "these figures do not agree: elbo")


def test_figures_that_cannot_be_compared_do_not_agree(report, ask):
    """Of a report by a GPU, of which only figures without standard errors are left."""
    figures = {name: value for name, value in read(report)["figures"].items() if "/" in name}
    code, printed = ask("--repeat", edited(report, device="a GPU", figures=figures))
    assert code == 1
    assert "no figure can be compared; repeat the report on the kind of device that it states" in printed
    assert "agree" not in printed
