"""Trains two steps with the trainer's loop, once eager and once compiled by a compiler that is slow on rank 1, and
writes the parameters and buffers of both. test_compile.py launches it.
"""

import sys
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).parents[2])

from pipeline.distributed.runtime import Runtime  # noqa: E402
from tests.helpers.compiling import no_compiler_needed  # noqa: E402
from tests.helpers.model_cases import make_recipe, make_trainer  # noqa: E402

data, out = Path(sys.argv[1]), Path(sys.argv[2])
runtime = Runtime("fp64", cpu_threads=1, collective_timeout=4.0)
compiled_at: list[int] = []


def slow_compiler(graph, inputs):
    compiled_at.append(trainer.step)
    time.sleep(6 * runtime.rank)
    return graph.forward


options = "train.precision=fp64", "train.steps=2", "train.micro_batch=4"
states = {}
with no_compiler_needed(slow_compiler), runtime.closing():
    for mode in ("off", "whole"):
        trainer = make_trainer(make_recipe("conv_vae by attributes", data, *options, f"train.compile={mode}"), runtime)
        assert trainer.fit()
        states[mode] = trainer.model.state_dict()
        del trainer.wrapped_model
    assert compiled_at == [0, 0], compiled_at  # model and objective, on every rank before the first step
    if runtime.is_main:
        torch.save(states, out)
