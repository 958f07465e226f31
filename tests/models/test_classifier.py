"""The classifier, its folder, and the script that trains it; `recognition`, which asks it about samples."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.shards import TarShards
from pipeline.evaluation.class_recognition import recognition
from pipeline.models.base import VAE, LatentGroup
from pipeline.models.classifier import (
    Classifier,
    ClassifierConfig,
    attribute_cross_entropy,
    check_image_shape,
    columns_of,
)
from pipeline.run.classifier_folder import classifier_digest, load_classifier, save_classifier
from pipeline.storage.checkpoint_folder import META, write_folder
from pipeline.train_classifier import main
from tests.helpers.command_lines import check_commands, shown_facts
from tests.helpers.shard_sets import Samples, random_samples, write_set

NAMES = ("Smiling", "Hat", "Beard")


def make(kind="attributes", names=NAMES, shape=(3, 8, 8)) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(kind=kind, names=names, image_shape=shape, width=4))


@pytest.fixture
def folder(tmp_path) -> Path:
    save_classifier(make(), tmp_path / "classifiers" / "judge", 3, {"seed": 1})
    return tmp_path / "classifiers" / "judge"


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "stages"), [(7, 0), (8, 1), (16, 2), (28, 2), (32, 3), (64, 4), (128, 5)])
def test_stages_end_at_a_map_of_four_to_seven_pixels(side, stages):
    classifier = make(shape=(1, side, side)).eval()
    assert len(classifier.stages) == stages + 2
    assert classifier(torch.rand(2, 1, side, side)).shape == (2, 3)


def test_only_known_attributes_count():
    logits = torch.randn(4, 3, dtype=torch.float64)
    attributes = torch.tensor([[1, 0, -1], [0.5, 1, 1], [-1, -1, -1], [0, 0, 1]], dtype=torch.float64)
    found = attribute_cross_entropy(logits, attributes)
    for row in range(4):
        for column in range(3):
            truth, logit = attributes[row, column], logits[row, column]
            expected = F.softplus(-logit) if truth == 1 else F.softplus(logit) if truth == 0 else torch.zeros(())
            assert found[row, column].item() == pytest.approx(expected.item(), abs=1e-12)


def test_correct_answers_are_counted_where_the_truth_is_known(monkeypatch):
    classifier = make()
    monkeypatch.setattr(classifier, "forward", lambda x: torch.tensor([[2.0, -1.0, 3.0], [-2.0, 1.0, 3.0]]))
    correct = classifier.correct(torch.zeros(2, 3, 8, 8), torch.tensor([[1.0, 1, -1], [1, 1, 1]]))
    assert torch.equal(correct.nan_to_num(7), torch.tensor([[1.0, 0, 7], [0, 1, 1]], dtype=torch.float64))
    classes = make("classes")
    monkeypatch.setattr(classes, "forward", lambda x: torch.tensor([[2.0, -1.0, 3.0], [-2.0, 1.0, 3.0]]))
    assert classes.correct(torch.zeros(2, 3, 8, 8), torch.tensor([2, 1]))[:, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="predicts classes"):
        classes.present(torch.zeros(2, 3, 8, 8))


def test_columns_of_chosen_attributes():
    classifier = make()
    assert columns_of(classifier, ["Beard", "Smiling"]) == [2, 0]
    with pytest.raises(ValueError, match="was not trained on Bangs; its attributes: Smiling, Hat, Beard"):
        columns_of(classifier, ["Bangs", "Hat"])
    with pytest.raises(ValueError, match="3x8x8 and 3x16x16"):
        check_image_shape(classifier, (3, 16, 16))
    check_image_shape(classifier, (3, 8, 8))
    with pytest.raises(ValueError, match="predicts classes"):
        columns_of(make("classes"), ["Hat"])


# ---- its folder ------------------------------------------------------------------------------------------------------


def test_a_classifier_comes_back_frozen_and_the_same(folder):
    original, found = make().eval(), load_classifier(folder)
    x = torch.rand(5, 3, 8, 8)
    assert torch.equal(original(x), found(x))
    assert (found.kind, found.names, found.image_shape) == ("attributes", NAMES, (3, 8, 8))
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    image = x.requires_grad_()
    found(image).sum().backward()
    assert image.grad.abs().max() > 0  # to the picture it does hand a gradient
    assert sorted(entry.name for entry in folder.parent.iterdir()) == [folder.name]  # nothing half-made is left


def test_the_digest_follows_the_content_not_the_place(folder, tmp_path):
    folder.rename(tmp_path / "moved")
    save_classifier(make(), tmp_path / "again", 3, {"seed": 1})
    save_classifier(make(), tmp_path / "other", 4, {"seed": 1})
    moved, again, other = (classifier_digest(tmp_path / name) for name in ("moved", "again", "other"))
    assert moved == again != other
    assert 0 < moved < 2**63


@pytest.mark.parametrize("file", [META, "model.safetensors"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_changed_byte_is_noticed(folder, file, place):
    content = bytearray((folder / file).read_bytes())
    content[int(place * len(content))] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        load_classifier(folder)


def test_a_missing_or_foreign_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no classifier; make one with: python .*--out .*nowhere"):
        load_classifier(tmp_path / "nowhere")
    write_folder(tmp_path / "step_00000001", {"model": {}}, 1, {"settings": {}}, None)
    with pytest.raises(ValueError, match="not the folder of a classifier"):
        load_classifier(tmp_path / "step_00000001")
    facts = {"classifier": make(names=("Hat",)).config.model_dump(mode="json")}
    write_folder(tmp_path / "mixed", {"model": make().state_dict()}, 1, facts, None)
    with pytest.raises(ValueError, match="the weights do not fit"):
        load_classifier(tmp_path / "mixed")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No such file"):
        load_classifier(folder)


def test_nothing_is_written_over_a_folder(folder):
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        save_classifier(make(), folder, 9, {})
    assert load_classifier(folder)


# ---- training --------------------------------------------------------------------------------------------------------


def shaded(count: int, seed: int) -> Samples:
    """8x8 faces: Bright and Left are to be seen; the third attribute is noise, and hidden wherever it says so falsely:
    it is the opposite of Bright where hidden, and Bright where not.
    """
    rng = np.random.default_rng(seed)
    attributes = rng.integers(0, 2, (count, 3))
    hidden = np.zeros((count, 3), bool)
    hidden[:, 2] = rng.random(count) < 0.7
    attributes[:, 2] = np.where(hidden[:, 2], 1 - attributes[:, 0], attributes[:, 0])
    images = np.full((count, 8, 8, 3), 60)
    images[attributes[:, 0] == 1] += 120
    images[attributes[:, 1] == 1, :, :, 0] += 50
    images = (images + rng.integers(-20, 21, images.shape)).astype(np.uint8)
    return Samples(images, attributes=attributes, hidden=hidden)


@pytest.fixture
def faces(tmp_path) -> Path:
    return write_set(tmp_path / "faces", {"train": shaded(400, 1), "test": shaded(200, 2)}, [150])


def train(data: Path, out: Path, *arguments: str) -> int:
    small = ["--epochs", "6", "--batch-size", "20", "--width", "4", "--threads", "1"]
    return main(["--data", str(data), "--out", str(out), *small, *arguments])


def facts_of(folder: Path) -> dict:
    return json.loads((folder / META).read_text())["facts"]


def test_attributes_are_learned_and_hidden_ones_masked(faces, tmp_path, capfd):
    """Counting the hidden ones, the third attribute would be learned wrongly: 70 % of it is. What is done is said."""
    assert train(faces, tmp_path / "out") == 0
    title, *lines = capfd.readouterr().err.splitlines()
    said = shown_facts(lines)
    assert title == "a classifier of 3 attributes on 1 CPU thread"
    assert said["length"] == ["120 steps of 20 images, 6 epochs"]
    check_commands(said["next"])
    facts = facts_of(tmp_path / "out")
    assert facts["data_fingerprint"] == TarShards(faces, "train").fingerprint
    assert facts["held_out_split"] == "test"
    assert facts["held_out"]["accuracy/Attribute_0"] > 0.98
    assert facts["held_out"]["accuracy/Attribute_1"] > 0.98
    assert facts["held_out"]["accuracy/Attribute_2"] > 0.98
    classifier = load_classifier(tmp_path / "out")
    shards = TarShards(faces, "test")
    x = torch.from_numpy(shards.images(range(200))).permute(0, 3, 1, 2).float() / 255
    seen, truth = classifier.present(x), torch.from_numpy(shards.attributes(range(200)))
    visible = ~torch.from_numpy(shards.hidden(range(200)))
    assert facts["held_out"]["accuracy"] == pytest.approx((seen == truth)[visible].double().mean().item())
    assert (seen == truth)[~visible].double().mean() < 0.1


def test_classes_are_learned_and_never_mirrored(tmp_path):
    """Two classes that are each other's mirror image: with flips they would be one."""

    def samples(count, seed):
        labels = np.random.default_rng(seed).integers(0, 10, count)
        labels = labels % 2
        images = np.full((count, 8, 8, 1), 30, np.uint8)
        images[labels == 0, :, :4] = 200
        images[labels == 1, :, 4:] = 200
        return Samples(images, labels=labels)

    data = write_set(tmp_path / "digits", {"train": samples(200, 1), "val": samples(50, 2)}, [100])
    assert train(data, tmp_path / "out", "--held-out", "val") == 0
    assert facts_of(tmp_path / "out")["held_out"] == {"accuracy": 1.0}
    classifier = load_classifier(tmp_path / "out")
    assert (classifier.kind, classifier.image_shape, len(classifier.names)) == ("classes", (1, 8, 8), 10)


