"""The edit metric against hand-made models whose right answer is known.

Faces here are 1 x 4 pixels, a pixel for each attribute: white where it is present. The judge reads them exactly.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.loader import build_eval_loader
from pipeline.data.preprocess import Preprocess, to_model_input
from pipeline.data.shards import TarShards
from pipeline.evaluation.edit_metric import Faces, border_around, edit_figures, held_out_faces, hidden_by, is_reliable
from pipeline.models.base import VAE, LatentGroup
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.conditions import AttributeCondition
from tests.helpers.shard_sets import Samples, write_set

NAMES = ("Hat", "Black", "Blond", "Beard")  # as in the data set
JUDGED = ("Beard", "Hat", "Blond", "Black")  # the judge has its own order
CHOSEN = AttributeCondition(chosen=("Blond", "Hat", "Black"), exclusive=(("Black", "Blond"),))


class Reader(Classifier):
    """Reads attribute `JUDGED[i]` off its pixel; `errs` names attributes that it predicts wrongly."""

    def __init__(self, errs=(), shape=(1, 1, 4), kind="attributes"):
        super().__init__(ClassifierConfig(kind=kind, names=JUDGED, image_shape=shape, width=1))
        self.signs = torch.tensor([-1.0 if name in errs else 1.0 for name in JUDGED])

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, [NAMES.index(name) for name in JUDGED]] - 0.5) * self.signs


class Editor(VAE):
    """Its latent is the image; `decode` paints the condition into it with `paint` (image, condition)."""

    groups = (LatentGroup("1x1_group00", (4, 1, 1)),)

    def __init__(self, paint, border=0):
        super().__init__((1, 1 + 2 * border, 4 + 2 * border), border, condition_size=3)
        self.paint = paint
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.noise_seen = []

    def features(self, x, condition=None): ...
    def bound(self, x, features, noise, condition=None): ...
    def sample_with_latents(self, noise, temperature=1.0, condition=None, given=()): ...
    def prior_noise(self, latents, condition=None): ...

    def encode(self, x, noise, condition=None) -> list[Tensor]:
        assert not self.training
        self.noise_seen.append(noise[0])
        return [x]

    pixel_distribution = None  # decode is enough here

    def decode(self, latents, condition=None) -> Tensor:
        image = latents[0].clone()
        inner = image[:, 0, self.border, self.border : self.border + 4]  # (b, 4), a view
        inner.copy_(self.paint(inner.clone(), condition))
        return image


def perfect(image: Tensor, condition: Tensor) -> Tensor:
    image[:, [NAMES.index(name) for name in CHOSEN.chosen]] = condition
    return image


def identity(image: Tensor, condition: Tensor) -> Tensor:
    return image


def beard_wrecker(image: Tensor, condition: Tensor) -> Tensor:
    """Edits perfectly, and turns the beard around."""
    image = perfect(image, condition)
    image[:, 3] = 1 - image[:, 3]
    return image


def hats_only(image: Tensor, condition: Tensor) -> Tensor:
    image[:, 0] = condition[:, 1]
    return image


def faces(attributes: Tensor, truth: Tensor | None = None, border: int = 0) -> list[Faces]:
    """In two ragged batches, from attributes (n, 4) in the data set's order."""
    x = torch.nn.functional.pad(attributes[:, None, None, :].float(), [border] * 4)
    condition = attributes[:, [NAMES.index(name) for name in CHOSEN.chosen]].float()
    truth = (attributes if truth is None else truth)[:, [NAMES.index(name) for name in JUDGED]]
    cut = len(x) - len(x) // 3
    parts = (slice(0, cut), slice(cut, None))
    places = list(range(len(x)))
    return [Faces(x[part], condition[part], truth[part], places[part]) for part in parts]


def some_attributes(count: int = 60, seed: int = 0) -> Tensor:
    attributes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (count, 4)))
    attributes[:, 2] *= 1 - attributes[:, 1]  # one hair color at most
    return attributes


NOTHING_HIDES = torch.zeros(2, 4, 4, dtype=torch.bool)


def figures(paint, batches, judge=None, hides=NOTHING_HIDES, **options) -> dict[str, float]:
    return edit_figures(Editor(paint), CHOSEN, batches, judge or Reader(), 0, hides, **options)


