"""A training step of a recipe on fake tensors, which have shapes and no memory: the real trainer, operator by operator.

The trainer is the one that `pipeline.run.build` puts together. Fake are the tensors, the batch, and the process group,
whose collectives return at once.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.data.loader import Batch
from pipeline.data.preprocess import to_model_input
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe, build_model
from pipeline.run import build
from pipeline.training.trainer import Trainer

TOTAL_STEPS = 10_000
CPU = torch.device("cpu")


class FakeRuntime(Runtime):
    """Rank 0 of `world_size` processes. `fake` is the mode under which the trainer's tensors live."""

    def __init__(self, precision: str, world_size: int, bucket_mb: int):
        self.precision, self.world_size, self.rank, self.is_main = precision, world_size, 0, True
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.device = torch.device("meta")  # until `prepare`
        self.bucket_mb = bucket_mb
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # constants are real

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Turns the meta tensors of both into fake ones on the CPU, then wraps the model as Accelerate does."""
        self.device = CPU
        replaced = replace_tensors(model, self.fake)
        for group in optimizer.param_groups:
            group["params"] = [replaced[parameter] for parameter in group["params"]]
        if self.precision == "bf16":
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
        if self.world_size == 1:
            return model, optimizer
        with self.fake:
            return in_parallel(model, self.bucket_mb), optimizer

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.world_size == 1 else model.no_sync()

    def backward(self, loss: Tensor) -> None:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of strides: fake gradients have others
            (loss / 1).backward()  # as Accelerate divides by its own accumulation steps

    def agree(self, flag: Tensor) -> bool:
        self.sum(flag.to(torch.float32)).item()
        return True


def in_parallel(model: nn.Module, bucket_mb: int) -> DistributedDataParallel:
    """The model behind DDP, without the parts of DDP that read the values of tensors.

    DDP takes one bucket in its first step, and then makes new ones of `bucket_mb` in the order of the gradients,
    which would read values. These have the new ones' sizes from the start.
    """
    assign = dist._compute_bucket_assignment_by_size

    def by_size(parameters: list[Tensor], limits: list[int], *rest: Any) -> Any:
        return assign(parameters, [dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_mb * 2**20], *rest)

    with ExitStack() as stack:
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            stack.enter_context(mock.patch.object(torch.nn.parallel.distributed, name))
        stack.enter_context(mock.patch.object(dist, "_compute_bucket_assignment_by_size", by_size))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.reducer = KeptBuckets(wrapped.reducer)
    wrapped.register_comm_hook(None, average)
    return wrapped


class KeptBuckets:
    """DDP's reducer, with the buckets that it starts with: new ones after the first step would need values."""

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def average(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does by default, with a result even where the process group is fake.

    Without a hook DDP divides the gradients while it copies them into the bucket; with one it only copies them, which
    takes as many kernels and bytes.
    """
    dist.all_reduce(bucket.buffer())
    result = torch.futures.Future()
    result.set_result(bucket.buffer())
    return result


def replace_tensors(model: nn.Module, fake: FakeTensorMode) -> dict[nn.Parameter, nn.Parameter]:
    """Replaces the meta parameters and buffers by fake tensors of their shapes and strides. Returns old -> new."""
    replaced: dict[Any, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in replaced:
                    with fake:
                        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CPU)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replaced[tensor] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                tensors[name] = replaced.get(tensor)
    return replaced


class FakeData:
    """Batches of random images that exist in shape only: the part of `RunData` that a step needs."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.total_steps = TOTAL_STEPS
        self.order = SimpleNamespace(epoch_size=TOTAL_STEPS * recipe.train.batch_size // 100)

    def batch(self, images: int, shape: tuple[int, int, int]) -> Batch:
        """Called under a fake mode. The positions are real: they seed the noise."""
        columns = [torch.empty(images, dtype=torch.int64) for _ in range(3)]
        attributes = torch.empty(images, 0, dtype=torch.int8)
        positions = SimpleNamespace(tolist=lambda: list(range(images)))
        return Batch(torch.empty(images, *shape, dtype=torch.uint8), positions, *columns, attributes)

    def model_inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        x = to_model_input(batch.images, self.recipe.data.bits)
        if self.recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.recipe.condition is None:
            return x, None
        return x, torch.empty(len(x), self.recipe.condition.size)


@contextmanager
def fake_processes(world_size: int) -> Iterator[None]:
    """A process group of this size in which this process is rank 0 and the others do not exist."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with mock.patch("pipeline.nn.global_batch_norm.has_fused_kernels", return_value=True):  # as on CUDA
            yield
    finally:
        dist.destroy_process_group()


def fake_trainer(recipe: Recipe, world_size: int) -> Trainer:
    """The recipe's trainer, whose runtime is a `FakeRuntime`. Call it inside `fake_processes`."""

    def on_meta(*arguments: Any) -> nn.Module:
        with torch.device("meta"):
            return build_model(*arguments)

    runtime = FakeRuntime(recipe.train.precision, world_size, recipe.train.ddp_bucket_mb)
    with mock.patch.object(build, "build_model", on_meta):
        return build.build_trainer(recipe, runtime, FakeData(recipe))


def prime(trainer: Trainer, step: int) -> None:
    """Gives optimizer, regularizers, objective and moving average the state that they have after a first step, for
    counting step number `step`.
    """
    with trainer.runtime.fake:
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.state.regularizers(1.0)
        trainer.state.apply_update(0)
        trainer.objective.charged_kl(torch.zeros(1, len(trainer.model.groups)), step)
        trainer.state.optimizer.zero_grad(set_to_none=True)


def middle_of_warmup(recipe: Recipe) -> int:
    """A step at which the KL is balanced, where it ever is, and all schedules run."""
    objective = recipe.objective
    return round((objective.kl_warmup_delay + objective.kl_warmup_portion / 2) * TOTAL_STEPS)
