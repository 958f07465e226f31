"""Batch norm against torch's own; several processes against one with the whole batch, with the kernels of CPUs and,
by stand-ins for the operators that torch has for CUDA only, with those of GPUs.
"""

import os
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.nn import global_batch_norm
from pipeline.nn.batch_norm import BatchNorm2d, counted_at_the_end
from pipeline.nn.global_batch_norm import GlobalBatchNorm, global_statistics
from tests.helpers import cuda_batch_norm
from tests.helpers.random_layers import images, randomized
from tests.helpers.two_ranks import run_two_ranks, start_rank

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs_in_one_process(training):
    ours, theirs = randomized(BatchNorm2d(5)), nn.BatchNorm2d(5, momentum=0.05).double()
    theirs.load_state_dict(ours.state_dict())
    x = images(3, 5, 4, 4)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_passes_are_counted_in_one_operation_at_the_end():
    first, second, unused = (BatchNorm2d(2) for _ in range(3))
    x = torch.randn(2, 2, 3, 3)
    with counting_operators() as operators, counted_at_the_end():
        second(first(first(x)))
        second.eval()(x)
    assert operators["_foreach_add_"] == 1
    assert operators["add_"] == 1  # the second run of `first`: one operation must not add to a tensor twice
    first(x)  # outside of the block: at once
    assert [int(norm.num_batches_tracked) for norm in (first, second, unused)] == [3, 1, 0]


def test_a_pass_that_fails_is_not_counted():
    norm, other = BatchNorm2d(2), BatchNorm2d(2)
    with pytest.raises(RuntimeError, match="running_mean should contain 1"), counted_at_the_end():
        other(norm(torch.randn(2, 2, 3, 3))[:, :1])
    assert int(norm.num_batches_tracked) == 0
    norm(torch.randn(2, 2, 3, 3))
    assert int(norm.num_batches_tracked) == 1


@contextmanager
def counting_operators():
    """Counts the operators that run inside, without views and allocations, by name."""
    names: Counter[str] = Counter()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = operator._overloadpacket.__name__
            if not operator.is_view and name not in ("detach", "empty_like", "new_empty"):
                names[name] += 1
            return operator(*args, **(kwargs or {}))

    with Mode():
        yield names


# ---- several processes -----------------------------------------------------------------------------------------------


