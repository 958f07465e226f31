"""Every model, with each of its options, small enough to train for a few steps.

The tests of all models (test_models.py, test_model_training.py) run over this list: a new model is tested by a line.
"""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.config import build, overlay
from pipeline.models.base import VAE
from pipeline.recipe import Recipe, build_model
from pipeline.run.build import build_trainer
from pipeline.run.data import RunData
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set

ATTRIBUTES = ("Attribute_0", "Attribute_2", "Attribute_3")
BY_CLASS = {"name": "class", "num_classes": 10}
BY_ATTRIBUTES = {"name": "attributes", "chosen": ATTRIBUTES, "exclusive": (ATTRIBUTES[1:],)}
BASELINE = ("objective.schedule=constant", "objective.kl_balancing=none", "regularizers.strength=0", "optim.name=adam",
            "optim.eps=1e-8", "optim.weight_decay=0", "optim.lr=5e-3", "optim.schedule=constant")  # fmt: skip

FAST = ("optim.lr=3e-2",)
NVAE = tiny_settings(Path())["model"]
MLP = {"name": "mlp_vae", "hidden": 64, "latent_size": 8, "likelihood": {"name": "bernoulli"}}
CONV = {"name": "conv_vae", "width": 8, "latent_size": 8, "likelihood": {"name": "normal", "sigma": 0.2}}
RESNET = {"name": "resnet_vae", "stem_width": 8, "stage_widths": [8, 16], "num_blocks": 1, "latent_size": 8}
MIXTURE = {"name": "logistic_mixture", "num_components": 2}
FACES = {"name": "attribute_vae", "width": 8, "latent_size": 24, "features": 32, "embedding": 8,
         "likelihood": {"name": "normal", "sigma": 0.2}}  # fmt: skip
VDVAE = {"name": "vdvae", "encoder_blocks": "16x1,16d2,8x1,8d4,2x1", "decoder_blocks": "2x1,8m2,16m8,16x1", "width": 8,
         "widths": "2:12", "bottleneck": 0.5, "latent_channels": 3, "start_tensors_up_to": 8,
         "likelihood": {"name": "logistic_mixture", "num_components": 2, "bin_rule": "exact"}}  # fmt: skip
EFFICIENT = {"name": "efficient_vdvae", "strides": [1, 2, 4, 1], "encoder_widths": [8, 8, 12, 10],
             "decoder_widths": [6, 6, 8, 10], "encoder_blocks": [0, 1, 0, 0], "groups": [1, 2, 1, 1],
             "latent_channels": [2, 2, 3, 3], "bottleneck": [0.5],
             "likelihood": MIXTURE | {"scale": "softplus"}}  # fmt: skip
