"""Exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """A moving average of the parameters and floating-point buffers of `model`; other buffers are copied.

    At optimizer step s the decay is min(decay, (1 + s) / (10 + s)), so that the random initial weights fade quickly.
    The averaged tensors have the layout, device and precision of the model's, and are named as in its `state_dict`.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} of the moving average is not in [0, 1)")
        self.decay = decay
        self._average = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Updates the average with the weights after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = model.state_dict()
        floating = [name for name, tensor in self._average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self._average[name] for name in floating], [live[name] for name in floating], 1 - decay)
        for name in self._average.keys() - set(floating):
            self._average[name].copy_(live[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside this context `model` has the averaged weights; afterwards it has its own again, bit for bit.

        Changes of the model's weights or buffers inside the context are lost.
        """
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _copy(self._average, model.state_dict())
        try:
            yield
        finally:
            _copy(own, model.state_dict())

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by their names in the model, as a checkpoint stores them. Not a copy."""
        return dict(self._average)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned. Raises ValueError if the names or shapes are those of another model."""
        for name in self._average.keys() ^ state.keys():
            raise ValueError(f"moving average: {name!r} is in only one of the checkpoint and the model")
        for name, tensor in state.items():
            ours, theirs = tuple(self._average[name].shape), tuple(tensor.shape)
            if ours != theirs:
                raise ValueError(f"moving average: {name!r} is {theirs} in the checkpoint and {ours} in the model")
        _copy(state, self._average)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copies values into the target's tensors, which keep their storage and layout."""
    for name, tensor in target.items():
        tensor.copy_(source[name])
