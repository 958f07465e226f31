"""A whole experiment as one frozen config: all sections, and the checks that involve several of them.

`python -m pipeline.recipe > docs/settings.md` writes the list of all settings.
"""

import argparse
import json
import sys
from difflib import get_close_matches
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from pipeline.config import ALIASES, ConfigError, build, flatten, load_yaml, overlay, sections_in, tag_of
from pipeline.data.loader import DataConfig
from pipeline.evaluation.likelihood_bounds import ValidationConfig
from pipeline.evaluation.sample_grids import SamplesConfig
from pipeline.models.attribute_vae import AttributeVAEConfig
from pipeline.models.base import VAE, recompute_activations
from pipeline.models.classifier import FrozenClassifier
from pipeline.models.conditions import Condition
from pipeline.models.conv_vae import ConvVAEConfig
from pipeline.models.efficient_vdvae import EfficientVDVAEConfig
from pipeline.models.mlp_vae import MLPVAEConfig
from pipeline.models.nvae import NVAEConfig
from pipeline.models.resnet_vae import ResNetVAEConfig
from pipeline.models.vdvae import VDVAEConfig
from pipeline.schema import Section
from pipeline.storage.checkpoint import CheckpointConfig
from pipeline.tracking.tracker import TrackingConfig
from pipeline.training.objective import ObjectiveConfig
from pipeline.training.optim import OptimConfig
from pipeline.training.regularizers import RegularizerConfig
from pipeline.training.train_config import TrainConfig

RECIPES = Path(__file__).parent / "configs"


Model = Annotated[
    NVAEConfig
    | VDVAEConfig
    | EfficientVDVAEConfig
    | MLPVAEConfig
    | ConvVAEConfig
    | ResNetVAEConfig
    | AttributeVAEConfig,
    Field(discriminator="name"),
]
"""Every model's section; `model.name` selects one."""


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
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _spans_sections(self) -> Self:
        train = self.train
        if (train.steps is None) == (train.epochs is None):
            raise ValueError("train: give one of train.steps and train.epochs")
        if train.batch_size % train.images_per_pass:
            raise ValueError(
                f"train.micro_batch: {train.micro_batch} does not divide train.batch_size={train.batch_size}; "
                f"{divisors(train.batch_size)} do"
            )
        if self.regularizers.strength and not self.model.supports_regularizers:
            raise ValueError(
                f"regularizers.strength={self.regularizers.strength:g}: the penalties are made for NVAE's layers; "
                f"model.name={self.model.name} needs regularizers.strength=0"
            )
        likelihood = self.model.likelihood
        if getattr(likelihood, "makes_5_bits", False) and self.data.bits != 8:
            raise ValueError(
                f"data.bits={self.data.bits}: model.likelihood.bin_rule={likelihood.bin_rule} makes 5 bits of 8-bit "
                "images itself; set data.bits=8"
            )
        with torch.device("meta"):
            model = build_model(self)  # the model's own checks: sizes that the scales divide, channels, likelihood
        recompute_activations(model, train.recompute)
        return self


def divisors(number: int) -> list[int]:
    """The positive divisors, ascending."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def build_model(recipe: Recipe, classifier: FrozenClassifier | None = None) -> VAE:
    """The recipe's model, initialized from torch's global generator.

    `classifier`: for a model that trains with one (`classifier_folder`); evaluation needs none.
    """
    data = recipe.data
    side = data.size + 2 * data.pad
    extra = {} if classifier is None else {"classifier": classifier}
    return recipe.model.build((data.channels, side, side), data.pad, data.bits, recipe.condition, **extra)


def shipped_recipes() -> list[str]:
    """The names that `--model` accepts."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The recipe that `--model NAME` means. Raises ConfigError with the names there are."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = shipped_recipes()
        close = get_close_matches(name, known, n=1)
        hint = "a file is named with --config; " if Path(name).exists() else ""
        hint = f"did you mean {close[0]}? " if close else hint
        raise ConfigError(f"--model {name}: there is no such recipe; {hint}known: {', '.join(known)}")
    return path


