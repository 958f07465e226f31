"""Counts the operators of a training step by phase, what they launch and move, and the memory that is alive."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.cuda_kernels import COLLECTIVES, CUDA_ONLY, EXPANSIONS, Kernel, kernels, tensor_bytes, tensors_in
from benchmarks.fake_step import FakeRuntime
from pipeline.training import trainer as trainer_module
from pipeline.training.ema import EMA
from pipeline.training.gradients import GradientRules
from pipeline.training.objective import Objective
from pipeline.training.regularizers import Regularizers
from pipeline.training.step_statistics import StepStatistics
from pipeline.training.trainer import Trainer

PHASES = [
    (trainer_module, "draw_noise", "noise"),
    (Objective, "__call__", "forward"),
    (Objective, "_statistics", "statistics"),
    (Regularizers, "__call__", "regularizers"),
    (Regularizers, "commit", "regularizers"),
    (FakeRuntime, "backward", "backward"),
    (GradientRules, "clip", "clip"),
    (EMA, "update", "EMA"),
    *((StepStatistics, name, "statistics") for name in ("add", "add_kl_units", "commit", "discard")),
]
"""Functions and the phase that they are, besides the model's forward and the optimizer's step. The rest is "other"."""


class LiveMemory:
    """Bytes of the storages that operators made since the start and that are still alive, and their peak."""

    def __init__(self):
        self.now = self.peak = 0
        self._references: dict[int, weakref.ref] = {}

    def add(self, made: Iterator[Tensor], given: Iterator[Tensor]) -> None:
        """Counts the storages of an operator's results, unless they are those of an argument."""
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._references:
                self._follow(storage._cdata, storage)
        self.peak = max(self.peak, self.now)

    def _follow(self, key: int, storage: Any) -> None:
        size = storage.nbytes()
        self.now += size

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._references[key]

        self._references[key] = weakref.ref(storage, freed)


class StepCounter(TorchDispatchMode):
    """Counts the operators that run inside it, by phase."""

    def __init__(self, host_tensors: Sequence[Tensor] = ()):
        """`host_tensors` would be in host memory, whatever the device of the model: they launch nothing."""
        super().__init__()
        self.operators: dict[str, Counter] = defaultdict(Counter)
        self.kernels: dict[str, Counter] = defaultdict(Counter)
        self.bytes: dict[str, Counter] = defaultdict(Counter)
        self.collectives, self.collective_bytes = Counter(), Counter()
        self.forward_flops = 0
        self.saved: dict[int, int] = {}
        self.memory = LiveMemory()
        self._host = {id(tensor) for tensor in host_tensors}
        self._phase = "other"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this context operators count for phase `name`."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name == "prim::device" and hasattr(args[0], "fake_device"):
            return args[0].fake_device
        if func._schema.name in CUDA_ONLY:
            out = CUDA_ONLY[func._schema.name](args)
        elif func._schema.name == "aten::_local_scalar_dense":
            out = 1.0  # a fake tensor has no value
        else:
            out = func(*args, **kwargs)
        first = next(tensors_in(args), None)
        if id(first) not in self._host:
            self._record(func, args, kwargs, out)
            self.memory.add(tensors_in(out), tensors_in([args, kwargs]))
        return out

    def _record(self, func: OpOverload, args: tuple, kwargs: dict, out: Any) -> None:
        launched = kernels(func, args, kwargs, out)
        if not launched:
            return
        name = func._schema.name.removeprefix("aten::")
        self.operators[self._phase][name] += 1
        self.kernels[self._phase][name] += len(launched)
        self.bytes[self._phase][name] += sum(kernel.bytes for kernel in launched)
        self._record_collectives(func, args, launched)
        if self._phase == "forward" and func.overloadpacket in flop_registry:
            self.forward_flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)

    def _record_collectives(self, func: OpOverload, args: tuple, launched: list[Kernel]) -> None:
        name = func._schema.name.removeprefix("c10d::")
        if name in COLLECTIVES:
            self.collectives[name] += 1
            self.collective_bytes[name] += sum(map(tensor_bytes, tensors_in(args[COLLECTIVES[name]])))
        elif func._schema.name in EXPANSIONS:
            of_ranks = [kernel for kernel in launched if kernel.name in COLLECTIVES]
            self.collectives.update(kernel.name for kernel in of_ranks)
            for kernel in of_ranks:
                self.collective_bytes[kernel.name] += kernel.bytes

    def saved_tensors(self) -> saved_tensors_hooks:
        """Within this context the storages that the forward pass saves are counted."""

        def pack(tensor: Tensor) -> Tensor:
            if self._phase == "forward":
                storage = tensor.untyped_storage()
                self.saved[storage._cdata] = storage.nbytes()
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)


@contextmanager
def labelled(trainer: Trainer, counter: StepCounter) -> Iterator[None]:
    """Within this context the trainer's parts count for their phases."""
    parts = [
        *PHASES,
        (trainer, "wrapped_model", "forward"),
        (trainer.state.optimizer, "step", "optimizer"),
    ]
    with ExitStack() as stack:
        for owner, name, phase in parts:
            stack.enter_context(mock.patch.object(owner, name, in_phase(counter, phase, getattr(owner, name))))
        yield


def in_phase(counter: StepCounter, phase: str, function: Callable) -> Callable:
    """The function, whose operators count for this phase."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with counter.phase(phase):
            return function(*args, **kwargs)

    return call
