"""RUN/evaluations: a file for each question, nothing overwritten but the same question, all of them listed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.data.shards import TarShards
from pipeline.evaluate import main
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.evaluation_journal import EvaluationJournal
from tests.helpers.command_lines import check_commands, shown_facts
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import fast_settings, make_judge, make_run

OLD = Path(__file__).parents[1] / "old_runs"


@pytest.fixture
def run(shards, tmp_path) -> Path:
    return make_run(tmp_path / "run", fast_settings(shards), fingerprint=TarShards(shards, "test").fingerprint)


@pytest.fixture
def ask(make_runtime, capfd):
    """(run, words) -> the exit code, and what evaluate.py printed."""

    def call(run: Path, *words: str) -> tuple[int, str]:
        make_runtime()
        code = main([str(run), "--threads", "1", *words])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return call


def files(run: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (run / "evaluations").iterdir()}


def test_every_question_has_a_file_of_its_own(run, ask):
    """What overwrote each other before: importance samples, then images; and everything else that changes figures."""
    words = {
        "elbo_test_step_00000007.json": [],
        "elbo_test_step_00000007_importance_3.json": ["--importance-samples", "3"],
        "elbo_test_step_00000007_images_5.json": ["--images", "5"],
        "elbo_test_step_00000007_images_5_images_seed_3.json": ["--images", "5", "--images-seed", "3"],
        "elbo_test_step_00000007_seed_4.json": ["--seed", "4"],
    }
    for name, options in words.items():
        code, printed = ask(run, *options)
        assert code == 0
        assert f"written to {run / 'evaluations' / name}" in printed
    found = files(run)
    assert found.keys() == words.keys()
    assert len({report["figures"]["elbo"] for report in found.values()}) == 4  # more samples leave the bound alone
    assert found["elbo_test_step_00000007_images_5.json"]["images"] == 5
    assert "nll" in found["elbo_test_step_00000007_importance_3.json"]["figures"]


def test_what_is_measured_and_what_comes_next_is_said(run, shards, ask):
    _, printed = ask(run, "--images", "5")
    lines = printed.splitlines()
    start = lines.index("evaluation of mlp_vae at step 7 on 1 process on CPU, 1 thread each, fp32")
    facts = shown_facts(lines[start + 1 :])
    assert facts["model"] == [f"{run}/checkpoints/step_00000007, the moving average of the weights"]
    assert facts["data"] == [f"{shards}, split test: 5 of 6 images"]
    assert (facts["metrics"], facts["writes"]) == (["elbo"], [f"{run}/evaluations"])
    check_commands(facts["next"])
    (report,) = (run / "evaluations").iterdir()
    assert facts["next"][1] == f"python pipeline/evaluate.py --repeat {report}"


def test_the_same_question_replaces_its_file_and_says_so(run, ask):
    ask(run)
    before = files(run)
    words = ["--images", "6", "--images-seed", "1", "--batch-size", "2"]  # all six: the same question
    _, printed = ask(run, *words)
    (path,) = (run / "evaluations").iterdir()
    held = f"{path}: replaced; it held the same evaluation, of {before[path.name]['time']}, with "
    assert held in printed
    changed = json.loads(path.read_text())
    changed["figures"]["elbo"] = -1.25
    path.write_text(json.dumps(changed))
    _, printed = ask(run)
    assert (
        f"{path}: replaced; it held the same evaluation, of {changed['time']}, with other figures: elbo -1.2500"
        in printed
    )
    assert files(run)[path.name]["figures"] == before[path.name]["figures"]
    _, printed = ask(run)
    assert "with the same figures" in printed


def test_a_file_of_anything_else_is_kept(run, ask):
    """The same name, but other weights of the same step; or no report at all; or a link that leads nowhere."""
    ask(run)
    first = files(run)
    found = Checkpoints(run / "checkpoints").latest()
    moved = {name: tensor * 1.01 for name, tensor in found.tensors["ema"].items() if tensor.is_floating_point()}
    shutil.rmtree(run / "checkpoints")
    Checkpoints(run / "checkpoints").save(7, found.tensors | {"ema": found.tensors["ema"] | moved}, found.facts)
    (run / "evaluations" / "elbo_test_step_00000007_2.json").write_text("[]")
    (run / "evaluations" / "elbo_test_step_00000007_3.json").symlink_to("nowhere")
    _, printed = ask(run)
    assert "elbo_test_step_00000007_4.json" in printed
    assert "replaced" not in printed
    assert json.loads((run / "evaluations" / "elbo_test_step_00000007.json").read_text()) == next(iter(first.values()))
    assert (run / "evaluations" / "elbo_test_step_00000007_2.json").read_text() == "[]"
    assert not (run / "evaluations" / "nowhere").exists()


def test_recognition_states_what_it_uses_and_no_split(shards, tmp_path, ask):
    """And needs no data: the shard set is not there."""
    by_class = {"condition": {"name": "class", "num_classes": 10}}
    run = make_run(tmp_path / "run", fast_settings(tmp_path / "gone") | by_class)
    judge = make_judge(tmp_path / "judge", "classes", list("0123456789"))
    words = ["--classifier", judge, "--per-class", "2", "--temperature", "0.5", "--metrics", "recognition"]
    code, printed = ask(run, *words)
    assert code == 0, printed
    assert f"recognition of mlp_vae at step 7: per class 2, temperature 0.5, classifier {judge}" in printed
    assert "split" not in printed
    ((name, report),) = files(run).items()
    assert (
        name
        == f"recognition_step_00000007_per_class_2_temperature_0.5_classifier_{report['classifier_digest'][:8]}.json"
    )
    assert (report["per_class"], report["temperature"]) == (2, 0.5)
    assert not {"data", "images", "split_images", "importance_samples"} & report.keys()
    code, printed = ask(run, *words, "elbo")  # in one command: a file each, and the other one needs the data
    assert code == 2
    assert "gone, the shard set that the model was trained on, is not here; name a shard set with --data" in printed


def test_metrics_of_one_command_have_a_file_each_or_one_by_out(tmp_path, ask):
    data = write_set(tmp_path / "set", {"test": random_samples(6, 16, 16, seed=2)}, [6])
    run = make_run(tmp_path / "run", fast_settings(data) | {"condition": {"name": "class", "num_classes": 10}})
    words = ["--classifier", make_judge(tmp_path / "judge", "classes", list("0123456789")), "--per-class", "2"]
    assert ask(run, *words, "--metrics", "elbo", "recognition")[0] == 0
    reports = list(files(run).values())
    assert sorted(report["metrics"] for report in reports) == [["elbo"], ["recognition"]]
    assert ask(run, *words, "--metrics", "elbo", "recognition", "--out", str(tmp_path / "out.json"))[0] == 0
    merged = json.loads((tmp_path / "out.json").read_text())
    assert merged["figures"] == reports[0]["figures"] | reports[1]["figures"]
    assert merged["metrics"] == ["elbo", "recognition"]
    assert (merged["per_class"], merged["images"]) == (2, 6)


HOSTILE = {
    "nested.json": b"[" * 100_000,
    "digits.json": b'{"figures": {"elbo": ' + b"9" * 5000 + b"}}",
    "huge.json": b'{"figures": {}}' + b" " * (5 * 2**20),
    "list.json": b"[1]",
    "text.json": b'{"figures": {"elbo": "\\u001b[2J"}}',
    "name.json": b'{"figures": {"\\u001b[2Jelbo": 1.5}}',
    "infinite.json": b'{"figures": {"elbo": 1e999}}',
    "data.json": b'{"figures": {"elbo": -2.5}, "data": [1], "time": {"a": 1}}',
}


def test_all_evaluations_are_listed_those_of_earlier_versions_too(run, ask):
    """And files of any content get a line, without control characters; links and pipes are not read."""
    assert f"no evaluations in {run}" in ask(run, "--list")[1]
    ask(run, "--importance-samples", "2")
    elbo = next(iter(files(run).values()))["figures"]["elbo"]
    shutil.copy(OLD / "nvae" / "evaluation_val_step_00000008.json", run)
    old = json.loads((run / "evaluation_val_step_00000008.json").read_text())["figures"]["elbo"]
    for name, content in HOSTILE.items():
        (run / "evaluations" / name).write_bytes(content)
    (run / "evaluations" / "link.json").symlink_to(OLD / "nvae" / "evaluation_val_step_00000008.json")
    os.mkfifo(run / "evaluations" / "pipe.json")
    for rank in (0, 1):
        EvaluationJournal(run / "evaluations" / "elbo_test", {}, rank).close()
    code, printed = ask(run, "--list")
    assert code == 0
    lines = dict(line.split("  ", 1) for line in printed.splitlines())
    assert lines["evaluation_val_step_00000008.json"].startswith(f"elbo {old:.4f}")
    assert lines["evaluations/elbo_test_step_00000007_importance_2.json"].startswith(f"elbo {elbo:.4f}")
    assert lines["evaluations/link.json"] == "cannot be read: is a symbolic link, which is refused"
    assert lines["evaluations/pipe.json"] == "cannot be read: not a regular file"
    assert lines["evaluations/name.json"] == "?[2Jelbo 1.5000"
    assert lines["evaluations/text.json"] == "no figures"
    assert lines["evaluations/elbo_test.rank0.unfinished"] == "unfinished: the same command resumes it"
    assert "\x1b" not in printed
    assert len(lines) == len(HOSTILE) + 5
    assert ask(run / "nothing", "--list")[0] == 2


def test_a_metric_that_is_not_finite_is_null(run, ask):
    found = Checkpoints(run / "checkpoints").latest()
    huge = {name: tensor * 1e30 for name, tensor in found.tensors["ema"].items() if tensor.is_floating_point()}
    shutil.rmtree(run / "checkpoints")
    Checkpoints(run / "checkpoints").save(7, found.tensors | {"ema": found.tensors["ema"] | huge}, found.facts)
    assert ask(run)[0] == 0
    (report,) = files(run).values()
    assert report["figures"]["elbo"] is None
    assert ask(run, "--list")[0] == 0
