"""sample.py: samples in pictures, arrays and shard sets, and wrong arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.data.shards import TarShards
from pipeline.inference import draw_samples
from pipeline.models.noise import draw_noise
from pipeline.sample import main
from tests.helpers.command_lines import check_commands, shown_facts
from tests.helpers.grids import tiles
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

NAMES = ["Attribute_0", "Attribute_2"]
CLASSES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    conditions = {
        "plain": None,
        "classes": {"name": "class", "num_classes": 3},
        "attributes": {"name": "attributes", "chosen": NAMES},
    }
    plain = tiny_settings("nowhere")
    return {
        name: make_run(folder / name, plain | ({"condition": condition} if condition else {}), CLASSES)
        for name, condition in conditions.items()
    }


def arrays(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("*.npz")
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    return images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """Within one gray level: batches of other sizes round otherwise."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_samples_are_those_of_the_python_interface(runs, tmp_path):
    words = ["--count", "5", "--npz", "--seed", "3", "--temperature", "0.8", "--out", str(tmp_path)]
    assert main([str(runs["plain"]), *words]) == 0
    found = arrays(tmp_path)
    near(found["images"], to_pixels(pipeline.load(runs["plain"]).sample(5, 0.8, seed=3)))
    assert json.loads(str(found["settings"]))["temperature"] == 0.8
    assert found.keys() == {"images", "settings"}
    (png,) = tmp_path.glob("*.png")
    with Image.open(png) as picture:
        assert picture.size == (5 * 66 + 2, 66 + 2)  # 16 pixels are enlarged to 64


def test_samples_do_not_depend_on_how_many_there_are(runs):
    trained = pipeline.load(runs["plain"])
    many = draw_samples.sample_images(trained, draw_samples.plan_count(trained, 140), 1.0, 2)
    near(many[:3], draw_samples.sample_images(trained, draw_samples.plan_count(trained, 3), 1.0, 2))
    near(many[130:], to_pixels(trained.sample(10, seed=2, first=130)))
    assert len(np.unique(many.reshape(140, -1), axis=0)) == 140


def test_what_is_sampled_and_what_comes_next_is_said(runs, tmp_path, capfd):
    assert main([str(runs["plain"]), "--count", "3", "--temperature", "0.7", "1", "--out", str(tmp_path)]) == 0
    title, *lines = capfd.readouterr().err.splitlines()
    assert title == "3 samples of nvae at step 7 on cpu"
    facts = shown_facts(lines)
    assert facts["model"] == [f"{runs['plain']}/checkpoints/step_00000007, the moving average of the weights"]
    assert (facts["temperature"], facts["writes"]) == (["0.7, 1"], [str(tmp_path)])
    assert sum(line.startswith("3 samples of nvae at step 7: ") for line in lines) == 2
    check_commands(facts["next"])
    assert not any("%|" in line for line in lines)  # the bar of a terminal


def test_each_class_is_a_row(runs, tmp_path):
    words = ["--classes", "2,cat", "--per-class", "4", "--npz", "--out", str(tmp_path)]
    assert main([str(runs["classes"]), *words]) == 0
    found = arrays(tmp_path)
    assert found["labels"].tolist() == [2] * 4 + [0] * 4
    assert found["classes"].tolist() == CLASSES
    expected = pipeline.load(runs["classes"]).sample(8, condition=torch.tensor([2] * 4 + [0] * 4))
    near(found["images"], to_pixels(expected))
    (png,) = tmp_path.glob("*.png")
    shown = tiles(png, 4)  # the second row begins with the first of class 0
    assert np.array_equal(shown.flatten(0, 1).permute(0, 2, 3, 1).numpy(), found["images"])
    with Image.open(png) as picture:
        assert picture.size[0] > 4 * 66 + 2  # the classes are to the left


def test_without_names_all_classes_are_sampled(runs, tmp_path):
    assert main([str(runs["classes"]), "--npz", "--out", str(tmp_path)]) == 0
    assert np.bincount(arrays(tmp_path)["labels"]).tolist() == [10, 10, 10]


def test_target_attributes_are_in_the_labels(runs, tmp_path):
    words = ["--attributes", "Attribute_2=1", "--count", "3", "--npz", "--out", str(tmp_path)]
    assert main([str(runs["attributes"]), *words]) == 0
    found = arrays(tmp_path)
    assert found["attributes"].tolist() == [[-1, 1]] * 3
    assert found["attribute_names"].tolist() == NAMES
    near(found["images"], to_pixels(pipeline.load(runs["attributes"]).sample(3, condition={"Attribute_2": 1})))


