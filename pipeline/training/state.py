"""Everything that a training step changes: what a checkpoint holds, and what a skipped step must leave alone.

Nothing random is here. Noise, data order, learning rate and beta are functions of the step.
"""

import torch
from torch import Tensor, nn

from pipeline.training.ema import EMA
from pipeline.training.regularizers import Regularizers

Tensors = dict[str, dict[str, Tensor]]


class TrainingState:
    """Model, optimizer, regularizers and moving average, seen as named tensors."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, regularizers: Regularizers, ema: EMA | None):
        self.model = model
        self.optimizer = optimizer
        self.regularizers = regularizers
        self.ema = ema
        self._buffers = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def remember_buffers(self) -> None:
        """Keeps batch norm's running statistics as they are now: a forward pass moves them before the step is known
        to be sound.
        """
        _copy_all(self._kept, self._buffers)

    def undo_forward(self) -> None:
        """Puts back what the forward passes since `remember_buffers` changed. Parameters have not moved yet."""
        _copy_all(self._buffers, self._kept)
        self.regularizers.discard()

    def apply_update(self, step: int) -> None:
        """Moves parameters by the gradients at hand, and with them the moving average and the power iteration."""
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

    def load(self, tensors: Tensors) -> None:
        """The inverse of `tensors`. Raises ValueError naming what is missing or does not fit."""
        expected = set(self.tensors())
        if set(tensors) != expected:
            raise ValueError(f"the checkpoint holds {sorted(tensors)}, this run needs {sorted(expected)}")
        load_model(self.model, tensors["model"])
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
        self.regularizers.load_state(tensors["regularizers"])
        if self.ema is not None:
            self.ema.load_state(tensors["ema"])


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strictly loads a state dict. Raises ValueError with the first names that do not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {error}") from None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>/<slot>`; empty before the first update."""
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]
    return {
        f"{names[index]}/{slot}": torch.as_tensor(value)
        for index, slots in sorted(state.items())
        for slot, value in sorted(slots.items())
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises ValueError for a name that the model does not have."""
    parameters = dict(model.named_parameters())
    numbers = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, slot = name.rpartition("/")
        if parameter not in numbers:
            raise ValueError(f"the optimizer's state names {parameter!r}, which this model does not have")
        state.setdefault(numbers[parameter], {})[slot] = _laid_out_like(parameters[parameter], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Fused updates walk a weight and its moments in memory order, so these must lie in memory as the weight does."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
