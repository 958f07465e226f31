"""How long training waits for a checkpoint: written by the training thread, and by a background thread from a copy.

python -m benchmarks.checkpoint --mib 200 --saves 5
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_writer import CheckpointWriter


def make_state(mib: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and two moments: `mib` MiB in all, in tensors of 1 MiB."""
    tensors = [torch.randn(2**18) for _ in range(mib)]
    third = max(1, mib // 3)
    return {
        "model": {f"layer{i}": tensor for i, tensor in enumerate(tensors[:third])},
        "optimizer": {f"layer{i}": tensor for i, tensor in enumerate(tensors[third:])},
    }


def train_step(weight: torch.Tensor) -> float:
    """A few milliseconds of work, as milliseconds."""
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(weight, weight)
    return 1000 * (time.perf_counter() - start)


def measure(save: Callable[[int], None], saves: int, seconds_between: float) -> tuple[list[float], list[float]]:
    """(time that training waited for each save, time of the steps between them), ms."""
    weight, stalls, steps = torch.randn(400, 400), [], []
    for number in range(1, saves + 1):
        start = time.perf_counter()
        save(number)
        stalls.append(1000 * (time.perf_counter() - start))
        end = time.perf_counter() + seconds_between
        while time.perf_counter() < end:
            steps.append(train_step(weight))
    return stalls, steps


def report(what: str, stalls: list[float], steps: list[float]) -> None:
    first, later = stalls[0], stalls[1:]
    print(
        f"{what:<15} stall: first {first:.0f} ms, later median {statistics.median(later):.0f} ms, "
        f"longest {max(later):.0f} ms; step: median {statistics.median(steps):.1f} ms, longest {max(steps):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=200, help="size of the state (default: 200)")
    parser.add_argument("--saves", type=int, default=5, help="number of saves of each kind (default: 5)")
    parser.add_argument("--between", type=float, default=2.0, help="seconds of training between saves (default: 2)")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    state = make_state(parsed.mib)
    with tempfile.TemporaryDirectory() as folder:
        in_place = Checkpoints(Path(folder) / "in_place", keep=1)
        report("training thread", *measure(lambda step: in_place.save(step, state, {}), parsed.saves, parsed.between))
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointWriter(
            Checkpoints(Path(folder) / "background", keep=1), lambda step, message: print(message)
        ) as background,
    ):
        report("background", *measure(lambda step: background.save(step, state, {}), parsed.saves, parsed.between))


if __name__ == "__main__":
    main()
