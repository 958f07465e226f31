"""Reading the golden vectors: numbers that the NVAE reference release gave, in the folder named by NVAE_GOLDEN_DIR."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("NVAE_TEST_DEVICE", "cpu")
"""Where the models of the golden tests compute; `make gpu-check` sets it to cuda. What is expected stays on the CPU."""

OPTIONAL_ARCHITECTURES = ("res_bnswish", "mbconv_sep")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def golden_folder() -> Path | None:
    folder = os.environ.get("NVAE_GOLDEN_DIR")
    return Path(folder) if folder else None


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def model_files() -> list:
    """One pytest parameter per model file; a single skipped one, with the reason, where there is no folder."""
    folder = golden_folder()
    if folder is None:
        return [pytest.param(None, id="none", marks=pytest.mark.skip(reason="NVAE_GOLDEN_DIR is not set"))]
    paths = sorted(path for path in folder.glob("*.pt") if path.stem != "units")
    if not paths:
        raise FileNotFoundError(f"NVAE_GOLDEN_DIR={folder} holds no model file (*.pt)")
    return [pytest.param(path, id=path.stem) for path in paths]


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64; integers stay."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def noise(golden: dict, key: str = "eps") -> list[Tensor]:
    """The float64 noise of key eps, eps2, eps3; "zero" is noise of the same shapes."""
    if key == "zero":
        return [torch.zeros_like(eps, dtype=torch.float64, device=DEVICE) for eps in golden["eps"]]
    return [eps.double().to(DEVICE) for eps in golden[key]]


def reference_input(golden: dict) -> Tensor:
    """Model input in float64, by the rule that comes with the files."""
    x, bits = golden["x_uint8"], golden["args"]["num_x_bits"]
    if golden["args"]["dataset"] in ("mnist", "omniglot"):
        return x.double()
    return (x // 2 ** (8 - bits)).double() / (2**bits - 1)


def close(actual, expected, rtol: float = 1e-9, what: str = "", slack: float = 0.0) -> None:
    """Asserts |actual - expected| <= rtol |expected| + rtol / 100 of the largest expected value + slack, everywhere.

    Both are tensors, numbers or lists of numbers.
    """
    actual, expected = in_double(actual), in_double(expected)
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=rtol,
        atol=rtol * largest / 100 + slack,
        msg=lambda text: f"{what}\n{text}" if what else text,
    )


def in_double(value: Tensor | float | list) -> Tensor:
    return value.detach().cpu().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def close_buffers(actual: dict[str, Tensor], expected: dict[str, Tensor], slack: float = 0.0) -> None:
    """The batch-norm buffers among `actual` are exactly those expected, in names and values."""
    found = {name: tensor for name, tensor in actual.items() if name.endswith(BUFFERS)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close(found[name], tensor, what=name, slack=slack)