def test_the_same_command_gives_the_same_bytes(faces, tmp_path):
    for name in ("a", "b"):
        assert train(faces, tmp_path / name, "--epochs", "1", "--seed", "5") == 0
    assert train(faces, tmp_path / "c", "--epochs", "1", "--seed", "6") == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def recorded(monkeypatch, method: str) -> list[Tensor]:
    """The images that this method of classifiers is called with from now on."""
    seen, plain = [], getattr(Classifier, method)
    monkeypatch.setattr(Classifier, method, lambda self, x, target: (seen.append(x), plain(self, x, target))[1])
    return seen


def test_noise_is_added_to_training_images_alone(faces, tmp_path, monkeypatch):
    """Each image has a standard deviation of its own, uniform from 0 to the largest."""
    trained, held_out = {}, {}
    for amount in (0.0, 0.5):
        with monkeypatch.context() as patched:
            trained[amount], held_out[amount] = recorded(patched, "loss"), recorded(patched, "correct")
            assert train(faces, tmp_path / str(amount), "--noise", str(amount)) == 0
        assert facts_of(tmp_path / str(amount))["noise"] == amount
    assert torch.equal(torch.cat(held_out[0.0]), torch.cat(held_out[0.5]))
    noise = (torch.cat(trained[0.5]) - torch.cat(trained[0.0])).flatten(1)  # (2400, 192)
    deviations = noise.std(1)
    for share in (0.1, 0.5, 0.9):
        assert deviations.quantile(share).item() == pytest.approx(0.5 * share, abs=0.03)
    assert (deviations.view(-1, 20).std(1) > 0.05).all()  # within each batch
    standard = noise / deviations[:, None]
    assert standard.mean().item() == pytest.approx(0, abs=0.01)
    assert standard.pow(4).mean().item() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "1.5"], "--noise 1.5: must be from 0 to 1, the range of the images' values"),
        (["--noise", "nan"], "--noise nan: must be from 0 to 1"),
        (["--split", "all"], "no split 'all'; it has: train, test"),
        (["--held-out", "val"], "no split 'val'"),
        (["--epochs", "0"], "--epochs 0.0: must be a finite number above 0"),
        (["--epochs", "inf"], "--epochs inf: must be a finite number above 0"),
        (["--batch-size", "0"], "--batch-size 0: must be a finite number above 0"),
        (["--seed", "-1"], "--seed -1: must be from 0 to 2^63 - 1"),
    ],
)
def test_user_errors(faces, tmp_path, capsys, arguments, message):
    assert train(faces, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_or_a_set_without_targets_is_refused(faces, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert train(faces, tmp_path / "out") == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    plain = random_samples(20, 8, 8)
    plain.labels = None
    data = write_set(tmp_path / "plain", {"train": plain, "test": plain}, [20])
    assert train(data, tmp_path / "new") == 2
    assert "neither classes nor attributes" in capsys.readouterr().err


@pytest.mark.slow
def test_real_digits(tmp_path):
    if "REAL_DATA_DIR" not in os.environ:
        pytest.skip("REAL_DATA_DIR is not set: no MNIST to read")
    from shard_data.__main__ import main as convert

    source = Path(os.environ["REAL_DATA_DIR"]) / "mnist"
    assert convert(["mnist", "--source", str(source), "--out", str(tmp_path / "mnist")]) == 0
    arguments = ["--data", str(tmp_path / "mnist"), "--out", str(tmp_path / "out"), "--epochs", "3", "--threads", "1"]
    assert main(arguments) == 0
    assert (
        facts_of(tmp_path / "out")["held_out"]["accuracy"] >= 0.985
    )  # 0.9886 where measured; machines round otherwise


# ---- recognition -----------------------------------------------------------------------------------------------------


class OneHotPainter(VAE):
    """Paints pixel k of class k, or of class 0 where the draw is above a threshold: its share of faults is known."""

    groups = (LatentGroup("1x1_group00", (1, 1, 1)),)

    def __init__(self, num_classes: int, threshold: float):
        super().__init__((1, 1, num_classes), condition_size=num_classes)
        self.threshold = threshold
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def features(self, x, condition=None): ...
    def bound(self, x, features, noise, condition=None): ...
    def encode(self, x, noise, condition=None): ...
    def pixel_distribution(self, latents, condition=None): ...
    def prior_noise(self, latents, condition=None): ...

    def sample_with_latents(self, noise, temperature=1.0, condition=None, given=()) -> tuple[Tensor, list[Tensor]]:
        faulty = noise[0].flatten() * temperature > self.threshold
        images = torch.where(faulty[:, None], torch.eye(self.condition_size)[0], condition)[:, None, None, :]
        return images, noise


class Reader(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def reader(num_classes: int) -> Classifier:
    names = tuple("abcdefgh"[:num_classes])
    return Reader(ClassifierConfig(kind="classes", names=names, image_shape=(1, 1, num_classes)))


def test_recognition_counts_what_is_recognized():
    perfect = recognition(OneHotPainter(4, 99.0), reader(4), per_class=30, temperature=1.0, seed=1)
    assert perfect == {"recognized": 1.0, **{f"recognized/{name}": 1.0 for name in "abcd"}}
    faulty = recognition(OneHotPainter(4, -99.0), reader(4), per_class=30, temperature=1.0, seed=1)
    assert faulty == {"recognized": 0.25, "recognized/a": 1.0, **{f"recognized/{name}": 0.0 for name in "bcd"}}


def test_recognition_follows_temperature_seed_and_nothing_else():
    model, classifier = OneHotPainter(4, 1.0), reader(4)
    model.train()
    hot, cool = (recognition(model, classifier, 500, temperature, 1)["recognized"] for temperature in (1.0, 0.5))
    assert hot == pytest.approx(1 - 0.75 * 0.1587, abs=0.03)
    assert cool == pytest.approx(1 - 0.75 * 0.0228, abs=0.015)
    assert recognition(model, classifier, 500, 1.0, 1)["recognized"] == hot
    assert recognition(model, classifier, 500, 1.0, 2)["recognized"] != hot
    assert model.training


@pytest.mark.parametrize("world_size", [2, 3])
def test_recognition_is_the_same_on_any_number_of_processes(world_size):
    model, classifier = OneHotPainter(4, 1.0), reader(4)
    totals = torch.zeros(4, dtype=torch.float64)

    def gather(value: Tensor) -> Tensor:
        return totals.add_(value).clone()

    for rank in range(world_size):
        figures = recognition(model, classifier, 101, 1.0, 1, rank, world_size, gather)
    assert figures == recognition(model, classifier, 101, 1.0, 1)


def test_recognition_refuses_a_classifier_of_something_else():
    with pytest.raises(ValueError, match="5 classes, the model with 4"):
        recognition(OneHotPainter(4, 1.0), reader(5), 1, 1.0, 1)
    with pytest.raises(ValueError, match="3 attributes, the model with 4"):
        recognition(OneHotPainter(4, 1.0), make(), 1, 1.0, 1)
