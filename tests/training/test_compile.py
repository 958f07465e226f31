"""Cells compiled one by one: one graph each, the same numbers as eager, and no second compilation."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE, NVAEConfig

COMPILERS = ("g++", "clang++", "c++")


def tiny_nvae() -> NVAE:
    torch.manual_seed(0)
    config = NVAEConfig(
        groups_per_scale=(2,),
        encoder_channels=8,
        decoder_channels=8,
        latent_channels=4,
        num_preprocess_cells=1,
        num_postprocess_cells=1,
        num_encoder_cells=1,
        num_decoder_cells=1,
    )
    return NVAE(config, (3, 16, 16)).to(memory_format=torch.channels_last)


def three_cells(model: NVAE) -> list[nn.Module]:
    """One cell that halves, one that keeps and one that doubles the resolution."""
    return [model.preprocess[0], model.decoder[1].cells[0], model.postprocess[0]]


def losses_over(model: NVAE, steps: range) -> list[float]:
    """Of a pass over different images for each step; gradients add up."""
    losses = []
    for step in steps:
        x = torch.rand(4, *model.image_shape, generator=torch.Generator().manual_seed(step))
        noise = draw_noise(model.groups, step, "compile", range(4))
        loss = -model(x, noise).elbo.mean() / model.num_dimensions
        loss.backward()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_cells_equal_eager_ones_without_breaks_or_recompilation():
    eager = tiny_nvae()
    compiled = copy.deepcopy(eager)
    cells = three_cells(compiled)
    assert set(cells) <= set(compiled.compilable_cells())
    torch._dynamo.reset()
    counters.clear()
    for cell in cells:
        cell.compile(fullgraph=True, dynamic=False)
    losses = losses_over(compiled, range(1))
    with dynamo_config.patch(error_on_recompile=True):
        losses += losses_over(compiled, range(1, 5))
    assert counters["stats"]["unique_graphs"] == len(cells)
    assert not counters["graph_break"]
    assert losses == pytest.approx(losses_over(eager, range(5)), rel=1e-5)
    largest = max(parameter.grad.norm() for parameter in eager.parameters())
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() + 1e-5 * largest
    for (name, ours), theirs in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_compilable_cells_are_the_residual_cells():
    model = tiny_nvae()
    cells = list(model.compilable_cells())
    assert len(cells) == 5
    assert {type(cell).__name__ for cell in cells} == {"ResidualCell"}
