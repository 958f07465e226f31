"""Recomputed activations: equal numbers, less memory, no second update of statistics, no more collectives."""

import copy
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ConfigError
from pipeline.distributed import collectives
from pipeline.models.base import VAE, recompute_activations, use_channels_last
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE
from pipeline.recipe import load_recipe, recipe_path
from tests.helpers.nvae_cases import build_nvae
from tests.helpers.two_ranks import run_two_ranks, start_rank
from tests.helpers.vdvae_cases import build_vdvae

WHAT = ("norms", "cells")
VARIANTS = {
    "default": {"num_flows": 1},
    "mbconv_sep": {"cells": "mbconv_sep", "squeeze_excitation": False},
    "res_bnelu": {"cells": "res_bnelu"},
}


def small_nvae(what: str, dtype: torch.dtype = torch.float32, **changes) -> NVAE:
    return recomputing(build_nvae(**changes).to(dtype), what)


def recomputing(model: VAE, what: str) -> VAE:
    use_channels_last(model)
    recompute_activations(model, what)
    return model


def batch(model: VAE, first: int, size: int = 4) -> tuple[Tensor, list[Tensor]]:
    """Images and noise at positions from `first` on."""
    dtype = next(model.parameters()).dtype
    images = [torch.rand(model.image_shape, generator=torch.Generator().manual_seed(first + i)) for i in range(size)]
    noise = draw_noise(model.noise_groups, 1, "test", list(range(first, first + size)), dtype=dtype)
    return torch.stack(images).to(dtype, memory_format=torch.channels_last), noise


def train_pass(model, x: Tensor, noise: list[Tensor], autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = -model(x, noise).elbo.mean()
    loss.backward()
    return loss.detach()


def results(model: VAE) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradients_and_statistics_are_the_same_to_the_bit(variant, precision):
    """Two accumulated passes, then one without gradients that moves the statistics, and one in evaluation."""
    found = {}
    for what in ("none", *WHAT):
        model = small_nvae(what, torch.float64 if precision == "fp64" else torch.float32, **VARIANTS[variant])
        losses = [train_pass(model, *batch(model, first), autocast=precision == "bf16") for first in (0, 4)]
        with torch.no_grad():
            losses.append(model(*batch(model, 8)).elbo)
            losses.append(model.eval()(*batch(model, 8)).elbo)
        found[what] = results(model) | {f"loss {number}": loss for number, loss in enumerate(losses)}
        assert {int(n) for name, n in model.named_buffers() if name.endswith("num_batches_tracked")} == {3}
    for what in WHAT:
        for name, tensor in found["none"].items():
            assert torch.equal(found[what][name], tensor), f"{what}: {name}"


def saved_bytes(model: VAE) -> int:
    """Of the activations that a pass keeps for backward."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*batch(model, 0, size=32)).elbo.mean()
    size = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)
    del loss
    return size


def test_fewer_activations_are_kept():
    changes = {"num_decoder_cells": 2, "num_postprocess_cells": 3}
    plain = saved_bytes(small_nvae("none", **changes))
    assert saved_bytes(small_nvae("norms", **changes)) < 0.5 * plain
    assert saved_bytes(small_nvae("cells", **changes)) < 0.2 * plain
    in_evaluation = saved_bytes(small_nvae("none", **changes).eval())
    for what in WHAT:
        assert saved_bytes(small_nvae(what, **changes).eval()) == in_evaluation


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_vdvae_recomputes_its_blocks(precision, conditional):
    found, kept = {}, {}
    for what in ("none", "cells"):
        dtype = torch.float64 if precision == "fp64" else torch.float32
        model = recomputing(
            build_vdvae(decoder_blocks="2x2,8m2,16m8,16x4", condition_size=3 * conditional).to(dtype), what
        )
        condition = torch.eye(3, dtype=dtype)[[0, 1, 2, 0]] if conditional else None
        loss = train_pass(partial(model, condition=condition), *batch(model, 0), autocast=precision == "bf16")
        found[what] = results(model) | {"loss": loss}
        kept[what] = None if conditional else saved_bytes(model)
    assert found["none"].keys() == found["cells"].keys()
    for name, tensor in found["none"].items():
        assert torch.equal(found["cells"][name], tensor), name
    assert conditional or kept["cells"] < 0.5 * kept["none"]


@pytest.mark.parametrize("what", WHAT)
def test_a_copy_of_the_model_runs_its_own_layers(what):
    """As the copy whose running statistics are estimated again for samples."""
    model = small_nvae(what)
    copied = copy.deepcopy(model)
    train_pass(copied, *batch(copied, 0))
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(int(n) for name, n in model.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    ("name", "what", "supported"),
    [("mlp_vae", "norms", "none"), ("mlp_vae", "cells", "none"), ("conv_vae", "cells", "none")],
)
def test_a_model_without_what_is_recomputed_is_refused(name, what, supported):
    message = f"train.recompute: {what} is not supported by this model; supported: {supported}"
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_path(name), [f"train.recompute={what}"])


# ---- two processes ---------------------------------------------------------------------------------------------------


def recompute_worker(rank: int, folder: str) -> None:
    start_rank(rank, folder)
    for what in ("none", *WHAT):
        model = small_nvae(what)
        wrapped = DistributedDataParallel(model)
        before = collectives.num_collectives()
        with wrapped.no_sync():
            train_pass(wrapped, *batch(model, 4 * rank))
        train_pass(wrapped, *batch(model, 8 + 4 * rank))
        number = torch.tensor(collectives.num_collectives() - before)
        torch.save(results(model) | {"collectives": number}, os.path.join(folder, f"{what}-{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    return run_two_ranks(recompute_worker, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("what", WHAT)
def test_two_processes_reuse_the_statistics_of_all(two_processes, what):
    """No collective is repeated, and no running statistic is updated twice."""
    plain, recomputed = (torch.load(two_processes / f"{name}-0.pt", weights_only=True) for name in ("none", what))
    assert int(plain["collectives"]) > 100
    largest = max(tensor.norm() for name, tensor in plain.items() if name.endswith("weight"))
    for name, tensor in plain.items():
        exact = name == "collectives" or "running" in name or "num_batches" in name
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6 * float(largest)}
        torch.testing.assert_close(recomputed[name], tensor, **tolerance, msg=lambda text, n=name: f"{n}: {text}")
