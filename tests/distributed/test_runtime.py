"""One process: collectives are the identity, and threads follow the machine rather than the launcher. Two: they wait
for each other and agree."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.agreement import code_version, disagreement
from pipeline.distributed.logs import launched_rank
from pipeline.distributed.runtime import Runtime, check_gpus, check_process_count, cores_per_process, gpu_backend
from tests.helpers.launching import ROOT, run_command
from tests.helpers.rank_scripts import run_script, script_command, write_script


def test_with_one_process_collectives_are_the_identity(make_runtime):
    runtime = make_runtime()
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(runtime.mean(value), value)
    assert torch.equal(runtime.gather(value), value)
    assert runtime.agree(torch.tensor(True)) is True
    assert runtime.agree(torch.tensor(False)) is False
    assert runtime.any_of(True, False) == (True, False)
    assert runtime.all_agree(True) is True
    assert runtime.all_agree(False) is False
    assert runtime.from_main("x") == "x"
    runtime.check_agreement({"code": "a"})
    runtime.barrier()
    assert runtime.run_on_main(lambda: 7, "a test") == 7
    with pytest.raises(ValueError, match="spoiled"):
        runtime.run_on_main(lambda: int("spoiled"), "a test")


def test_cores_are_shared_by_local_processes(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores_per_process() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * cores))
    assert cores_per_process() == 1


@pytest.mark.parametrize(
    ("gpus", "processes", "backend"), [(8, "8", "nccl"), (8, "2", "nccl"), (1, "2", "gloo"), (0, "2", "nccl")]
)
def test_processes_that_share_a_gpu_use_gloo(monkeypatch, gpus, processes, backend):
    """On CPUs Accelerate takes gloo in any case."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert gpu_backend() == backend


def test_the_launchers_number_is_compared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_process_count(1, None)
    check_process_count(1, 1)
    with pytest.raises(ValueError, match="train.expect_processes: 8 processes were expected and 1 started"):
        check_process_count(1, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 but 1"):
        check_process_count(1, None)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "1"}, 0),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 0),
        ({"RANK": "1", "LOCAL_RANK": "1"}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 3),
    ],
)
def test_only_a_launcher_of_several_processes_gives_ranks(monkeypatch, environment, rank):
    """A process that takes itself for rank 1 does not show its errors."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == rank


LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND": "NO"}
RANKED = LAUNCHED | {"LOCAL_RANK": "0"}


def set_launcher(monkeypatch, variables: dict[str, str]) -> None:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "environment", [RANKED, RANKED | {"CUDA_VISIBLE_DEVICES": "0,1"}, LAUNCHED | {"CUDA_VISIBLE_DEVICES": "0"}]
)
def test_a_gpu_configuration_is_refused_without_gpus(monkeypatch, environment):
    set_launcher(monkeypatch, environment)
    with pytest.raises(ValueError, match="accelerate_configs/cpu_2proc.yaml"):
        check_gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED,
        {"LOCAL_RANK": "0"},
        RANKED | {"CUDA_VISIBLE_DEVICES": "-1,-1"},
        RANKED | {"CUDA_VISIBLE_DEVICES": ""},
        RANKED | {"ACCELERATE_USE_CPU": "true"},
    ],
)
def test_a_cpu_configuration_is_accepted_without_gpus(monkeypatch, environment):
    set_launcher(monkeypatch, environment)
    check_gpus()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
@pytest.mark.parametrize(("processes", "cpus", "gpus"), [(2, "cpu_2proc", "multi_gpu"), (1, "cpu", "single_gpu")])
def test_gpu_configurations_end_with_one_error(tmp_path, processes, cpus, gpus):
    """Otherwise they would train on CPU processes and exit with 0."""
    command = script_command(processes, write_script(tmp_path, ""))
    command = [part.replace(f"{cpus}.yaml", f"{gpus}.yaml") for part in command]
    result = run_command(*command, PYTHONPATH=str(ROOT))
    assert result.returncode != 0
    assert "the launcher was configured for GPUs and this machine has none" in result.stderr


def test_a_process_that_does_not_join_at_the_start_is_reported(monkeypatch):
    """One may be stopped. torch's own error comes with a traceback, and does not name a rank."""

    def wait_in_vain(**_):
        raise torch.distributed.DistStoreError("Timed out after 151 seconds waiting for clients\nframe #0: ...")

    monkeypatch.setattr("pipeline.distributed.runtime.Accelerator", wait_in_vain)
    with pytest.raises(
        ConnectionError, match=r"^rank 0 on \S+ could not connect .* within 150 s: Timed out .* clients$"
    ):
        Runtime()


def test_one_process_needs_no_thread(make_runtime):
    """Without a launcher there is nothing to watch."""
    runtime = make_runtime()
    assert not runtime.watchdog._guard.is_alive()
    assert not runtime.watchdog._watcher.is_alive()
    with pytest.raises(KeyError), runtime.propagate_failure():
        raise KeyError("x")
    runtime.close()


# ------------------------------------------------------------------------------------------------------ two processes

