"""The counts of `benchmarks.counts`: against real tensors, against figures by hand, and against the committed ones."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counts import count_step, figures, read_recipe
from benchmarks.cuda_kernels import EXPANSIONS, FREE, Kernel, multi_tensor_launches
from benchmarks.step_counter import StepCounter
from pipeline.run.build import build_trainer
from pipeline.run.data import RunData

COMMITTED = Path(__file__).with_name("small_counts.json")
CASES = [("nvae", 1), ("nvae", 8), ("conv_vae", 1)]
UPDATE = (
    "python -m benchmarks.counts --recipes nvae conv_vae --processes 1 8 --out tests/benchmarks/small_counts.json "
    "writes the new counts, where the growth is worth it"
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def counted(request) -> tuple[dict, dict]:
    """The figures of a small recipe as committed, and of the code."""
    name, world_size = request.param
    recipe = read_recipe(name, world_size)
    found = figures(count_step(recipe, world_size), recipe.train.batch_size // world_size)
    return json.loads(COMMITTED.read_text())["recipes"][name][str(world_size)], found


def test_a_step_takes_no_more_operators_than_committed(counted):
    committed, found = counted
    for key in ("operators", "kernels", "saved_mb_per_image"):
        assert found[key] <= committed[key], f"{key} grew; {UPDATE}"
    for phase, of in found["phases"].items():
        allowed = committed["phases"].get(phase, {"operators": 0, "kernels": 0})
        grown = {key: (allowed[key], of[key]) for key in allowed if of[key] > 1.02 * allowed[key]}
        assert not grown, f"phase {phase} grew (committed, found): {grown}; {UPDATE}"
    calls, allowed = ({name: one["calls"] for name, one in of["collectives"].items()} for of in (found, committed))
    assert sum(calls.values()) <= sum(allowed.values()), f"collectives grew from {allowed} to {calls}; {UPDATE}"


class Names(TorchDispatchMode):
    """The operators that run, by name, without those that launch nothing."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE and "::" not in name:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_fake_tensors_run_the_operators_that_real_ones_run(make_recipe, make_runtime):
    recipe = make_recipe("train.precision=bf16", "optim.clip=1")
    runtime = make_runtime("bf16")
    trainer = build_trainer(recipe, runtime, RunData(recipe, runtime))
    batch = next(iter(trainer.data.batches(0)))
    assert trainer.train_step(0, [batch]) is None
    trainer.interval_scalars()
    with Names() as real:
        assert trainer.train_step(1, [batch]) is None
    fake = count_step(recipe, 1)
    operators = sum(fake.operators.values(), Counter())
    parameters = len(list(trainer.model.parameters()))
    real.found["_local_scalar_dense"] -= parameters  # the optimizer reads its step counts, which are in host memory
    real.found["_foreach_add_"] -= 1  # and advances them
    assert +real.found == operators
    assert operators["convolution"] > 30
    assert fake.operators["EMA"]["_foreach_lerp_"] == 1


def counted_calls(function) -> StepCounter:
    counter = StepCounter()
    with FakeTensorMode(), counter, counter.phase("forward"), counter.saved_tensors():
        function()
    return counter


def test_bytes_and_kernels_of_known_operators():
    def forward():
        x = torch.empty(2, 3, 8, 8)  # 1,536 bytes
        weight, bias = torch.empty(5, 3, 1, 1), torch.empty(5)  # 60 and 20 bytes; the result has 2,560
        y = F.conv2d(x, weight, bias)
        y.view(2, -1).t()
        y.add_(1)
        torch.empty(1, 5, 1, 1).expand(2, 5, 8, 8) + y
        torch.cat([bias] * 129)

    counter = counted_calls(forward)
    moved, launched = counter.bytes["forward"], counter.kernels["forward"]
    assert moved["convolution"] == 1536 + 60 + 20 + 2560 + 2 * 2560  # the bias is added in a second pass
    assert moved["add_"] == 2 * 2560
    assert moved["add"] == 20 + 2 * 2560  # an expanded tensor is read once
    assert launched == {"convolution": 2, "add_": 1, "add": 1, "cat": 2}
    assert counter.forward_flops == 2 * 2 * 8 * 8 * 3 * 5


