"""`train.compile` together with `train.recompute`: the numbers of eager training without either, and less memory."""

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed import collectives
from pipeline.models.base import VAE, recompute_activations, use_channels_last
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE
from pipeline.run.compilation import compile_training, prepare_compiler
from pipeline.training.objective import Objective, ObjectiveConfig
from pipeline.training.train_config import TrainConfig
from tests.helpers.compiling import needs_compiler
from tests.helpers.nvae_cases import build_nvae
from tests.helpers.two_ranks import run_two_ranks, start_rank
from tests.helpers.vdvae_cases import build_vdvae

PAIRS = [*product(("cells", "whole"), ("norms", "cells"))]
SPLIT = ("whole in parts", "cells")
"""As DDP splits the graph of a model whose gradients do not fit one bucket."""
TWO_PROCESS_PAIRS = [("cells", "cells"), ("whole", "norms"), SPLIT]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_model(
    compile_mode: str, recompute: str, dtype: torch.dtype, groups: int = 1, backend: str = "aot_eager"
) -> NVAE:
    """With cells of every kind: down, up, and of the same size if there are two groups."""
    model = build_nvae(groups_per_scale=(groups,), num_postprocess_cells=1, size=8).to(dtype)
    return prepared(model, compile_mode, recompute, backend)


def prepared(model: VAE, compile_mode: str, recompute: str, backend: str = "aot_eager") -> VAE:
    use_channels_last(model)
    recompute_activations(model, recompute)
    objective = Objective(ObjectiveConfig(), model.groups, total_steps=100)
    config = TrainConfig(steps=1, compile=compile_mode.removesuffix(" in parts"))
    compile_training(config, model, objective, backend)
    return model


def train_pass(model: torch.nn.Module, unwrapped: VAE, first: int) -> Tensor:
    """On four images from position `first` on."""
    images = [torch.rand(unwrapped.image_shape, generator=torch.Generator().manual_seed(first + i)) for i in range(4)]
    dtype = next(unwrapped.parameters()).dtype
    x = torch.stack(images).to(dtype, memory_format=torch.channels_last)
    loss = -model(x, draw_noise(unwrapped.noise_groups, 1, "test", range(first, first + 4), dtype=dtype)).elbo.mean()
    loss.backward()
    return loss.detach()


def three_passes(model: torch.nn.Module, unwrapped: VAE, first: int = 0, autocast: bool = False) -> dict[str, Tensor]:
    """Losses, accumulated gradients and buffers. Nothing is compiled after the first pass."""
    losses = {}
    for number in range(3):
        mode = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with dynamo_config.patch(error_on_recompile=number > 0), mode:
            losses[f"loss {number}"] = train_pass(model, unwrapped, first + 8 * number)
    gradients = {name: parameter.grad for name, parameter in unwrapped.named_parameters()}
    return losses | gradients | dict(unwrapped.named_buffers())