def test_other_attributes_can_be_those_of_real_images(runs, tmp_path, capfd):
    root = write_set(tmp_path / "set", {"train": random_samples(4, 16, 16, attributes=3, seed=8)}, [4])
    words = ["--attributes", "Attribute_2=0", "--data", str(root), "--count", "6", "--npz", "--out", str(tmp_path)]
    assert main([str(runs["attributes"]), *words]) == 0
    real = TarShards(root, "train").attributes(range(4))[[0, 1, 2, 3, 0, 1], 0]
    assert arrays(tmp_path)["attributes"].tolist() == [[value, 0] for value in real]
    assert len(set(real)) > 1
    assert main([str(runs["attributes"]), *words, "--split", "dev"]) == 2
    assert f"--split: {root}: no split 'dev'; it has: train" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["plain", "classes", "attributes"])
def test_rows_share_the_first_groups(runs, tmp_path, kind):
    """Of the noise of each row's first sample: image by image, from the model's own interface."""
    sizes = {"classes": ["--per-class", "3"], "attributes": ["--count", "10", "--attributes", "Attribute_2=1"]}
    words = [*sizes.get(kind, ["--count", "10"]), "--temperature", "4x4=0.5,8x8=0.9", "--seed", "4", "--npz"]
    assert main([str(runs[kind]), *words, "--fix-groups", "8x8_group00", "--out", str(tmp_path)]) == 0
    found, trained = arrays(tmp_path), pipeline.load(runs[kind], device="cpu")
    columns = 3 if kind == "classes" else 8
    conditions = {"classes": lambda i: i // 3, "attributes": lambda i: {"Attribute_2": 1}}
    for i, image in enumerate(found["images"]):
        groups, first = trained.model.groups, i // columns * columns
        of_row, own = (draw_noise(groups, 4, "sample", [position]) for position in (first, i))
        condition = trained.condition(conditions[kind](i) if kind in conditions else None, 1)
        expected = trained.model.sample([*of_row[:2], *own[2:]], [0.5, 0.9, 0.9], condition)
        near(image[None], to_pixels(expected))
    assert len(np.unique(found["images"].reshape(len(found["images"]), -1), axis=0)) == len(found["images"])
    settings = json.loads(str(found["settings"]))
    assert settings["fixed_groups"] == 2
    assert settings["temperature"] == {"4x4": 0.5, "8x8": 0.9}
    (png,) = tmp_path.glob("samples_step_00000007_temperature_4x4=0.5,8x8=0.9_seed_4_fixed_2.png")
    shown = tiles(png, columns).flatten(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(shown[: len(found["images"])], found["images"])
    with Image.open(png) as picture:
        assert picture.size[1] > 66 * len(shown) / columns + 2  # below a caption


def test_no_group_fixed_is_a_plain_sample(runs, tmp_path):
    for words in ([], ["--fix-groups", "0"]):
        assert main([str(runs["plain"]), "--count", "9", *words, "--out", str(tmp_path / str(len(words)))]) == 0
    one, other = (next((tmp_path / name).iterdir()) for name in "02")
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_a_row_has_one_condition(runs, tmp_path):
    root = write_set(tmp_path / "set", {"train": random_samples(20, 16, 16, attributes=3, seed=8)}, [20])
    words = ["--data", str(root), "--count", "20", "--fix-groups", "3", "--npz", "--out", str(tmp_path)]
    assert main([str(runs["attributes"]), *words]) == 0
    found, real = arrays(tmp_path), TarShards(root, "train").attributes(range(20))[:, [0, 2]]
    assert np.array_equal(found["attributes"], real[np.arange(20) // 8 * 8])
    assert len(np.unique(found["images"].reshape(20, -1), axis=0)) == 3  # all groups are shared


@pytest.mark.parametrize("kind", ["plain", "classes", "attributes"])
def test_samples_become_a_shard_set_with_their_labels(runs, tmp_path, kind):
    sizes = {"plain": ["--count", "12"], "classes": ["--per-class", "4"]}
    words = sizes.get(kind, ["--count", "12", "--attributes", "Attribute_0=1"])
    assert main([str(runs[kind]), *words, "--as-shards", str(tmp_path / "set"), "--npz", "--out", str(tmp_path)]) == 0
    made = arrays(tmp_path)
    seen = []
    for split in json.loads((tmp_path / "set" / "manifest.json").read_text())["splits"]:
        shards = TarShards(tmp_path / "set", split, verify=True)
        indices = range(len(shards))
        numbers = [int(key.rpartition("-")[2]) for key in shards.keys(indices)]
        seen += numbers
        assert np.array_equal(shards.images(indices), made["images"][numbers])
        if kind == "classes":
            assert shards.classes == tuple(CLASSES)
            assert np.array_equal(shards.labels(indices), made["labels"][numbers])
        if kind == "attributes":
            assert shards.attribute_names == tuple(NAMES)
            assert np.array_equal(shards.attributes(indices), made["attributes"][numbers])
    assert sorted(seen) == list(range(12))


def test_several_temperatures_are_several_pictures(runs, tmp_path):
    assert main([str(runs["plain"]), "--count", "2", "--temperature", "0.5", "1", "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"samples_step_00000007_temperature_{t}_seed_0.png" for t in ("0.5", "1")}


def test_the_default_place_is_in_the_run(runs):
    assert main([str(runs["plain"]), "--count", "1"]) == 0
    assert len(list((runs["plain"] / "samples").glob("*.png"))) == 1


def test_batch_norm_is_readjusted_on_a_copy(runs):
    trained = pipeline.load(runs["plain"])
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    plan = draw_samples.plan_count(trained, 6)
    changed = draw_samples.readjusted(trained, plan, 0.7, seed=0, iterations=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.model.state_dict().items())
    moved = {name for name, tensor in changed.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved
    assert all("running" in name or "num_batches" in name for name in moved)
    assert not np.array_equal(
        draw_samples.sample_images(changed, plan, 0.7, 0), draw_samples.sample_images(trained, plan, 0.7, 0)
    )


BAD = {
    "a class that is not": ("classes", ["--classes", "0,fish"], "fish is not known; known: 0 (cat), 1 (dog), 2 (bird)"),
    "an attribute that is not": (
        "attributes",
        ["--attributes", "Attribute_1=1"],
        "Attribute_1 is not known; did you mean Attribute_2? Known: Attribute_0, Attribute_2",
    ),
    "classes of a plain model": ("plain", ["--classes", "1"], "was not trained with classes"),
    "attributes of a plain model": ("plain", ["--attributes", "Smiling=1"], "was not trained with attributes"),
    "attributes of a model of classes": ("classes", ["--attributes", "A=1"], "give --classes and --per-class alone"),
    "classes of a model of attributes": ("attributes", ["--classes", "1"], "was not trained with classes"),
    "an attribute without a value": ("attributes", ["--attributes", "Smiling"], "given as NAME=1 or NAME=0"),
    "no samples": ("plain", ["--count", "0"], "--count 0: must be at least 1"),
    "none of a class": ("classes", ["--per-class", "0"], "--per-class 0: must be at least 1"),
    "a negative temperature": ("plain", ["--temperature", "-1"], "--temperature -1: must be a finite number"),
    "no temperature": ("plain", ["--temperature", "nan"], "--temperature nan: must be a finite number"),
    "a temperature of an unknown scale": ("plain", ["--temperature", "9x9=1"], "temperature: 9x9 is not known"),
    "half a temperature": (
        "plain",
        ["--temperature", "4x4="],
        "--temperature 4x4=: give a number, or one by resolution",
    ),
    "an endless temperature by scale": ("plain", ["--temperature", "4x4=inf"], "must be a finite number"),
    "more groups than there are": (
        "plain",
        ["--fix-groups", "4"],
        "--fix-groups 4: give a number from 0 to 3, a resolution or a group; the groups in the order of sampling are "
        "4x4_group00, 8x8_group00 to 8x8_group01",
    ),
    "a negative seed": ("plain", ["--seed", "-1"], "--seed -1: must be from 0 to 2^63 - 1"),
    "fewer than no batches": ("plain", ["--readjust", "-1"], "--readjust -1: must be at least 0"),
    "no such step": ("plain", ["--checkpoint", "8"], "no checkpoint of step 8; available steps: 7"),
    "shards of two temperatures": ("plain", ["--temperature", "1", "2", "--as-shards", "x"], "give one"),
    "data that are not": ("attributes", ["--data", "nowhere"], "nowhere: no such folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_arguments_get_one_line_and_exit_code_2(runs, tmp_path, capfd, what):
    kind, words, message = BAD[what]
    assert main([str(runs[kind]), *words, "--out", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_is_there_is_not_replaced(runs, tmp_path, capfd):
    words = [str(runs["plain"]), "--count", "3", "--out", str(tmp_path), "--as-shards", str(tmp_path / "set")]
    assert main(words) == 0
    assert main(words) == 2
    assert "holds a shard set already; name another folder" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*words[:-1], str(tmp_path / "file")]) == 2
    assert "ended with exit code 2; see above" in capfd.readouterr().err
