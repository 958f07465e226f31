"""Spectral normalization of resnet_vae, with moving averages, skipped steps and checkpoints."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.base import evaluating
from pipeline.models.resnet_vae import ResNetVAE, ResNetVAEConfig, SpectralConv2d
from pipeline.training.ema import EMA
from pipeline.training.state import TrainingState
from tests.helpers.model_cases import noise_for


def build_resnet() -> ResNetVAE:
    torch.manual_seed(0)
    return ResNetVAEConfig(stem_width=3, stage_widths=(4, 6), latent_size=5).build((3, 16, 16), 0, 8).double()


def batch(model: ResNetVAE, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Four random images and their noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, noise_for(model, 4, torch.float64, seed)


def after_passes(model: ResNetVAE, passes: int) -> ResNetVAE:
    with torch.no_grad():
        for seed in range(passes):
            model(*batch(model, seed))
    return model


def test_every_convolution_has_spectral_norm_one():
    model = after_passes(build_resnet(), 100).eval()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 2 + 2 * (2 * 2 * 2) + 2 * 2  # stem and output; two in each block; a skip in every second
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.current_weight().flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_averaged_weights_keep_their_spectral_norm():
    """An average of unit vectors is shorter than 1; without a correction the norm would be above 1."""
    model = after_passes(build_resnet(), 20)
    average = EMA(model, 0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for seed in range(40):
        (-model(*batch(model, seed)).elbo.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, seed)
    with average.applied(model), evaluating(model), torch.no_grad():
        convs = [module for module in model.modules() if isinstance(module, SpectralConv2d)]
        norms = [torch.linalg.matrix_norm(conv.current_weight().flatten(1), 2).item() for conv in convs]
        uncorrected = [torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() for conv in convs]
    assert max(norms) < 1.01
    assert max(uncorrected) > max(norms) + 0.005


def test_evaluation_does_not_change_the_power_iteration_and_a_skipped_step_restores_it():
    model = after_passes(build_resnet(), 1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert sum("_u" in name for name in before) == 22
    with evaluating(model):
        model(*batch(model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    state = TrainingState(model, None, NoRegularizers(), None)
    state.remember_buffers()
    after_passes(model, 2)
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    assert len([name for name in moved if "_u" in name]) > 10
    state.undo_forward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class NoRegularizers:
    def discard(self) -> None:
        """Nothing is kept."""


def test_a_state_dict_holds_the_power_iteration():
    model = after_passes(build_resnet(), 3)
    other = build_resnet()
    other.load_state_dict(model.state_dict())
    x, noise = batch(model)
    for _ in range(2):
        assert torch.equal(model(x, noise).elbo, other(x, noise).elbo)
