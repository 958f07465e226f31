"""What two ranks share when gradients are averaged in buckets, steps are recorded, and images are validated."""

import gzip
import json
import math

import pytest

from tests.helpers.rank_scripts import run_script, write_script
from tests.helpers.recipes import write_tiny_set

SCRIPT = """
import hashlib, json
from pipeline.config import build, overlay
from pipeline.distributed.preemption import StopRequest
from pipeline.evaluation.likelihood_bounds import Evaluator
from pipeline.recipe import Recipe
from pipeline.run.attempt import run_attempt
from pipeline.run.build import build_trainer
from pipeline.run.data import RunData
from tests.helpers.model_cases import MLP
from tests.helpers.recipes import tiny_settings

def recipe(*overrides, **model):
    settings = tiny_settings(folder / "set")
    return build(Recipe, overlay(settings | {"model": dict(model) or settings["model"]}, overrides))

def digest(trainer):
    parts = trainer.state.tensors()
    content = [tensor.numpy().tobytes() for part in parts.values() for tensor in part.values()]
    return hashlib.sha256(b"".join(content)).hexdigest()

results = {"buckets": {}, "digests": {}, "figures": {}}
model = MLP | {"hidden": 2048, "latent_size": 128}
wide = recipe("regularizers.strength=0", "train.steps=3", "train.micro_batch=4", **model)
for mb in (25, 1):
    runtime.accelerator.ddp_handler.bucket_cap_mb = mb
    trainer = build_trainer(wide, runtime, RunData(wide, runtime))
    trainer.fit()
    logged = trainer.wrapped_model._get_ddp_logging_data()
    results["buckets"][mb] = len(logged["rebuilt_bucket_sizes"].split(","))
    results["digests"][mb] = digest(trainer)
for workers in (0, 2):
    small = recipe(f"data.workers={workers}", "train.precision=fp64", "validation.batch_size=4")
    data = RunData(small, runtime)
    model = build_trainer(small, runtime, data).model
    results["figures"][workers] = Evaluator(small.validation, data, runtime, seed=1, detailed=True).run(model, 0)
with StopRequest() as stop:
    run_attempt(folder / "run", recipe("train.profile=2", "samples.every=0"), runtime, stop)
(folder / f"{runtime.rank}.json").write_text(json.dumps(results))
runtime.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what the ranks found in 0.json and 1.json, and a run with a profile in run/."""
    folder = tmp_path_factory.mktemp("two_ranks")
    write_tiny_set(folder / "set")
    result = run_script(2, write_script(folder, SCRIPT))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_the_size_of_buckets_changes_no_bit(ranks):
    """Of weights, optimizer and average after three steps of two micro-batches, whose gradients accumulate."""
    for rank in ranks:
        assert rank["buckets"]["25"] < rank["buckets"]["1"]
        assert rank["digests"]["25"] == rank["digests"]["1"] == ranks[0]["digests"]["1"]


@pytest.mark.slow
def test_validation_by_worker_processes_is_exact_on_two_ranks(ranks):
    assert ranks[0]["figures"]["0"]["val/nll"] > 0
    for rank in ranks:
        assert rank["figures"]["0"] == rank["figures"]["2"] == ranks[0]["figures"]["0"]
        assert all(math.isfinite(value) for value in rank["figures"]["2"].values())


@pytest.mark.slow
def test_every_rank_writes_its_trace_and_one_logs_the_table(folder):
    names = sorted(path.name for path in (folder / "run" / "profile").iterdir())
    assert names == [f"step_{6:08d}_rank_{rank}.json.gz" for rank in (0, 1)]
    for name in names:
        events = json.loads(gzip.decompress((folder / "run" / "profile" / name).read_bytes()))["traceEvents"]
        assert len({event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}) == 2
    assert (folder / "run" / "log.txt").read_text().count("profile of 2 steps up to step 6") == 1


@pytest.mark.slow
def test_records_hold_the_extremes_over_ranks(folder):
    """The first rank gathers them; one of its own figures lies between them."""
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "train/loss" in record]
    assert logged
    for record in logged:
        for name in ("perf/step_ms", "perf/data_wait", "perf/host_memory_gib"):
            assert record[f"{name}_min"] <= record[name] <= record[f"{name}_max"]
        assert record["perf/step_ms_min"] < record["perf/step_ms_max"]  # two clocks never agree to the bit
        assert "perf/gpu_memory_gib_min" not in record