CASES = {
    "nvae": (NVAE, None, FAST),
    "nvae by class": (NVAE, BY_CLASS, FAST),
    "nvae by attributes": (NVAE | {"num_flows": 0}, BY_ATTRIBUTES, FAST),
    "nvae with one group by class": (NVAE | {"groups_per_scale": [1], "num_flows": 0}, BY_CLASS, FAST),
    "vdvae": (VDVAE, None, BASELINE),
    "vdvae by class": (VDVAE, BY_CLASS, BASELINE),
    "vdvae by attributes": (VDVAE | {"start_tensors_up_to": 0}, BY_ATTRIBUTES, BASELINE),
    "efficient_vdvae": (EFFICIENT, None, BASELINE),
    "efficient_vdvae by class": (EFFICIENT | {"residual_posterior": True}, BY_CLASS, BASELINE),
    "efficient_vdvae with logarithms of sigma": (
        EFFICIENT | {"scale": "exp", "scale_beta": 0.5, "residual_posterior": True, "outer_kernel": 3},
        None,
        BASELINE,
    ),
    "mlp_vae": (MLP, None, BASELINE),
    "mlp_vae by class": (MLP, BY_CLASS, BASELINE),
    "mlp_vae with planar flows": (MLP | {"flows": {"name": "planar", "length": 3}}, None, BASELINE),
    "mlp_vae with autoregressive flows": (MLP | {"flows": {"name": "iaf", "length": 2, "hidden": 16}}, None, BASELINE),
    "mlp_vae with discretized logistics": (MLP | {"likelihood": {"name": "discretized_logistic"}}, None, BASELINE),
    "mlp_vae with logistic mixtures": (
        MLP | {"likelihood": {"name": "logistic_mixture", "num_components": 2}},
        None,
        BASELINE,
    ),
    "conv_vae": (CONV, None, BASELINE),
    "conv_vae by attributes": (CONV | {"batch_norm": True, "activation": "leaky_relu"}, BY_ATTRIBUTES, BASELINE),
    "conv_vae with learned variance": (CONV | {"likelihood": {"name": "normal"}}, BY_CLASS, BASELINE),
    "conv_vae with flows": (CONV | {"batch_norm": True, "flows": {"name": "iaf", "hidden": 8}}, None, BASELINE),
    "resnet_vae": (RESNET, None, BASELINE),
    "resnet_vae by class": (RESNET, BY_CLASS, BASELINE),
    "resnet_vae with flows": (RESNET | {"flows": {"name": "planar", "length": 2}}, None, BASELINE),
    "attribute_vae": (FACES | {"adversary_weight": 1.0, "pull_weight": 0.01}, BY_ATTRIBUTES, BASELINE),
    "attribute_vae with concatenation and local units": (
        FACES | {"conditioning": "join", "local_channels": 1, "independence_weight": 1.0},
        BY_ATTRIBUTES,
        BASELINE,
    ),
}
"""name: (model section, condition section, overrides)."""

ONE_PER_MODEL = {section["name"]: case for case, (section, _, _) in reversed(CASES.items())}
"""model: its first case."""

TWO_PROCESS_CASES = [
    *ONE_PER_MODEL.values(),
    "conv_vae by attributes",  # batch norm
    "attribute_vae with concatenation and local units",  # a penalty over the batches of all processes
]


def write_data(root: Path) -> Path:
    """RGB images of 16x16 in 4x4 random tiles, with labels and four attributes: 41 for training, 13 for testing."""
    splits = {}
    for split, count in (("train", 41), ("test", 13)):
        made = random_samples(count, 4, 4, 3, attributes=4, seed=count)
        splits[split] = replace(made, images=made.images.repeat(4, axis=1).repeat(4, axis=2))
    return write_set(root / "labelled", splits, [10, 7])


def make_recipe(case: str, root: Path, *overrides: str) -> Recipe:
    """The recipe of a case, for the set that `write_data` makes."""
    model, condition, own_overrides = CASES[case]
    settings = tiny_settings(root) | {"model": dict(model), "condition": condition}
    return build(Recipe, overlay(settings, [*own_overrides, *overrides]))


def build_case(
    case: str, *overrides: str, dtype: torch.dtype = torch.float64
) -> tuple[VAE, torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """The model of a case in training mode, five images, their noise and their conditions.

    Every parameter is moved away from its initial value, so that no embedding is zero.
    """
    torch.manual_seed(1)
    model = build_model(make_recipe(case, Path("unused"), *overrides)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randint(0, 256, (5, *model.image_shape)).to(dtype) / 255
    return model, x, noise_for(model, 5, dtype), one_hot_conditions(model, 5, dtype)


def make_trainer(recipe: Recipe, runtime):
    return build_trainer(recipe, runtime, RunData(recipe, runtime))


def train_losses(recipe: Recipe, runtime, steps: int) -> list[float]:
    """The loss of each step, averaged over all ranks."""
    trainer = make_trainer(recipe, runtime)
    stream = iter(trainer.data.batches(0))
    losses = []
    for step in range(steps):
        assert trainer.train_step(step, [next(stream)]) is None
        losses.append(trainer.interval_scalars()["train/loss"])
        trainer.progress.step += 1
    return losses


def noise_for(model: VAE, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Standard normal noise for this many images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *group.shape, generator=generator).to(dtype) for group in model.noise_groups]


def one_hot_conditions(model: VAE, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """Conditions (count, size), a different column set in each row; None for an unconditional model."""
    if not model.condition_size:
        return None
    return torch.eye(model.condition_size, dtype=dtype)[torch.arange(count) % model.condition_size]
