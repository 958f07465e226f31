"""Exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Tensor | None], str]
"""A module's dictionary of parameters or buffers, and a key of it."""


class EMA:
    """A moving average of the parameters and floating-point buffers of `model`; other buffers are copied.

    With `warmup` the decay at optimizer step s is min(decay, (1 + s) / (10 + s)), so that the random initial weights
    fade quickly; without, it is `decay` at every step. The averaged tensors have the layout, device and precision of
    the model's, and are named as in its `state_dict`.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} of the moving average is not in [0, 1)")
        self.decay, self.warmup = decay, warmup
        self._average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        floating = [name for name, tensor in self._average.items() if tensor.is_floating_point()]
        self._floating, self._other = floating, [name for name in self._average if name not in set(floating)]
        self._places: tuple[nn.Module, dict[str, Place]] = model, _places(model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Updates the average with the weights after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        if self._places[0] is not model:
            self._places = model, _places(model)
        average, live = self._pairs(self._floating)
        torch._foreach_lerp_(average, live, 1 - decay)
        average, live = self._pairs(self._other)
        if average:
            torch._foreach_copy_(average, live)

    def _pairs(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """The averaged tensors and the model's."""
        places = [self._places[1][name] for name in names]
        return [self._average[name] for name in names], [tensors[key] for tensors, key in places]

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


def _places(model: nn.Module) -> dict[str, Place]:
    """Where the model holds its tensors, by name. Unlike the tensors the places stay, also after `model.to`.

    `state_dict` takes 15 ms for the thousands of tensors of an NVAE.
    """
    return {
        f"{prefix}.{key}" if prefix else key: (tensors, key)
        for prefix, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for key in tensors
    }