def test_batch_norm_passes_twice_over_its_input():
    def step():
        norm = nn.BatchNorm2d(4)
        x = torch.empty(2, 4, 8, 8, requires_grad=True)  # 2,048 bytes
        norm(x).square().sum().backward()

    counter = counted_calls(step)
    moved, launched = counter.bytes["forward"], counter.kernels["forward"]
    assert (launched["native_batch_norm"], launched["native_batch_norm_backward"]) == (3, 2)
    # Reads x twice and writes y; reads x and dy twice and writes dx; and vectors of 4 channels.
    assert 0 < moved["native_batch_norm"] - 3 * 2048 < 200
    assert 0 < moved["native_batch_norm_backward"] - 5 * 2048 < 200


@pytest.mark.parametrize(
    ("sizes", "limit", "launches"),
    [
        ([10] * 64, 64, 1),
        ([10] * 65, 64, 2),
        ([65_536 * 320], 64, 1),
        ([65_536 * 320 + 1], 64, 2),
        ([65_536 * 319, 10, 10], 64, 2),
        ([0, 0], 64, 0),
    ],
)
def test_launches_of_multi_tensor_kernels(sizes, limit, launches):
    assert multi_tensor_launches(sizes, limit) == launches


def test_lists_of_tensors_that_differ_are_taken_one_by_one():
    def copy(sources, targets):
        return lambda: torch._foreach_copy_(targets(), sources())

    def many(*shapes_and_dtypes):
        return lambda: [torch.empty(shape, dtype=dtype) for shape, dtype in shapes_and_dtypes]

    single, half, integer = ((3, 2), torch.float32), ((3, 2), torch.bfloat16), ((3, 2), torch.int64)
    cases = [
        (copy(many(single, single), many(single, single)), 1),
        (copy(many(single, single), many(half, half)), 1),
        (copy(many(single, integer), many(single, integer)), 2),
        (copy(many(single, single), lambda: [torch.empty(2, 3).t(), torch.empty(3, 2)]), 2),
        (lambda: torch._foreach_add_(many(single, half)(), 1), 2),
    ]
    assert [sum(counted_calls(case).kernels["forward"].values()) for case, _ in cases] == [n for _, n in cases]


def test_saved_storages_count_once():
    def forward():
        x = torch.empty(4, 16, requires_grad=True)  # 256 bytes
        h = torch.relu(x @ torch.empty(16, 8))  # 128 bytes, saved by relu and by the product below
        (h[:, :4] * h[:, 4:]).sum()

    # x @ w saves w (512); x needs none of itself, as w has no gradient. h is saved three times, in one storage.
    assert sum(counted_calls(forward).saved.values()) == 512 + 128


def test_a_custom_operator_counts_as_the_kernels_of_its_cuda_branch(monkeypatch):
    def expansion(args, kwargs, out):
        return [Kernel("moments", 100), Kernel("_allgather_base_", 8), Kernel("affine", 200)]

    monkeypatch.setitem(EXPANSIONS, "aten::silu", expansion)
    counter = counted_calls(lambda: F.silu(torch.empty(3)))
    assert counter.kernels["forward"]["silu"] == 3
    assert counter.bytes["forward"]["silu"] == 308
    assert (counter.collectives, counter.collective_bytes) == ({"_allgather_base_": 1}, {"_allgather_base_": 8})


def test_the_peak_of_memory_counts_what_is_alive():
    def step():
        a = torch.empty(100)  # 400 bytes
        b = a + 1  # 800 alive
        view = b.view(10, 10)
        del a, b  # 400
        c = torch.cat([view, view, view])  # 1,600
        del view
        c.add_(1)  # 1,200
        torch.empty(50)  # 1,400

    memory = counted_calls(step).memory
    assert (memory.peak, memory.now) == (1600, 0)
