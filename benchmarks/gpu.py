"""What training costs on one GPU, in ten minutes at most. The most valuable parts come first.

    make gpu
    python -m benchmarks.gpu [--parts profile-cifar10 depthwise ...] [--out FOLDER]

  profile-*     a step of the recipe at the paper's batch per GPU: speed, kernels launched, share of the time in which
                the GPU is busy, the twenty most expensive operators
  depthwise     the 5x5 depthwise convolution of the decoder (1,536 channels, 16x16, bf16), in several ways
  steps-*       speed, peak memory and model FLOPs utilization of nvae_cifar10, by train.compile, train.recompute and
                batch size
  cuda-graph    forward and backward captured as one CUDA graph, against the same launched one by one
  two-processes two processes with gloo that share the GPU: that it works, and what gloo costs
  checkpoint    how long training waits for a checkpoint
  loader        how long training waits for data, with worker processes

Results are in benchmarks/results/gpu.json and gpu.md, with the machine. Parts run in processes of their own; what a
part had found when it failed or when its time was over is kept.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import noise_set
from benchmarks.parts import ROOT, Part, Record, Report, parse, reason, run_all
from benchmarks.ranks import train_on_ranks
from benchmarks.steps import (
    EPOCH_SIZES,
    SMALL,
    free_memory,
    new_runtime,
    new_trainer,
    one_gpu_recipe,
    peak_gib,
    sample_noise,
    seconds_per_step,
    synchronize,
    train,
    without_compiling,
)
from pipeline.recipe import Recipe, build_model
from pipeline.run.build import build_trainer
from pipeline.run.data import RunData
from pipeline.run.flops import peak_flops, step_flops
from pipeline.run.step_profile import NUM_ROWS, summarize
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_writer import CheckpointWriter
from pipeline.training.trainer import Cadence, Trainer

SECONDS = 600
RECOMPUTE = ("none", "norms", "cells")
BATCHES = (32, 16, 64, 128, 200)


# ------------------------------------------------------------------------------------------------------- whole steps


def flops_per_image(recipe: Recipe) -> int:
    with torch.device("meta"):
        return step_flops(build_model(recipe), batch_size=1)


def speed(trainer: Trainer, flops: int, warm_up: int, steps: int) -> Record:
    """Of training steps. `flops`: of a step, for one image."""
    seconds = seconds_per_step(trainer, warm_up, steps)
    images_per_second = trainer.config.batch_size / seconds
    peak = peak_flops(trainer.runtime.device_name, trainer.config.precision)
    return {
        "images/s": images_per_second,
        "ms/step": 1000 * seconds,
        "peak GiB": peak_gib(),
        "MFU": images_per_second * flops / peak if peak else None,
    }


def counted_kernels(name: str) -> int | None:
    """Kernels per step that `python -m benchmarks.counts` expects on one GPU; None where nobody has counted."""
    path = ROOT / "benchmarks" / "counts.json"
    return json.loads(path.read_text())["recipes"][name]["1"]["kernels"] if path.is_file() else None


def profile(name: str) -> Callable[[Report, bool], None]:
    def work(report: Report, tiny: bool) -> None:
        warm_up, steps = (1, 1) if tiny else (10, 5)
        recipe = one_gpu_recipe(name, tiny)
        trainer = new_trainer(recipe, epoch_size=EPOCH_SIZES[name])
        report(recipe=name, batch=recipe.train.batch_size, **speed(trainer, flops_per_image(recipe), warm_up, steps))
        summaries = []
        profiler = trainer.runtime.profiler(0, 1, steps, lambda done: summaries.append(summarize(done, steps)))
        with profiler:
            train(trainer, 1 + steps, after=profiler.step)
        summary = summaries[0]
        counted = counted_kernels(name)
        figures = {"kernels/step": summary.kernels, "counted": counted, "GPU busy": summary.busy}
        report(**figures, **{"ms/step, recorded": summary.step_ms})
        for row in summary.operators[:NUM_ROWS]:
            report(operator=row.name, calls=row.calls, **{"GPU ms": row.device_ms, "CPU ms": row.cpu_ms})

    return work


def grid(compile_mode: str) -> Callable[[Report, bool], None]:
    """Every `train.recompute` and batch size with one `train.compile`, until the time is over."""

    def work(report: Report, tiny: bool) -> None:
        flops = flops_per_image(one_gpu_recipe("nvae_cifar10", tiny))
        too_large: dict[str, int] = {}  # recompute -> the batch that did not fit
        for batch, recompute in product(BATCHES[:1] if tiny else BATCHES, RECOMPUTE):
            if batch >= too_large.get(recompute, batch + 1):
                continue
            variant = {"compile": compile_mode, "recompute": recompute, "batch": batch}
            settings = [f"train.compile={compile_mode}", f"train.recompute={recompute}"]
            try:
                with without_compiling(tiny):
                    found = measure(batch, settings, flops, tiny)
            except torch.OutOfMemoryError:
                too_large[recompute] = batch
                found = dict.fromkeys(("images/s", "ms/step", "peak GiB", "MFU")) | {"note": "out of memory"}
            report(**variant, **found)
            free_memory()

    return work


def measure(batch: int, overrides: Sequence[str], flops: int, tiny: bool) -> Record:
    free_memory()
    recipe = one_gpu_recipe("nvae_cifar10", tiny, *overrides, f"train.batch_size={8 if tiny else batch}")
    return speed(new_trainer(recipe), flops, *((1, 1) if tiny else (4, 4))) | {"note": ""}


# ----------------------------------------------------------------------------------------------------- single kernels


def timed(work: Callable[[], object], tiny: bool) -> float:
    """Milliseconds of one call, after three calls."""
    count = 2 if tiny else 50
    for _ in range(3):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    synchronize()
    return 1000 * (time.perf_counter() - start) / count


def depthwise(report: Report, tiny: bool) -> None:
    """By memory layout and kernel. Bytes: two tensors of this size in forward, four in backward."""
    batch, channels, side = (2, 8, 8) if tiny else (32, 1536, 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "dtype": torch.bfloat16}
    weight = torch.randn(channels, 1, 5, 5, **options, requires_grad=True)

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=2, groups=channels)

    compiled = torch.compile(convolve, backend="eager" if tiny else "inductor")
    cudnn, channels_last, nchw = torch.backends.cudnn, torch.channels_last, torch.contiguous_format
    # torch 2.13 can force cuDNN for NCHW; without that it takes the native kernel for bf16.
    forced = {"depthwise_kernel": "cudnn"} if hasattr(cudnn, "depthwise_kernel") else {}
    variants = (
        ("cuDNN, channels_last, benchmark", channels_last, {"enabled": True, "benchmark": True}, convolve),
        ("cuDNN, channels_last", channels_last, {"enabled": True}, convolve),
        ("native kernel, NCHW", nchw, {"enabled": False}, convolve),
        ("cuDNN, NCHW, benchmark", nchw, {"enabled": True, "benchmark": True, **forced}, convolve),
        ("Inductor, channels_last", channels_last, {"enabled": True, "benchmark": True}, compiled),
        ("Inductor, NCHW", nchw, {"enabled": True, "benchmark": True}, compiled),
    )
    for name, layout, flags, conv in variants:
        x = torch.randn(batch, channels, side, side, **options).contiguous(memory_format=layout).requires_grad_()
        gradient = torch.randn_like(x)
        with cudnn.flags(**flags):
            found = dict.fromkeys(("forward ms", "forward + backward ms", "GB/s")) | {"note": ""}
            try:
                found["forward ms"] = timed(lambda conv=conv, x=x: conv(x), tiny)
                both = timed(lambda conv=conv, x=x, g=gradient: conv(x).backward(g), tiny)
                found |= {"forward + backward ms": both, "GB/s": 6 * x.numel() * x.element_size() / both / 1e6}
            except Exception as error:
                found["note"] = reason(error)
        report(variant=name, **found)


def cuda_graph(report: Report, tiny: bool) -> None:
    """The bound without beta and penalties: no number comes from the host."""
    recipe = one_gpu_recipe("nvae_cifar10", tiny)
    trainer = new_trainer(recipe)
    x, _ = trainer.data.model_inputs(next(trainer.data.batches(0)))
    noise = sample_noise(trainer.model, len(x), x.device, x.dtype)

    def forward_backward() -> None:
        trainer.wrapped_model(x, noise, None).elbo.mean().neg().backward()

    eager = timed(forward_backward, tiny)
    report(variant="eager", ms=eager, **{"peak GiB": peak_gib()})
    if not torch.cuda.is_available():
        return
    trainer.state.optimizer.zero_grad(set_to_none=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward()
    torch.cuda.current_stream().wait_stream(stream)
    trainer.state.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_backward()
    report(variant="CUDA graph", ms=timed(graph.replay, tiny), **{"peak GiB": peak_gib()})


# --------------------------------------------------------------------------------------------------- around the steps


def two_processes(report: Report, tiny: bool) -> None:
    small = [*SMALL, "train.batch_size=8", "train.precision=fp32"] if tiny else ["train.batch_size=32"]
    for processes in (2,) if tiny else (1, 2):
        found = train_on_ranks(processes, 2, "nvae_cifar10", *small)
        report(processes=found["processes"], device=found["device"], **{"ms/step": 1000 * found["seconds"]})


def checkpoint(report: Report, tiny: bool) -> None:
    trainer = new_trainer(one_gpu_recipe("nvae_cifar10", tiny))
    train(trainer, 2)
    tensors = trainer.state.tensors()
    mib = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        with CheckpointWriter(checkpoints, lambda step, message: report(step=step, problem=message)) as writer:
            for number in range(2 if tiny else 4):
                stall = writer.save(trainer.step, trainer.state.tensors(), {})
                report(save=number, MiB=mib, **{"training waits ms": stall})
                train(trainer, 1 if tiny else 20)


def loader(report: Report, tiny: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = noise_set(Path(folder), 16 if tiny else 32, 3, 64 if tiny else 4000)
        steps = 2 if tiny else 30
        overrides = (f"data.root={root}", f"train.steps={2 * steps}", "validation.split=train")
        recipe = one_gpu_recipe("nvae_cifar10", tiny, *overrides)
        runtime = new_runtime(recipe)
        trainer = build_trainer(recipe, runtime, RunData(recipe, runtime))
        trainer.fit([Cadence(steps, lambda step: report(step=step, **trainer.throughput.report()))])


PARTS = (
    Part("profile-cifar10", 65, profile("nvae_cifar10")),
    Part("profile-celeba64", 65, profile("nvae_celeba64")),
    Part("depthwise", 30, depthwise),
    Part("steps-eager", 90, grid("off")),
    Part("steps-cells", 100, grid("cells")),
    Part("steps-whole", 100, grid("whole")),
    Part("cuda-graph", 35, cuda_graph),
    Part("two-processes", 40, two_processes),
    Part("checkpoint", 25, checkpoint),
    Part("loader", 35, loader),
)


def main() -> int:
    """Exit codes: 0 done, 1 a part failed or was cut off, 2 no GPU."""
    parsed = parse("benchmarks.gpu", __doc__, PARTS, "benchmarks/results")
    results = run_all("benchmarks.gpu", parsed, PARTS, "Training on one GPU", SECONDS)
    return 0 if results is None or all(how.startswith("done") for how in results.ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