def test_a_perfect_editor_has_all():
    attributes = some_attributes()
    found = figures(perfect, faces(attributes))
    for name in CHOSEN.chosen:
        assert found.pop(f"edit/share/{name}") == attributes[:, NAMES.index(name)].double().mean()
    assert set(found.values()) == {1.0}
    accuracies = ("judge_accuracy", "reconstruction_accuracy")
    by_name = (*accuracies, "judge_sensitivity", "judge_specificity", "set", "clear")
    expected = {*accuracies, *(f"{key}/{name}" for key in by_name for name in CHOSEN.chosen)}
    for key in ("set", "set_minimum", "set_others", "clear", "clear_minimum", "clear_others"):
        expected |= {key, f"{key}_reliable"}
    assert found.keys() == {f"edit/{name}" for name in expected}


def test_an_editor_that_does_nothing_reaches_no_target():
    found = figures(identity, faces(some_attributes()))
    assert {found[f"edit/{name}"] for name in ("set", "clear", "set_minimum", "clear_minimum", "set/Hat")} == {0.0}
    assert {found[f"edit/{name}"] for name in ("set_others", "clear_others", "reconstruction_accuracy")} == {1.0}


def test_an_editor_of_one_attribute():
    found = figures(hats_only, faces(some_attributes()))
    assert found["edit/set"] == found["edit/clear"] == pytest.approx(1 / 3)
    assert found["edit/set_minimum"] == 0.0
    assert found["edit/set/Hat"] == found["edit/clear/Hat"] == 1.0


def test_others_are_counted_without_the_target_and_its_rivals():
    """Beards are wrong in every edit: of one other in three where a hair color is the target (Hat, Beard; Black is a
    rival), of one in three where a hat is (Black, Blond, Beard).
    """
    attributes = some_attributes()
    found = figures(beard_wrecker, faces(attributes))
    hats, black, blond = (attributes[:, column].sum().item() for column in (0, 1, 2))
    for edit, numbers in {"set": (60 - hats, 60 - black, 60 - blond), "clear": (hats, black, blond)}.items():
        others = 3 * numbers[0] + 2 * numbers[1] + 2 * numbers[2]
        assert found[f"edit/{edit}_others"] == pytest.approx(1 - sum(numbers) / others)
        assert found[f"edit/{edit}"] == 1.0
    assert found["edit/reconstruction_accuracy"] == pytest.approx(0.75)


def test_setting_a_rival_is_no_fault_of_the_edit():
    """The rivals change with the target: Black falls where Blond is set."""
    attributes = torch.tensor([[0, 1, 0, 0]] * 4)
    found = figures(perfect, faces(attributes))
    assert found["edit/set/Blond"] == found["edit/set_others"] == 1.0
    assert np.isnan(found["edit/set/Black"])  # all have it: nothing could be judged
    assert found["edit/set"] == found["edit/set_minimum"] == 1.0


def test_what_is_unknown_or_hidden_in_the_original_is_not_counted():
    attributes = some_attributes()
    truth = attributes.clone()
    truth[:, 3] = -1  # beards are unknown: wrong ones are not counted
    found = figures(beard_wrecker, faces(attributes, truth))
    assert found["edit/set_others"] == found["edit/clear_others"] == found["edit/reconstruction_accuracy"] == 1.0
    truth[:, 0] = -1
    assert np.isnan(figures(perfect, faces(attributes, truth))["edit/set/Hat"])


def test_what_the_edit_hides_is_not_counted():
    """A beard that vanishes under a hat: only where the hat is set."""

    def covering(image: Tensor, condition: Tensor) -> Tensor:
        image = perfect(image, condition)
        image[condition[:, 1] == 1, 3] = 0
        return image

    attributes = torch.tensor([[0, 0, 0, 1]] * 6)
    hat, beard = JUDGED.index("Hat"), JUDGED.index("Beard")
    hides = NOTHING_HIDES.clone()
    hides[1, hat, beard] = True
    assert figures(covering, faces(attributes), hides=hides)["edit/set_others"] == 1.0
    # Without the rule: of 6 x (3 others of Hat, 2 of each hair color), the beards under 6 hats are wrong.
    assert figures(covering, faces(attributes))["edit/set_others"] == pytest.approx(1 - 6 / 42)
    wrong_side = NOTHING_HIDES.clone()
    wrong_side[0, hat, beard] = True
    assert figures(covering, faces(attributes), hides=wrong_side)["edit/set_others"] == pytest.approx(1 - 6 / 42)


