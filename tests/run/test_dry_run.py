"""`--dry-run`: settings, model, data and length of a run, from the recipe and the manifest alone."""

import pytest

from pipeline.recipe import load_recipe, recipe_path
from pipeline.run.dry_run import describe, describe_model
from pipeline.storage.status import StatusFile


@pytest.fixture
def dry_run(make_recipe, tmp_path):
    """(overrides) -> the lines that are printed, without surplus spaces."""

    def run(*overrides, **options):
        text = describe(make_recipe(*overrides), tmp_path / "run", **options)
        return [" ".join(line.split()) for line in text.splitlines()]

    return run


def test_groups_and_data_are_listed(dry_run, tiny_set):
    lines = dry_run()
    for line in ("4x4_group00 2x4x4", "8x8_group00 2x8x8", "8x8_group01 2x8x8"):
        assert line in lines
    assert f"data {tiny_set}: images of 16x16x3; train 41, test 13" in lines


def test_the_size_of_the_model_is_stated():
    assert "33,363,134 parameters in 1269 tensors" in describe_model(load_recipe(recipe_path("nvae_mnist"), []))[0]


def test_epochs_are_resolved_to_steps(dry_run):
    """41 images in batches of 8: 3 epochs are 15.4 steps, one is 5.1."""
    overrides = "train.steps=null", "train.epochs=3", "optim.warmup_steps=0", "optim.warmup_epochs=1"
    lines = dry_run(*overrides)
    assert "length 15 steps = 2.927 epochs, 8 images per step" in lines
    assert "warm-up 5 steps = 0.9756 epochs" in lines
    unknown = dry_run(*overrides, "data.root=nowhere", "data.source=mnist --source DIR")
    assert "length 3 epochs (steps depend on the data), 8 images per step" in unknown
    (data,) = (line for line in unknown if line.startswith("data nowhere is not there"))
    assert data.endswith("make it with: python -m shard_data mnist --source DIR --out nowhere")


def test_settings_at_their_defaults_are_printed_on_request(dry_run):
    assert not any("lr_min" in line or "beta2" in line for line in dry_run())
    lines = dry_run(all_settings=True)
    assert any("lr_min: 0.0001" in line for line in lines)
    assert any("warmup_steps: 2" in line for line in dry_run())


def test_data_that_do_not_fit_are_refused_by_the_setting(dry_run):
    with pytest.raises(ValueError, match=r"validation.split: .*no split 'dev'; it has: train, test"):
        dry_run("validation.split=dev")
    with pytest.raises(ValueError, match=r"data.size is 32, but .* holds images of 16x16"):
        dry_run("data.size=32")
    with pytest.raises(ValueError, match="condition.num_classes=4: the data set has 10"):
        dry_run("condition={name: class, num_classes: 4}")


def test_the_state_of_the_run_folder_is_named(dry_run, tmp_path):
    assert dry_run()[-1] == f"run folder {tmp_path}/run: new"
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    status = StatusFile(tmp_path / "run")
    status.begin(4, 6)
    status.end("preempted", "SIGTERM")
    assert dry_run()[-1] == f"run folder {tmp_path}/run: preempted, checkpoint of step 4 of 6"
