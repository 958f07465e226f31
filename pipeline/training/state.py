"""Everything that a training step changes: what a checkpoint holds, and what a skipped step must leave alone.

Nothing random is here. Noise, data order, learning rate and beta are functions of the step.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.models.weights import check_tensors
from pipeline.training.ema import EMA
from pipeline.training.regularizers import Regularizers

Tensors = dict[str, dict[str, Tensor]]

OPTIMIZER_SLOTS = {
    torch.optim.Adamax: ("exp_avg", "exp_inf"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
}
"""What an optimizer keeps for each parameter, with its shape and dtype, besides the scalar `step`."""


class TrainingState:
    """Model, optimizer, regularizers and moving average, as named tensors."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, regularizers: Regularizers, ema: EMA | None):
        self.model = model
        self.optimizer = optimizer
        self.regularizers = regularizers
        self.ema = ema
        self._buffers = by_dtype(model.buffers())
        self._kept = [[buffer.clone() for buffer in buffers] for buffers in self._buffers]

    def remember_buffers(self) -> None:
        """Copies batch norm's running statistics: a forward pass changes them before the step is known to be finite."""
        _copy_all(self._kept, self._buffers)

    def undo_forward(self) -> None:
        """Restores what the forward passes since `remember_buffers` changed. Parameters have not changed yet."""
        _copy_all(self._buffers, self._kept)
        self.regularizers.discard()

    def apply_update(self, step: int) -> None:
        """Updates the parameters by their gradients, the moving average, and the vectors of the power iteration."""
        self.optimizer.step()
        self.regularizers.commit()
        if self.ema is not None:
            self.ema.update(self.model, step)

    def tensors(self) -> Tensors:
        """Tensors by file stem and name."""
        parts = {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "regularizers": self.regularizers.state(),
        }
        if self.ema is not None:
            parts["ema"] = self.ema.state()
        return parts

    def expected(self, updates: int) -> Tensors:
        """Tensors on the meta device with the names, shapes and dtypes that `tensors` has after `updates` updates.

        Before the first update the optimizer and the regularizers have no state.
        """
        parts = {
            "model": self.model.state_dict(),
            "optimizer": expected_optimizer_tensors(self.model, self.optimizer) if updates else {},
            "regularizers": self.regularizers.expected_state() if updates else {},
        }
        if self.ema is not None:
            parts["ema"] = self.ema.state()
        return {stem: {name: tensor.to("meta") for name, tensor in group.items()} for stem, group in parts.items()}

    def load(self, tensors: Tensors, updates: int) -> None:
        """Load what `tensors` returned after `updates` updates of the parameters (steps that were not skipped).

        Raises ValueError, naming the tensors, where one is missing, unknown, of another shape or dtype, or not finite.
        Everything is checked before anything is loaded: a fused update with a moment of another shape would write
        beyond its memory.
        """
        expected = self.expected(updates)
        if set(tensors) != set(expected):
            raise ValueError(f"the checkpoint holds {sorted(tensors)}, this run needs {sorted(expected)}")
        for stem, group in tensors.items():
            check_tensors(stem, group, expected[stem])
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
        self.regularizers.load_state(tensors["regularizers"])
        if self.ema is not None:
            self.ema.load_state(tensors["ema"])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>/<slot>`; empty before the first update."""
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]
    return {
        f"{names[index]}/{slot}": torch.as_tensor(value)
        for index, slots in sorted(state.items())
        for slot, value in sorted(slots.items())
    }


def expected_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer_tensors` after an update of all trainable parameters, as tensors on the meta device."""
    kind = type(getattr(optimizer, "optimizer", optimizer))  # Accelerate wraps the optimizer
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slots = {slot: parameter.detach().to("meta") for slot in OPTIMIZER_SLOTS[kind]}
            slots["step"] = torch.empty((), dtype=torch.float32, device="meta")
            expected |= {f"{name}/{slot}": tensor for slot, tensor in slots.items()}
    return expected


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for tensors that were checked."""
    parameters = dict(model.named_parameters())
    numbers = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, slot = name.rpartition("/")
        state.setdefault(numbers[parameter], {})[slot] = _laid_out_like(parameters[parameter], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A fused update reads a weight and its moments in memory order, so all need the same memory layout."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups of one dtype: torch copies a list with two dtypes one tensor after another."""
    groups = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    return list(groups.values())


def _copy_all(targets: list[list[Tensor]], sources: list[list[Tensor]]) -> None:
    for target, source in zip(targets, sources, strict=True):
        torch._foreach_copy_(target, source)