def load_recipe(path: Path, overrides: list[str], data_root: str | None = None) -> Recipe:
    """The recipe file with the overrides of the command line. Raises ConfigError that names each invalid setting."""
    if not path.exists() and path.name in shipped_recipes():
        raise ConfigError(f"--config {path}: no such file; did you mean --model {path.name}?")
    data = _one_duration(overlay(load_yaml(path), overrides), overrides)
    if data_root is not None:
        data.setdefault("data", {})["root"] = data_root
    return build(Recipe, data)


def _one_duration(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`train.epochs=` on the command line replaces the recipe's `train.steps`, and the other way round."""
    given = {override.removeprefix("--").partition("=")[0] for override in overrides} & {"train.steps", "train.epochs"}
    if len(given) == 1:
        other = ({"train.steps", "train.epochs"} - given).pop().removeprefix("train.")
        data["train"].pop(other, None)
    return data


def total_steps(recipe: Recipe, epoch_size: int) -> int:
    """Optimizer steps of the whole run; an epoch has `epoch_size` images."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, round(recipe.train.epochs * epoch_size / recipe.train.batch_size))


# ---- docs/settings.md -----------------------------------------------------------------------------------------------

HEAD = """# Settings

Every setting of a recipe, once, with its default. `python -m pipeline.recipe > docs/settings.md` writes this page.
`pipeline/train.py ... --dry-run` prints those of a run that differ from the defaults, and `--dry-run-all` all of them.
"""

OVERRIDES = """
## Overrides

A setting on the command line replaces the recipe's: `section.key=value`, also written `--section.key=value`.

| value | example |
|---|---|
| number, name, path | `optim.lr=5e-3` `train.precision=bf16` `data.root=data/celeba64` |
| nothing | `train.micro_batch=null` |
| true or false | `data.flip=true` |
| list | `'model.groups_per_scale=[5, 10, 20]'` |
| section with a name | `'model.flows={name: iaf}'` `'model.likelihood={name: normal, sigma: 0.1}'` |
| setting in such a section | `model.likelihood.sigma=0.2` |

Values are YAML. Quote an override in the shell where it has spaces, brackets, braces or `*`. A section in braces
replaces the whole section. Text that looks like a number is quoted twice: `'data.train_split="2024"'`. Numbers are
decimal and finite. The last of two overrides of one setting is used. `train.steps=` replaces a recipe's `train.epochs`,
and `train.epochs=` its `train.steps`. Former names are accepted: {former}.
"""


def settings_page() -> str:
    """docs/settings.md: every setting once, its default, its meaning, and the models and recipes that use it."""
    used: dict[str, list[str]] = {}
    for name in shipped_recipes():
        for path in flatten(load_yaml(RECIPES / f"{name}.yaml")):
            used.setdefault(path, []).append(name)
    names = [name for name, field in Recipe.model_fields.items() if sections_in(field.annotation)]
    contents = [f"- [{name}](#{name.lower()})" for name in ("Overrides", *names)]
    former = ", ".join(f"`{old}` for `{new}`" for old, new in ALIASES.items())
    lines = [HEAD, *contents, OVERRIDES.replace("{former}", former).rstrip()]
    for name in names:
        lines += _describe_section(name, sections_in(Recipe.model_fields[name].annotation), used, level=2)
    return "\n".join(lines) + "\n"


def _describe_section(path: str, variants: list[type[Section]], used: dict[str, list[str]], level: int) -> list[str]:
    """A heading, then a line for each setting that any of the variants has."""
    lines = ["", f"{'#' * level} {path}", ""]
    if len(variants) == 1:
        lines += [_one_line(variants[0].__doc__), ""]
    nested: list[str] = []
    for name in dict.fromkeys(name for section in variants for name in section.model_fields):
        key, holders = f"{path}.{name}", [section for section in variants if name in section.model_fields]
        options = dict.fromkeys(part for one in holders for part in sections_in(one.model_fields[name].annotation))
        if options:
            nested += _describe_section(key, list(options), used, level + 1)
        elif name == "name" and isinstance(holders[0].model_fields[name].default, str):
            lines += [f"- `{key}`: one of"]
            lines += [f"  - `{tag_of(one)}`: {_one_line(one.__doc__)}{_set_by(used, key, [one])}" for one in holders]
        else:
            lines += _describe_setting(key, holders, len(variants), used)
    return lines + nested


def _describe_setting(
    key: str, holders: list[type[Section]], num_variants: int, used: dict[str, list[str]]
) -> list[str]:
    """A line with default and meaning; or, for a setting with several meanings, one for each."""
    path, _, name = key.rpartition(".")
    by_meaning: dict[str, list[type[Section]]] = {}
    for section in holders:
        by_meaning.setdefault(_one_line(section.model_fields[name].description), []).append(section)
    if len(by_meaning) > 1:
        lines = [
            f"  - {', '.join(f'`{tag_of(one)}` = {_default(one, name)}' for one in sections)}: {meaning}"
            f"{_set_by(used, key, sections)}"
            for meaning, sections in by_meaning.items()
        ]
        return [f"- `{key}`, by `{path}.name`:", *lines]
    (meaning,) = by_meaning
    of = "" if len(holders) == num_variants else f" *Of {', '.join(map(tag_of, holders))}.*"
    return [f"- `{key}` = {_defaults_by_variant(name, holders)}: {meaning}{of}{_list_of(used.get(key))}"]


def _default(section: type[Section], name: str) -> str:
    field = section.model_fields[name]
    return "`required`" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def _defaults_by_variant(name: str, holders: list[type[Section]]) -> str:
    """The default, or each with the variants that have it where they differ."""
    tags: dict[str, list[str]] = {}
    for section in holders:
        tags.setdefault(_default(section, name), []).append(tag_of(section))
    return next(iter(tags)) if len(tags) == 1 else "; ".join(f"{one} ({', '.join(of)})" for one, of in tags.items())


def _set_by(used: dict[str, list[str]], key: str, sections: list[type[Section]]) -> str:
    """The recipes that set this key of a section of one of these kinds."""
    kind, tags = f"{key.rpartition('.')[0]}.name", set(map(tag_of, sections))
    return _list_of([name for name in used.get(key, []) if flatten(load_yaml(RECIPES / f"{name}.yaml"))[kind] in tags])


def _list_of(recipes: list[str] | None) -> str:
    if not recipes:
        return ""
    names = "all recipes" if len(recipes) == len(shipped_recipes()) else ", ".join(recipes)
    return f" *Set by {names}.*"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def default_settings() -> dict[str, dict[str, Any]]:
    """{setting: {name of the section that has it: default}}, without settings that have none. The name is that of
    `model.name` and the like, and empty for a section that has no other kinds. `resnet_vae.normal` stands for the
    section `normal` that `resnet_vae` has by default, which may set other values.
    """
    return _defaults_of("", [Recipe])


def _defaults_of(path: str, variants: list[type[Section]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for section in variants:
        tag = tag_of(section) if len(variants) > 1 else ""
        for name, field in section.model_fields.items():
            key, default = f"{path}{name}", field.get_default(call_default_factory=True)
            if isinstance(default, Section):
                flat = flatten(default.model_dump(mode="json"), f"{key}.")
                kind = flat.pop(f"{key}.name", None)
                found.setdefault(f"{key}.name", {})[tag] = kind
                for nested, value in flat.items():
                    found.setdefault(nested, {})[f"{tag}.{kind}"] = value
            elif not field.is_required() and not (name == "name" and tag):
                found.setdefault(key, {})[tag] = json.loads(json.dumps(default))
            for nested, defaults in _defaults_of(f"{key}.", sections_in(field.annotation)).items():
                found.setdefault(nested, {}).update(defaults)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for a recipe that does not exist."""
    parser = argparse.ArgumentParser(description="Prints a recipe, or without NAME what every setting means.")
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"print this recipe: {', '.join(shipped_recipes())}")
    parser.add_argument("--defaults", action="store_true", help="print the defaults of all settings as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.defaults:
        print(json.dumps(default_settings(), indent=1))
        return 0
    try:
        print(recipe_path(parsed.name).read_text() if parsed.name else settings_page(), end="")
    except ConfigError as error:
        parser.error(str(error).removeprefix("--model "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