def with_one_process(function):
    """function() under a process group of one."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        return function()
    finally:
        dist.destroy_process_group()


def test_global_batch_norm_gradient_by_differences():
    inputs = [images(3, 2, 2, 3).requires_grad_(), images(2).requires_grad_(), images(2, seed=2).requires_grad_()]

    def normalized(x, weight, bias):
        count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype)
        moments = global_statistics(x, torch.zeros_like(weight), torch.zeros_like(weight), count, 1, 0.1, 1e-5)
        return GlobalBatchNorm.apply(x, weight, bias, *moments, 1e-5)

    assert with_one_process(lambda: torch.autograd.gradcheck(normalized, inputs))


class Case(NamedTuple):
    kernels: str
    copies: int = 1
    dtype: torch.dtype = torch.float64
    channels_last: bool = True

    @property
    def file(self) -> str:
        return "-".join(str(part) for part in self) + ".pt"


KERNELS = ("plain", "fused")
EXACT = [Case(kernels, *options) for kernels in KERNELS for options in ((1,), (4,), (1, torch.float64, False))]
ROUNDED = [Case(kernels, 4, torch.bfloat16) for kernels in KERNELS]


def norm_and_input(case: Case) -> tuple[BatchNorm2d, Tensor, Tensor]:
    """A layer, 5 images whose mean is far from zero beside their spread, and the gradient of its output."""
    torch.manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    norm = randomized(BatchNorm2d(3, None if case in ROUNDED else F.silu, case.copies))
    x, dy = images(5, 3, 4, 4) + 100, images(5, 3, 4, 4, seed=2)
    x = x.to(case.dtype, memory_format=layout)
    dy = dy.to(case.dtype) if case in ROUNDED else dy.to(memory_format=layout)  # ROUNDED: not in the layout of x
    return (norm if case.dtype == torch.float64 else norm.float()), x, dy


def run_batch_norm(norm: BatchNorm2d, x: Tensor, dy: Tensor, compiled: bool = False) -> dict[str, Tensor]:
    norm.zero_grad()
    x = x.clone().requires_grad_()
    y = (torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm)(x)
    y.backward(dy)
    gradients = {"dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return {"y": y.detach(), **gradients, **{name: buffer.clone() for name, buffer in norm.named_buffers()}}


def batch_norm_worker(rank: int, folder: str) -> None:
    """Two of the five images on rank 0, three on rank 1; results into `folder`."""
    start_rank(rank, folder)
    library = cuda_batch_norm.register()
    share = slice(0, 2) if rank == 0 else slice(2, 5)
    for case in EXACT + ROUNDED:
        global_batch_norm.has_fused_kernels = lambda device, fused=case.kernels == "fused": fused
        norm, x, dy = norm_and_input(case)
        results = run_batch_norm(norm, x[share], dy[share])
        with counting_operators() as operators:  # in a second pass
            run_batch_norm(norm, x[share], dy[share])
        results |= {f"count of {name}": torch.tensor(count) for name, count in operators.items()}
        if case in EXACT[::3]:
            compiled = run_batch_norm(norm_and_input(case)[0], x[share], dy[share], compiled=True)
            results |= {f"compiled {name}": tensor for name, tensor in compiled.items()}
        torch.save(results, os.path.join(folder, f"{rank}-{case.file}"))
    del library
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    return run_two_ranks(batch_norm_worker, tmp_path_factory.mktemp("two_processes"))


def load(folder: Path, case: Case) -> list[dict[str, Tensor]]:
    return [torch.load(folder / f"{rank}-{case.file}", weights_only=True) for rank in (0, 1)]


def joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one process with the whole batch should give."""
    for name in BUFFERS:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    of_images = {name: torch.cat([first[name], second[name]]) for name in ("y", "dx")}
    return {name: first[name] for name in BUFFERS} | of_images | {n: first[n] + second[n] for n in ("dweight", "dbias")}


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_two_processes_equal_one_to_the_last_digits(two_processes, case):
    one = run_batch_norm(*norm_and_input(case))
    for name, tensor in joined(*load(two_processes, case)).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_bfloat16_inputs_are_rounded_once(two_processes, case):
    """y and dx are within half a unit of bfloat16's last place of the true ones; sums have float32's precision."""
    norm, x, dy = norm_and_input(case)
    one = run_batch_norm(norm.double(), x.double(), dy.double())
    two = joined(*load(two_processes, case))
    assert two["y"].dtype == two["dx"].dtype == torch.bfloat16
    assert two["running_var"].dtype == torch.float32
    for name, tensor in two.items():
        tolerance = {"rtol": 2**-8, "atol": 1e-4} if name in ("y", "dx") else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(tensor.double(), one[name].double(), **tolerance)


@pytest.mark.parametrize("case", EXACT[::3], ids=str)
def test_compiled_in_one_graph_it_is_the_same(two_processes, case):
    for results in load(two_processes, case):
        for name in ("y", "dx", "dweight", "dbias", *BUFFERS):
            torch.testing.assert_close(results[f"compiled {name}"], results[name], rtol=1e-12, atol=1e-12)


def test_a_pass_on_a_gpu_is_eleven_kernels_and_no_wait(two_processes):
    """One of them is the activation's; its gradient is another."""
    results = load(two_processes, Case("fused"))[0]
    counts = {name.removeprefix("count of "): int(n) for name, n in results.items() if name.startswith("count of ")}
    for name in ("clone", "add_"):  # of the test's inputs and of num_batches_tracked
        assert counts.pop(name) == {"clone": 4, "add_": 1}[name]
    kernels = ("stats", "gather_stats_with_counts", "elemt", "backward_reduce", "backward_elemt")
    assert counts == {f"batch_norm_{name}": 1 for name in kernels} | {
        "silu": 1,
        "silu_backward": 1,
        "cat": 2,
        "_to_copy": 1,
        "_allgather_base_": 1,
        "allreduce_": 1,
    }
