"""Feature networks for the tests of sample metrics: the Inception graph with seeded weights, and a small one."""

import io
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from pipeline.evaluation.images import import_torchvision
from pipeline.evaluation.inception import Inception


def import_reference(name: str) -> ModuleType:
    """A module of torchmetrics or torch-fidelity, or skips the test."""
    import_torchvision()  # they import it, which fails with a CPU-only torch
    return pytest.importorskip(name, reason="an independent computation of sample metrics (extra `test`)")


def inception_state(seed: int) -> dict[str, Tensor]:
    """Random weights under the names of the published file, of a scale that keeps the size of activations."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    with torch.device("meta"):
        expected = Inception().state_dict()
    for name, tensor in expected.items():
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("conv.weight"):
            values *= (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.2 * values.tanh()
        else:
            values *= 0.1
        state[name] = values
    return state


def as_file(state: dict[str, Tensor]) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class SmallNetwork(nn.Module):
    """Features (B, 12) of inputs (B, 3, 299, 299): a fixed random projection of them, shrunk to 4 x 4."""

    size = 12

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(48, self.size, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.matrix