def test_the_judge_s_own_accuracy_is_reported():
    found = figures(perfect, faces(some_attributes()), judge=Reader(errs=("Beard",)))
    assert found["edit/judge_accuracy"] == pytest.approx(0.75)
    assert found["edit/set"] == 1.0


def test_how_often_the_judge_sees_what_is_there():
    """This judge never sees a hat: it is wrong on those that have one, right on the others."""
    judge = Reader()
    judge.register_buffer("offset", torch.tensor([0.0, -9.0, 0.0, 0.0]))
    judge.forward = lambda x: Reader.forward(judge, x) + judge.offset
    attributes = some_attributes()
    found = figures(perfect, faces(attributes), judge=judge)
    assert (found["edit/judge_sensitivity/Hat"], found["edit/judge_specificity/Hat"]) == (0.0, 1.0)
    assert (found["edit/judge_sensitivity/Blond"], found["edit/judge_specificity/Blond"]) == (1.0, 1.0)
    assert found["edit/judge_accuracy/Hat"] == pytest.approx(1 - attributes[:, 0].double().mean())
    assert (found["edit/set/Hat"], found["edit/clear/Hat"]) == (0.0, 1.0)


def test_attributes_that_are_rare_or_misjudged_do_not_count_as_reliable():
    """Of 60 faces 2 have a hat, and the judge is wrong on each Blond: Black and Beard are left, of which only Black is
    edited.
    """
    attributes = some_attributes()
    attributes[:, 0] = torch.arange(60) < 2
    found = figures(beard_wrecker, faces(attributes), judge=Reader(errs=("Blond",)))
    assert found["edit/share/Hat"] == pytest.approx(2 / 60)
    assert found["edit/judge_accuracy/Blond"] == found["edit/set/Blond"] == found["edit/set_minimum"] == 0.0
    assert found["edit/set_reliable"] == found["edit/set_minimum_reliable"] == found["edit/set/Black"] == 1.0
    assert found["edit/clear_reliable"] == 1.0
    assert np.isnan(found["edit/set_others_reliable"])  # nothing is left beside Black


def test_others_that_are_reliable_are_the_models_in_edits_of_reliable_ones():
    """The judge is wrong on each Blond. Beards, which the model does not have, are wrong in every edit; hats in edits
    of Blond; and Black in edits of hats.
    """

    def painter(image: Tensor, condition: Tensor) -> Tensor:
        edited = beard_wrecker(image.clone(), condition)
        hat, black, blond = (edited[:, column] != image[:, column] for column in (0, 1, 2))
        edited[blond & ~black, 0] = 1 - edited[blond & ~black, 0]
        edited[hat, 1] = 1 - edited[hat, 1]
        return edited

    attributes = some_attributes()
    found = figures(painter, faces(attributes), judge=Reader(errs=("Blond",)))
    hats, black = (attributes[:, column].sum().item() for column in (0, 1))
    assert found["edit/set_others_reliable"] == pytest.approx((60 - black) / (60 - black + 60 - hats))
    assert found["edit/clear_others_reliable"] == pytest.approx(black / (black + hats))


@pytest.mark.parametrize(
    ("share", "accuracy", "reliable"),
    [(0.05, 0.85, True), (0.049, 0.9, False), (0.95, 0.85, True), (0.96, 0.99, False), (0.5, 0.84, False)],
)
def test_the_limits_of_what_is_reliable(share, accuracy, reliable):
    assert is_reliable(torch.tensor([share]).double(), torch.tensor([accuracy]).double()).tolist() == [reliable]


def test_a_border_is_no_part_of_the_face():
    model = Editor(perfect, border=2)
    found = edit_figures(model, CHOSEN, faces(some_attributes(), border=2), Reader(), 0, NOTHING_HIDES)
    assert {found[f"edit/{name}"] for name in ("set", "clear", "set_others", "judge_accuracy")} == {1.0}
    assert border_around((3, 36, 34), (3, 32, 30)) == 2
    for judged in [(1, 32, 30), (3, 32, 31), (3, 33, 31), (3, 40, 38)]:
        with pytest.raises(ValueError, match="take different images"):
            border_around((3, 36, 34), judged)


