"""The settings of a report that differ from their defaults, against pydantic's own comparison."""

import json

import pytest

from pipeline.config import dump, flatten, load_yaml
from pipeline.recipe import default_settings, load_recipe, recipe_path
from pipeline.reporting.defaults import FILE
from pipeline.reporting.tables import changed_settings


def test_the_file_of_defaults_is_current():
    command = "python -m pipeline.recipe --defaults > pipeline/configs/defaults.json"
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(default_settings())), command


@pytest.mark.parametrize("name", ["nvae_mnist", "mlp_cvae", "resnet_vae", "attribute_vae"])
def test_settings_that_differ_from_their_defaults(name, tmp_path):
    recipe = load_recipe(recipe_path(name), ["optim.clip=3", "data.flip=true", "tracking.tags=[a]"])
    (tmp_path / "config.yaml").write_text(dump(recipe))
    shown = {row[0]: row[1:] for row in changed_settings(flatten(load_yaml(tmp_path / "config.yaml"))).rows}
    expected = flatten(recipe.model_dump(mode="json", exclude_defaults=True))
    nameless = {path for path in shown if not path.endswith(".name")}
    assert nameless == {path for path in expected if not path.endswith(".name")}
    assert shown["optim.clip"] == ["3.0", "0.0"]
    assert shown["model.name"][0] == recipe.model.name