COLLECTIVES = """
import json, weakref
from pipeline.distributed.runtime import is_raised_on_all_ranks
rank, results = runtime.rank, {}
def caught(work):
    try:
        return work()
    except ValueError as error:
        return [is_raised_on_all_ranks(error), str(error)]
def slowly(seconds):
    time.sleep(seconds)
    return rank
def bad(value):
    raise ValueError(value)
results["run_on_main"] = runtime.run_on_main(lambda: slowly(9), "a test")
results["run_on_all"] = runtime.run_on_all(lambda: slowly(4 * rank), "a test")
time.sleep(4 * rank)
runtime.barrier()
results["bad on main"] = caught(lambda: runtime.run_on_main(lambda: bad(rank), "a test"))
results["bad on one"] = caught(lambda: runtime.run_on_all(lambda: bad(rank) if rank == 1 else rank, "a test"))
results["agree"] = [runtime.agree(torch.tensor(flag)) for flag in (True, rank == 0, rank == 1, False)]
results["any_of"] = runtime.any_of(rank == 0, False, rank == 1, True)
results["all_agree"] = [runtime.all_agree(True), runtime.all_agree(rank == 0)]
runtime.check_agreement({"code": "a", "data": "b"})
results["disagreement"] = caught(lambda: runtime.check_agreement({"code": "a", "data": f"set {rank}"}))
results["keys left"] = [key for key in ("count", "open") if runtime._store.check([f"rendezvous/1/{key}"])]
if rank == 1:
    time.sleep(1)  # the first one waits for us before it leaves
layer = torch.nn.Linear(2, 2)
wrapped, _ = runtime.prepare(layer, torch.optim.SGD(layer.parameters()))
wrapped.__dict__["cycle"] = [wrapped]  # as a compiled model may be part of one
kept, leave = weakref.ref(wrapped), torch.distributed.destroy_process_group
del wrapped
def watched(*arguments):
    results["ddp freed before the process group"] = kept() is None
    leave(*arguments)
torch.distributed.destroy_process_group = watched
runtime.close()
(folder / f"{rank}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What two processes found, by rank, where collectives time out after 3 seconds."""
    folder = tmp_path_factory.mktemp("collectives")
    result = run_script(2, write_script(folder, COLLECTIVES))
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_long_work_of_one_rank_is_waited_for(results):
    """Three times the timeout on the first rank, and longer than it on the second."""
    assert [rank["run_on_main"] for rank in results] == [0, None]
    assert [rank["run_on_all"] for rank in results] == [0, 1]
    assert [rank["keys left"] for rank in results] == [[], []]


def test_an_error_of_one_rank_reaches_all(results):
    assert [rank["bad on main"] for rank in results] == [[True, "0"]] * 2
    assert [rank["bad on one"] for rank in results] == [[True, "1"]] * 2


def test_flags_are_reduced_in_one_collective(results):
    assert [rank["any_of"] for rank in results] == [[True, False, True, True]] * 2
    assert [rank["all_agree"] for rank in results] == [[True, False]] * 2


def test_a_flag_must_be_true_on_every_rank(results):
    """Whichever rank it is false on."""
    assert [rank["agree"] for rank in results] == [[True, False, False, False]] * 2


def test_disagreement_is_named_on_every_rank(results):
    for raised_on_all_ranks, message in (rank["disagreement"] for rank in results):
        assert raised_on_all_ranks
        assert "data: set 0 on rank 0; set 1 on rank 1" in message
        assert "code" not in message.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------- agreement


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=5))
def test_any_difference_is_named(facts):
    problem = disagreement(facts)
    assert (problem is None) == all(rank == facts[0] for rank in facts)
    if problem is not None:
        named = {line.split(":")[0].strip() for line in problem.splitlines()[1:]}
        assert named == {name for name in "abc" if len({rank.get(name) for rank in facts}) > 1}


def test_a_disagreement_of_many_is_short():
    facts = [{"code": "new" if rank in (3, 7, 8) else "old", "torch": "2"} for rank in range(16)]
    assert disagreement(facts).splitlines()[1:] == ["  code: old on rank 0-2, 4-6, 9-15; new on rank 3, 7-8"]


def test_the_codes_version_follows_every_source(tmp_path, monkeypatch):
    (tmp_path / "nn").mkdir()
    for name in ("a.py", "nn/b.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr("pipeline.distributed.agreement.PACKAGE", tmp_path)
    versions = [code_version(), code_version()]
    (tmp_path / "nn/b.py").write_text("x = 2\n")
    versions.append(code_version())
    (tmp_path / "nn/b.py").rename(tmp_path / "nn/c.py")
    versions.append(code_version())
    (tmp_path / "notes.txt").write_text("")
    versions.append(code_version())
    assert versions[0] == versions[1]
    assert len(set(versions[1:4])) == 3
    assert versions[3] == versions[4]


def test_a_wrapped_model_is_freed_before_the_process_group(results):
    """Its threads use the group."""
    assert [rank["ddp freed before the process group"] for rank in results] == [True, True]