def assert_same_training(found: dict[str, Tensor], eager: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each norm, and to that of the largest gradient or of the standard deviations: a true gradient or
    mean of zero has rounding noise.
    """
    largest = max(float(tensor.norm()) for name, tensor in eager.items() if name.endswith("weight"))
    for name, tensor in eager.items():
        if name.endswith("num_batches_tracked"):
            assert int(found[name]) == int(tensor) == 3, name
            continue
        scale = float(tensor.norm()) + (0 if "running" in name or "loss" in name else 1e-2 * largest)
        if name.endswith("running_mean"):
            scale += float(eager[name.replace("mean", "var")].norm().sqrt())
        assert float((found[name] - tensor).norm()) <= tolerance * scale, name


def check_one_process(compile_mode: str, recompute: str, dtype: torch.dtype, groups: int = 1) -> None:
    eager = small_model("off", "none", dtype, groups)
    model = small_model(compile_mode, recompute, dtype, groups)
    expected, found = three_passes(eager, eager), three_passes(model, model)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (1 if compile_mode == "whole" else len([*model.compilable_cells()]))
    assert_same_training(found, expected, TOLERANCE[dtype])


def test_compiled_cells_are_recomputed():
    check_one_process("cells", "cells", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("cells", "none"), ("cells", "cells"), ("whole", "cells")], ids="-".join)
def test_a_vdvae_trains_as_in_eager_mode(pair):
    """Its cells are the blocks of encoder and decoder; those of one resolution share a graph."""
    eager, model = (prepared(build_vdvae().double(), *modes) for modes in (("off", "none"), pair))
    expected, found = three_passes(eager, eager), three_passes(model, model)
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= (1 if pair[0] == "whole" else len([*model.compilable_cells()]))
    assert_same_training(found, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_training_is_that_of_eager_mode(pair, dtype):
    check_one_process(*pair, dtype, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("cells", "norms"), ("whole", "cells")], ids="-".join)
def test_mixed_precision_is_that_of_eager_mode(pair):
    eager, model = small_model("off", "none", torch.float32), small_model(*pair, torch.float32)
    expected, found = (three_passes(each, each, autocast=True) for each in (eager, model))
    assert_same_training(found, expected, 0.03)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("pair", [("cells", "cells"), ("whole", "none")], ids="-".join)
def test_an_nvae_compiled_to_machine_code_trains_as_the_eager_one(pair):
    """One latent group, one cell of each kind: compiling takes more than a minute."""
    prepare_compiler(TrainConfig(steps=1, compile=pair[0]), torch.device("cpu"))
    eager, model = small_model("off", "none", torch.float64), small_model(*pair, torch.float64, backend="inductor")
    assert_same_training(three_passes(model, model), three_passes(eager, eager), 1e-8)


def saved_bytes(model: NVAE) -> int:
    """Of the activations that a pass keeps for backward."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.rand(32, *model.image_shape).contiguous(memory_format=torch.channels_last)
        loss = model(x, draw_noise(model.noise_groups, 1, "test", range(32))).elbo.mean()
    size = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in known)
    del loss
    return size


@pytest.mark.slow
@pytest.mark.parametrize("compile_mode", ["cells", "whole"])
def test_fewer_activations_are_kept(compile_mode):
    eager = saved_bytes(small_model("off", "none", torch.float32))
    norms, cells = (saved_bytes(small_model(compile_mode, what, torch.float32)) for what in ("norms", "cells"))
    assert cells < 0.75 * norms < 0.5 * eager, (cells, norms, eager)


# ---- two processes ---------------------------------------------------------------------------------------------------


def worker(rank: int, folder: str) -> None:
    start_rank(rank, folder)
    for pair in [("off", "none"), *TWO_PROCESS_PAIRS]:
        torch.save(train_on_rank(rank, pair), os.path.join(folder, f"{'-'.join(pair)}-{rank}.pt"))
        torch._dynamo.reset()
        gc.collect()  # DDP's threads can hang where they outlive the process group
    dist.destroy_process_group()


def train_on_rank(rank: int, pair: tuple[str, str]) -> dict[str, Tensor]:
    in_parts = pair == SPLIT
    counters.clear()
    model = small_model(*pair, torch.float64)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-3 if in_parts else 25)
    with (
        patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1 if in_parts else 2**20),
        patch.object(collectives, "all_gather", Mock(wraps=collectives.all_gather)) as gather,
        patch.object(collectives, "all_reduce", Mock(wraps=collectives.all_reduce)) as reduce,
    ):
        results = three_passes(wrapped, model, first=4 * rank)
    assert not counters["graph_break"]
    assert counters["aot_autograd"]["total"] > 3 or not in_parts
    return results | {"gathers": torch.tensor(gather.call_count), "reductions": torch.tensor(reduce.call_count)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    return run_two_ranks(worker, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", TWO_PROCESS_PAIRS, ids="-".join)
def test_two_processes_repeat_no_collective(two_processes, pair):
    names = "-".join(pair), "off-none"
    found, eager = (torch.load(two_processes / f"{name}-0.pt", weights_only=True) for name in names)
    for kind in ("gathers", "reductions"):
        assert int(found.pop(kind)) == int(eager.pop(kind)) >= 18, kind
    assert_same_training(found, eager, 1e-9)
