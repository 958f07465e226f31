"""The condition of an image, inferred by maximum likelihood."""

from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.inference import infer_condition
from pipeline.inference.infer_condition import alternatives, infer_attributes, infer_class, log_likelihoods
from pipeline.models.conditions import AttributeCondition
from tests.helpers.recipes import tiny_settings
from tests.helpers.trained_runs import make_run

NAMES = ["Attribute_0", "Attribute_1", "Attribute_2"]
CONDITIONS = {
    "classes": {"name": "class", "num_classes": 10},
    "attributes": {"name": "attributes", "chosen": NAMES, "exclusive": [NAMES[:2]]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: make_run(folder / name, tiny_settings("nowhere") | {"condition": condition})
        for name, condition in CONDITIONS.items()
    }


def test_candidates_are_compared_under_one_noise(runs):
    """The value of a candidate is that of the plain log-likelihood, and does not depend on the other candidates."""
    trained = pipeline.load(runs["classes"])
    image = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()
    together = log_likelihoods(trained, image, torch.eye(10))
    alone = torch.cat([log_likelihoods(trained, image, torch.eye(10)[i : i + 1]) for i in range(10)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-2)
    assert torch.equal(log_likelihoods(trained, image, torch.eye(10)[[3, 3]]).diff(), torch.zeros(1).double())
    assert infer_class(trained, image) == int(together.argmax())


def fake(monkeypatch, score):
    monkeypatch.setattr(infer_condition, "log_likelihoods", lambda trained, image, rows: score(rows).double())


@pytest.mark.parametrize("truth", [[1.0, 0, 1], [0.0, 1, 0], [0.0, 0, 0], [0.0, 1, 1]])
def test_ascent_finds_the_peak(runs, monkeypatch, truth):
    """Where log p falls with the distance from the truth, the truth is found: rivals are exchanged, not added."""
    fake(monkeypatch, lambda rows: -(rows - torch.tensor(truth)).abs().sum(1))
    found = infer_attributes(pipeline.load(runs["attributes"]), torch.zeros(1, 3, 16, 16), {})
    assert list(found.values()) == truth


def test_what_is_known_stays(runs, monkeypatch):
    fake(monkeypatch, lambda rows: -(rows - torch.tensor([0.0, 1, 0])).abs().sum(1))
    trained = pipeline.load(runs["attributes"])
    found = infer_attributes(trained, torch.zeros(1, 3, 16, 16), {"Attribute_0": 1, "Attribute_2": 1})
    assert found == {"Attribute_0": 1, "Attribute_1": 0, "Attribute_2": 1}  # not 1 beside a rival that is known


def test_ascent_ends(runs, monkeypatch):
    """Also where everything is equally likely, or nothing is a number."""
    calls = []
    fake(monkeypatch, lambda rows: calls.append(len(rows)) or torch.full((len(rows),), torch.nan))
    infer_attributes(pipeline.load(runs["attributes"]), torch.zeros(1, 3, 16, 16), {})
    assert len(calls) == 1 + 3


def test_exclusive_attributes_are_never_proposed_together():
    condition = AttributeCondition(chosen=tuple(NAMES), exclusive=((NAMES[0], NAMES[1]),))
    for start in ([1.0, 0, 0], [0.0, 1, 1], [0.0, 0, 0]):
        for rows in alternatives(condition, torch.tensor([start]), {}):
            assert bool((rows[:, :2].sum(1) <= 1).all())
            assert bool((rows != torch.tensor([start])).any())
