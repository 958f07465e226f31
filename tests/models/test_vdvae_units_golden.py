"""VDVAE's published architectures and building blocks against the unit values of its reference release."""

import hashlib

import pytest
import torch
from torch import Tensor

from pipeline.models.vdvae import VDVAE
from pipeline.models.vdvae_conversion import config_from_reference, name_from_reference
from pipeline.models.vdvae_options import parse_blocks
from pipeline.nn.distributions import DiscretizedLogisticMixture, Normal, pixel_values
from tests.helpers import golden
from tests.helpers.golden import close

RECIPES = ("cifar10", "imagenet32", "imagenet64", "ffhq256", "ffhq1024")


@pytest.fixture(scope="module")
def units() -> dict:
    if golden.golden_folder() is None:
        pytest.skip("NVAE_GOLDEN_DIR is not set")
    return golden.load(golden.golden_folder() / "vdvae" / "vdvae_units.pt")


def meta_model(options: dict) -> VDVAE:
    size = options["image_size"]
    with torch.device("meta"):
        return VDVAE(config_from_reference(options), (3, size, size))


def release_name(name: str) -> str:
    """Of one of our parameters: the inverse of the table, written out again."""
    replaced = name.replace("encoder.stem", "encoder.in_conv").replace("encoder.blocks", "encoder.enc_blocks")
    replaced = replaced.replace(".bottleneck", "").replace("decoder.blocks", "decoder.dec_blocks")
    replaced = replaced.replace("posterior", "enc").replace("project", "z_proj").replace("residual", "resnet")
    replaced = replaced.replace("starts", "bias_xs").replace("decoder.output", "decoder.out_net.out_conv")
    for number in range(4):
        replaced = replaced.replace(f"convs.{number}.", f"c{number + 1}.")
    return replaced


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_architectures(units, recipe):
    """Names, shapes and order of all tensors, by their hash; their numbers; the latents."""
    expected = units["published"][recipe]
    assert set(units["published"]) == set(RECIPES)
    model = meta_model(expected["args"])
    shapes = {release_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    assert [name_from_reference(name) for name in shapes] == list(model.state_dict())
    lines = "\n".join(f"{name} {shape}" for name, shape in shapes.items())
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["names_sha256"]
    assert len(shapes) == expected["n_tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["n_params"]
    assert len(model.encoder.blocks) == expected["n_enc"]
    assert len(model.decoder.blocks) == len(model.groups) == expected["n_dec"]
    assert len(model.decoder.starts) == expected["n_bias_xs"]
    assert sum(c * h * w for _, (c, h, w) in model.groups) == expected["latent_dims"]


def test_grammar(units):
    """A token with d belongs to the encoder, one with m to the decoder."""
    for text, blocks in units["grammar"].items():
        kind = "encoder" if "d" in text else "decoder"
        assert [[resolution, other or 0] for resolution, other in parse_blocks(text, kind)] == blocks


@pytest.mark.parametrize("index", [0, 1], ids=["8 bits", "5 bits"])
def test_every_level_of_the_mixture(units, index):
    entry = units["dmol_levels"][index]
    rule = "vdvae_overlapping_5_bit" if entry["low_bit"] else "vdvae"
    logits = entry["logits"].expand(len(entry["target"]), -1, -1, -1)
    found = DiscretizedLogisticMixture(logits, 8, rule).log_prob_of_values(entry["target"])
    close(found.flatten(1).sum(1), entry["log_prob"])


def test_kl(units):
    entry = units["kl"]
    posterior = Normal(entry["q_mean"], entry["q_logsigma"])
    close(posterior.kl(Normal(entry["p_mean"], entry["p_logsigma"])), entry["kl"])


class Stub(torch.nn.Module):
    """An encoder that keeps its input."""

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        return {1: x}


@pytest.mark.parametrize("recipe", RECIPES)
def test_preprocessing(units, recipe):
    """The encoder's input of each of the 256 levels, and the value that the likelihood sees."""
    options = units["published"][recipe]["args"]
    expected, model = units["preprocess"][options["dataset"]], meta_model(options)
    model.encoder = Stub()
    levels = torch.arange(256)
    for name, dtype, slack in (("f64", torch.float64, 0.0), ("f32", torch.float32, 3e-7)):  # near zero
        close(model.features(levels.to(dtype) / 255)[1], expected[f"input_{name}"], what=name, slack=slack)
        values = pixel_values(levels.to(dtype) / 255, model.config.likelihood.bin_rule)
        close(values, expected[f"target_{name}"], what=name, slack=slack)
