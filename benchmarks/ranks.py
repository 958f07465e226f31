"""Two processes of one machine, on CPUs or on one GPU, that train the same model. gpu.py and gpu_check.py use it.

python -m benchmarks.ranks STEPS RECIPE [section.key=value ...]     what each process runs
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def train_on_ranks(processes: int, steps: int, recipe: str, *overrides: str, timeout: float = 120) -> dict[str, Any]:
    """What `main` prints on rank 0. Raises RuntimeError with the errors of a process that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # LOCAL_RANK 0 for each: they share the first GPU.
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port} | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    command = [sys.executable, "-m", "benchmarks.ranks", str(steps), recipe, *overrides]
    with ExitStack() as stack:
        ranks = []
        for rank in range(processes):
            environment = os.environ | {name: str(value) for name, value in (shared | {"RANK": rank}).items()}
            options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, text=True, **options))
            stack.callback(process.kill)
            ranks.append(process)
        outputs = [process.communicate(timeout=timeout) for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"exit code {process.returncode}: {errors[-2000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def main() -> None:
    """Prints the loss of each of STEPS steps, then the seconds of a step, as JSON."""
    from benchmarks.steps import new_trainer, read_recipe, seconds_per_step, train

    steps, recipe, *overrides = sys.argv[1:]
    trainer = new_trainer(read_recipe(recipe, *overrides))
    with trainer.runtime.closing():
        losses: list[float] = []
        train(trainer, int(steps), after=lambda: losses.append(trainer.interval_scalars()["train/loss"]))
        seconds = seconds_per_step(trainer, warm_up=1, count=2)
        if trainer.runtime.is_main:
            facts = {"processes": trainer.runtime.world_size, "device": trainer.runtime.device_name}
            print(json.dumps(facts | {"losses": losses, "seconds": seconds}))


if __name__ == "__main__":
    main()
