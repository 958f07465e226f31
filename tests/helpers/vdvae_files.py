"""Files as VDVAE's reference release writes them, and the recipes that describe their models."""

from collections import OrderedDict
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pipeline.models.vdvae_conversion import PIXELS
from tests.helpers.recipes import merged, tiny_settings

TINY = {
    "name": "vdvae",
    "encoder_blocks": "16x2,16d2,8x1,8d4,2x1",
    "decoder_blocks": "2x1,8m2,8x1,16m8,16x2",
    "width": 6,
    "widths": "2:10",
    "bottleneck": 0.5,
    "latent_channels": 2,
    "start_tensors_up_to": 8,
    "pixel_mean": PIXELS["cifar10"][0],
    "pixel_std": PIXELS["cifar10"][1],
    "likelihood": {"name": "logistic_mixture", "num_components": 2, "bin_rule": "vdvae"},
}
"""A model for images of 16x16."""


def tiny_vdvae_settings(**sections: dict) -> dict:
    """A recipe of this model. `sections`: values to change."""
    settings = tiny_settings("data") | {"model": TINY, "regularizers": {"strength": 0.0}}
    return merged(merged(settings, {"train": {"ema_decay": 0.0}}), sections)


def write_vdvae_recipe(path: Path, **sections: dict) -> Path:
    path.write_text(yaml.safe_dump(tiny_vdvae_settings(**sections)))
    return path


def tiny_state() -> "OrderedDict[str, Tensor]":
    """Random weights of the tiny model under the release's names, from the table of names and shapes in its
    specification.
    """
    generator = torch.Generator().manual_seed(3)
    return OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in tiny_shapes().items())


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    """By the release's names."""
    widths, encoder, decoder = {16: 6, 8: 6, 2: 10}, [16, 16, 16, 8, 8, 2], [2, 8, 8, 16, 16, 16]
    z, mixtures, shapes = 2, 2, {}

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, kernel, kernel), (outputs,)

    def block(name: str, inputs: int, outputs: int, resolution: int) -> None:
        inner, kernel = widths[resolution] // 2, 3 if resolution > 2 else 1
        for number, (first, last, size) in enumerate(
            [(inputs, inner, 1), (inner, inner, kernel), (inner, inner, kernel), (inner, outputs, 1)], 1
        ):
            conv(f"{name}.c{number}", first, last, size)

    conv("encoder.in_conv", 3, 6, 3)
    for number, r in enumerate(encoder):
        block(f"encoder.enc_blocks.{number}", widths[r], widths[r], r)
    shapes["decoder.gain"] = shapes["decoder.bias"] = (1, 6, 1, 1)
    for number, r in enumerate(decoder):
        name, w = f"decoder.dec_blocks.{number}", widths[r]
        block(f"{name}.enc", 2 * w, 2 * z, r)
        block(f"{name}.prior", w, 2 * z + w, r)
        conv(f"{name}.z_proj", z, w, 1)
        block(f"{name}.resnet", w, w, r)
    shapes["decoder.bias_xs.0"], shapes["decoder.bias_xs.1"] = (1, 10, 2, 2), (1, 6, 8, 8)
    conv("decoder.out_net.out_conv", 6, 10 * mixtures, 1)
    return shapes


def write_vdvae_file(path: Path, state: object = None, prefix: str = "") -> Path:
    state = tiny_state() if state is None else state
    named = OrderedDict((prefix + name, value) for name, value in state.items()) if prefix else state
    torch.save(named, path)
    return path
