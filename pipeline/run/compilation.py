"""`train.compile`: what torch.compile compiles in a run, whether it works on this machine, and where it keeps its code.

`cells`: the model's cells one by one, in training and in evaluation. `whole`: the model's training pass and the
objective, each as one graph; evaluation and samples stay eager, and so do regularizers and optimizer.
"""

import logging
import os

import torch
from torch import Tensor

from pipeline.data.remote import default_cache
from pipeline.models.base import VAE, compile_cells
from pipeline.training.objective import Objective
from pipeline.training.train_config import TrainConfig


def prepare_compiler(config: TrainConfig, device: torch.device) -> None:
    """Sets the compiler up, and compiles one addition. Raises ValueError where that does not work on this machine.

    Compiled code is kept in TORCHINDUCTOR_CACHE_DIR, so that a resumed run does not compile again. By default that is
    in the user's cache, not in the run folder, whose files must never be executed.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_cache() / "torchinductor"))
    try:
        from torch._inductor import config as inductor

        if config.channels_last and "TORCHINDUCTOR_FORCE_LAYOUT_OPT" not in os.environ:
            # torch 2.13 finds no convolutions in backward graphs, and would compute them in contiguous format.
            inductor.force_layout_optimization = True
        torch.compile(_add_one)(torch.zeros(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        raise ValueError(
            f"train.compile={config.compile}: the compiler does not work on this machine: {_reason(error)}; "
            f"{_fix(device)}, or set train.compile=off"
        ) from error


def compile_training(config: TrainConfig, model: VAE, objective: Objective, backend: str = "inductor") -> None:
    """Compiles what the setting says, each part when it is first called. `backend`: of torch.compile."""
    # It warns of in-place operations in recomputed regions. Ours change running statistics, which no region reads.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if config.compile == "cells":
        compile_cells(model, backend)
    elif config.compile == "whole":
        for part in (model, objective):
            part.compile(backend=backend, fullgraph=True, dynamic=False)


def _add_one(x: Tensor) -> Tensor:
    return x + 1


def _reason(error: BaseException) -> str:
    """The line of a compiler's output that names the error, or the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])


def _fix(device: torch.device) -> str:
    if device.type == "cuda":
        return "install triton, which PyTorch's CUDA builds bring, and a C compiler (gcc)"
    return "install a C++ compiler (g++), or name one in the variable CXX"
