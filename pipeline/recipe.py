"""A whole experiment as one frozen config: every section, and the checks that span them.

`python -m pipeline.recipe > docs/settings.md` writes the list of all settings.
"""

from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from pipeline.config import ConfigError, build, document, load_yaml, overlay
from pipeline.data.loader import DataConfig
from pipeline.evaluation.likelihood_bounds import ValidationConfig
from pipeline.evaluation.sample_grids import SamplesConfig
from pipeline.models.attribute_vae import AttributeVAEConfig
from pipeline.models.base import VAE
from pipeline.models.classifier import FrozenClassifier
from pipeline.models.conditions import Condition
from pipeline.models.conv_vae import ConvVAEConfig
from pipeline.models.mlp_vae import MLPVAEConfig
from pipeline.models.nvae import NVAEConfig
from pipeline.models.resnet_vae import ResNetVAEConfig
from pipeline.schema import Section
from pipeline.storage.checkpoint import CheckpointConfig
from pipeline.tracking.tracker import TrackingConfig
from pipeline.training.objective import ObjectiveConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.regularizers import RegularizerConfig
from pipeline.training.train_config import TrainConfig

RECIPES = Path(__file__).parent / "configs"


Model = Annotated[
    NVAEConfig | MLPVAEConfig | ConvVAEConfig | ResNetVAEConfig | AttributeVAEConfig, Field(discriminator="name")
]
"""Every model's section; `model.name` tells them apart."""


class Recipe(Section):
    """Everything that determines a run, but for the number of processes."""

    model: Model
    data: DataConfig
    condition: Condition | None = None
    train: TrainConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    regularizers: RegularizerConfig = RegularizerConfig()
    optim: OptimConfig = OptimConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _spans_sections(self) -> Self:
        train = self.train
        if (train.steps is None) == (train.epochs is None):
            raise ValueError("train: give one of train.steps and train.epochs")
        if train.batch_size % train.images_per_pass:
            sizes = [size for size in range(1, train.batch_size + 1) if train.batch_size % size == 0]
            raise ValueError(
                f"train.micro_batch: {train.micro_batch} does not divide train.batch_size={train.batch_size}; "
                f"{sizes} do"
            )
        if self.regularizers.strength and not self.model.supports_regularizers:
            raise ValueError(
                f"regularizers.strength={self.regularizers.strength:g}: the penalties are made for NVAE's layers; "
                f"model.name={self.model.name} needs regularizers.strength=0"
            )
        with torch.device("meta"):
            build_model(self)  # the model's own checks: sizes that the scales divide, channels, likelihood
        return self


def build_model(recipe: Recipe, classifier: FrozenClassifier | None = None) -> VAE:
    """The recipe's model, initialized from torch's global generator.

    `classifier`: of a model that trains with one (`classifier_folder`); evaluation does without.
    """
    data = recipe.data
    side = data.size + 2 * data.pad
    extra = {} if classifier is None else {"classifier": classifier}
    return recipe.model.build((data.channels, side, side), data.pad, data.bits, recipe.condition, **extra)


def recipe_path(name: str) -> Path:
    """The recipe that `--model NAME` means. Raises ConfigError with the names there are."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ConfigError(f"--model {name}: there is no such recipe; known: {known}")
    return path


def load_recipe(path: Path, words: list[str], data_root: str | None = None) -> Recipe:
    """The recipe file under the words of the command line. Raises ConfigError naming each fault."""
    data = _one_duration(overlay(load_yaml(path), words), words)
    if data_root is not None:
        data.setdefault("data", {})["root"] = data_root
    return build(Recipe, data)


def _one_duration(data: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """`train.epochs=` on the command line replaces the recipe's `train.steps`, and the other way round."""
    said = {word.removeprefix("--").partition("=")[0] for word in words} & {"train.steps", "train.epochs"}
    if len(said) == 1:
        other = ({"train.steps", "train.epochs"} - said).pop().removeprefix("train.")
        data["train"].pop(other, None)
    return data


def total_steps(recipe: Recipe, epoch_size: int) -> int:
    """Optimizer steps of the whole run; an epoch has `epoch_size` images."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, round(recipe.train.epochs * epoch_size / recipe.train.batch_size))


def settings_page() -> str:
    """docs/settings.md: every setting, its default and what it means."""
    head = """# Settings

Every setting of a recipe, with its default: in the recipe's file, or on the command line as `section.key=value`.
`pipeline/train.py ... --dry-run` prints the values that a run would have.
"""
    return head + "\n".join(document(Recipe)) + "\n"


if __name__ == "__main__":
    print(settings_page(), end="")