def test_the_model_keeps_its_mode_and_noise_follows_the_image():
    model = Editor(identity)
    model.train()
    both = faces(some_attributes())
    edit_figures(model, CHOSEN, both, Reader(), 3, NOTHING_HIDES)
    assert model.training
    whole = torch.cat(model.noise_seen)
    model.noise_seen.clear()
    edit_figures(model, CHOSEN, both[1:], Reader(), 3, NOTHING_HIDES)
    assert torch.equal(model.noise_seen[0], whole[len(both[0].x) :])


def test_a_judge_that_cannot_judge_is_refused():
    with pytest.raises(ValueError, match="predicts classes"):
        figures(perfect, [], judge=Reader(kind="classes"))
    with pytest.raises(ValueError, match="take different images"):
        figures(perfect, [], judge=Reader(shape=(1, 1, 5)))
    narrow = AttributeCondition(chosen=("Blond", "Bangs"))
    with pytest.raises(ValueError, match="was not trained on Bangs"):
        edit_figures(Editor(perfect), narrow, [], Reader(), 0, NOTHING_HIDES)


@pytest.mark.parametrize("shares", [(20, 40), (1, 59), (0, 60)])
def test_any_number_of_processes_finds_the_same(shares):
    """Unequal shares, one of them empty: sums and counts are added, and every rank brings the same names."""
    attributes = some_attributes()
    whole = figures(beard_wrecker, faces(attributes))
    brought = []

    def note(totals: Tensor) -> Tensor:
        brought.append(totals.clone())
        return totals

    batches = [faces(part) if len(part) else [] for part in attributes.split(shares)]
    figures(beard_wrecker, batches[0], sum_over_ranks=note)
    second = figures(beard_wrecker, batches[1], sum_over_ranks=lambda totals: totals + brought.pop(0))
    assert brought == []
    assert second == whole


# ---- from a shard set ------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> TarShards:
    attributes = some_attributes(45).numpy()
    attributes[3, 3] = -1
    hidden = np.zeros((45, 4), bool)
    hidden[:, 3] = attributes[:, 0] == 1  # hats hide beards
    hidden[7, 1] = True
    samples = Samples(np.clip(attributes, 0, 1).astype(np.uint8)[:, None, :, None] * 255, None, attributes, hidden)
    root = write_set(Path(tmp_path) / "set", {"train": samples, "test": samples}, [20])
    return TarShards(root, "test")


def named(shards: TarShards, judge: Classifier) -> Classifier:
    """The judge, with the set's names for the attributes."""
    names = tuple(f"Attribute_{NAMES.index(name)}" for name in JUDGED)
    judge.config = judge.config.model_copy(update={"names": names})
    return judge


def test_hiding_is_read_off_the_split(shards):
    hides = hidden_by(shards, named(shards, Reader()))
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[1, JUDGED.index("Hat"), JUDGED.index("Beard")] = True
    assert torch.equal(hides, expected)


def test_a_set_of_shards_from_file_to_figures(shards):
    judge = named(shards, Reader())
    condition = AttributeCondition(chosen=("Attribute_2", "Attribute_0", "Attribute_1"))

    def inputs(batch):
        return to_model_input(batch.images), condition.encode(batch.labels, batch.attributes, shards.attribute_names)

    loader = build_eval_loader(shards, Preprocess(0), batch_size=7)
    batches = list(held_out_faces(loader, shards, inputs, judge))
    assert [position for batch in batches for position in batch.positions] == list(range(45))
    truth = torch.cat([batch.truth for batch in batches])
    shown = torch.from_numpy(shards.attributes(range(45)))
    shown[torch.from_numpy(shards.hidden(range(45)))] = -1
    assert torch.equal(truth, shown[:, [NAMES.index(name) for name in JUDGED]])
    found = edit_figures(Editor(perfect), condition, batches, judge, 0, hidden_by(shards, judge))
    assert found["edit/set"] == found["edit/clear"] == found["edit/judge_accuracy"] == 1.0
    stranger = Reader()
    with pytest.raises(ValueError, match="the classifier's attribute: Beard is not known"):
        list(held_out_faces(loader, shards, inputs, stranger))
