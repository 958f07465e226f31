"""Model cards: front matter that the Hub reads, code that works as written, figures, and strings that stay text."""

import re

import pytest
import yaml

from pipeline.config import build
from pipeline.inference.markdown import block, code, escape
from pipeline.inference.model_card import About, License, render
from pipeline.inference.model_folder import ModelContent
from pipeline.recipe import Recipe
from tests.helpers.recipes import tiny_settings

DIGEST = "ab" * 32
HOSTILE = "\x1b[2J`a` | ![x](y) <script>alert(1)</script>\n---\n# Title\n```\nend\u202e\ud800"
"""A lone surrogate, at the end, cannot be in settings."""


def content(facts: dict | None = None, step: int = 7, **sections) -> ModelContent:
    recipe = build(Recipe, tiny_settings("data/faces") | sections)
    return ModelContent(recipe, {}, step, facts or {})


def report(figures: dict, **entries) -> dict:
    data = {"name": "faces", "split": "test", "fingerprint": "cd" * 32, "binarize": "dynamic", "bits": 8}
    stated = {"weights_sha256": DIGEST, "images": 100, "split_images": 500, "seed": 3, "precision": "fp32"}
    return {"data": data, "figures": figures} | stated | entries


def front_matter(card: str) -> dict:
    start, matter, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def section(card: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.M | re.S)[1]


ABOUT = About("faces", "models/faces")


def test_the_front_matter_is_what_the_hub_reads():
    about = About("faces", "hf-hub:alice/faces", License("apache-2.0"), ["alice/photos"])
    figures = {"bpd": 3.25, "nll": 80.5, "nll_se": 0.5, "kl": 4.0, "kl/8x8": 2.0, "skipped_samples": 3.0}
    found = front_matter(render(content(), about, {"elbo.json": report(figures)}))
    (index,) = found.pop("model-index")
    assert found == {
        "library_name": "nvae-pipeline",
        "pipeline_tag": "unconditional-image-generation",
        "license": "apache-2.0",
        "datasets": ["alice/photos"],
        "tags": ["variational-autoencoder", "nvae"],
    }
    assert index["name"] == "faces"
    (result,) = index["results"]
    assert result["dataset"] == {"type": "alice/photos", "name": "faces", "split": "test"}
    assert [(one["type"], one["value"]) for one in result["metrics"]] == [("nll", 80.5), ("bpd", 3.25)]


def test_what_is_not_known_is_not_in_the_front_matter():
    found = front_matter(render(content(), ABOUT))
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}
    card = render(content(), ABOUT)
    assert "No evaluation of these weights was at hand." in section(card, "Figures")
    assert "None is stated. Ask the author" in section(card, "License")
    assert "samples.png" not in card


def test_another_license_has_its_name_and_link():
    license = License("other", "NVIDIA Source Code License", "https://example.org/l", "Non-commercial use only.")
    card = render(content(), About("a", "a", license))
    found = front_matter(card)
    assert (found["license"], found["license_name"]) == ("other", "NVIDIA Source Code License")
    assert found["license_link"] == "https://example.org/l"
    assert "[NVIDIA Source Code License](https://example.org/l). Non-commercial use only." in section(card, "License")


def test_figures_state_what_they_depend_on():
    figures = {"elbo": -90.0, "nll": 84.12345, "nll_se": 0.25, "other/thing": 1.0, "bpd": float("nan"), "count": 3}
    card = render(content(), ABOUT, {"elbo_test.json": report(figures, importance_samples=100)})
    text = section(card, "Figures")
    assert f"sha256 `{DIGEST}`" in text
    assert "| negative log-likelihood, nats | 84.1235 +- 0.2500 |\n| evidence lower bound, nats | -90.0000 |" in text
    assert "On `100` of `500` images of split `test` of `faces` (fingerprint `cdcdcdcdcdcd`...):" in text
    assert "importance samples `100`, seed `3`, precision `fp32`, binarize `dynamic` (`elbo_test.json`)" in text
    assert "other" not in text
    assert "nan" not in text
    assert "count" not in text


def test_figures_without_a_title_have_their_own_name():
    sampled = report({"recognized/3": 0.75, "recognized/4": 0.5}, data=None, temperature=0.7)
    text = section(render(content(), ABOUT, {"r.json": sampled}), "Figures")
    assert "On samples: temperature `0.7`, seed `3`" in text
    assert "| `recognized/3` | 0.7500 |" in text


def test_data_and_training_are_described():
    manifest = {
        "name": "toy_faces",
        "splits": {"train": {"count": 20000}, "test": {"count": 2000}},
        "transform": {"crop": [1, 2]},
        "source": {"files": {"a.bin": {"sha256": "12"}}},
    }
    source = {"kind": "run", "run_id": "r1", "averaged": True, "total_steps": 10}
    facts = {"data_fingerprint": "fe" * 32, "source": source, "holdout": {"count": 50}, "torch": "2.13.0"}
    card = render(content(facts), About("a", "a", manifest=manifest))
    data = section(card, "Data")
    for line in (
        f"Fingerprint of the shard set: `{'fe' * 32}`",
        "Images by split: `train` 20,000, `test` 2,000",
        "Transform, `crop`: `[1, 2]`",
        'Origin, `files.a.bin.sha256`: `"12"`',
        "Held out from it for validation: `50` images",
    ):
        assert f"- {line}\n" in data
    training = section(card, "Training")
    assert "- 7 of 10 optimizer steps of 8 images, in `fp32`\n" in training
    assert "moving average over the steps, of decay 0.9\n" in training
    assert "- Origin of the weights: kind `run`, run id `r1`\n" in training
    assert yaml.safe_load(re.search("```yaml\n(.*?)```", training, re.S)[1])["train"]["steps"] == 6


CLASSES = {"name": "class", "num_classes": 2}
ATTRIBUTES = {"name": "attributes", "chosen": ["Smiling", HOSTILE[:40]]}


def test_strings_of_strangers_stay_text():
    """In every place: class and attribute names, data, source, reports, file names, settings, title."""
    manifest = {"name": HOSTILE, "splits": {HOSTILE: {"count": 1}}, "transform": {HOSTILE: HOSTILE}, "source": HOSTILE}
    facts = {"classes": [HOSTILE, HOSTILE], "data_fingerprint": HOSTILE, "torch": HOSTILE, "source": {HOSTILE: HOSTILE}}
    facts["holdout"] = {"count": HOSTILE}
    figures = {HOSTILE: 1.0, "elbo": 2.0}
    hostile = report(figures, seed=HOSTILE, data={"name": HOSTILE, "split": HOSTILE, "bits": HOSTILE})
    about = About(HOSTILE, HOSTILE, License("other", HOSTILE), manifest=manifest, picture=HOSTILE)
    for condition in (CLASSES, ATTRIBUTES):
        settings = tiny_settings("data/faces")["data"] | {"source": HOSTILE[:-1], "train_split": HOSTILE[:-1]}
        card = render(content(facts, condition=condition, data=settings), about, {HOSTILE: hostile})
        card.encode()
        assert all(letter.isprintable() or letter == "\n" for letter in card)
        assert card.count("\n---\n") == 1
        assert front_matter(card)["library_name"] == "nvae-pipeline"
        titles = re.findall(r"^#+ .*", without_code(card), re.M)
        assert [title for title in titles if title.startswith("# ")] == titles[:1]
        assert len(titles) == 7
        assert re.findall(r"(?<!\\)<|(?<!\\)!\[(?!Samples\])", without_code(card)) == []


def without_code(card: str) -> str:
    """The card without front matter, code blocks and spans, in which nothing is markup."""
    card = card.split("\n---\n", 1)[1]
    card = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card, flags=re.M | re.S)
    return re.sub(r"(?<!\\)`[^`\n]+`", "", card)


@pytest.mark.parametrize("text", [HOSTILE, "", "`", "a|b", "x" * 1000])
def test_the_pieces_of_markdown(text):
    assert re.fullmatch(r"`[^`\n|]{1,200}`", code(text))
    assert "\n" not in escape(text)
    fenced = block(text, "yaml")
    fence = re.match("`+", fenced)[0]
    assert fenced.count(fence) == 2
    assert fenced.endswith(f"\n{fence}")


@pytest.mark.parametrize("condition", [None, CLASSES, ATTRIBUTES])
def test_the_example_is_python(condition):
    card = render(content({"classes": ["a", "b"]}, condition=condition), ABOUT)
    example = re.search("```python\n(.*?)```", card, re.S)[1]
    compile(example, "card", "exec")
    given = {None: "seed=1)", "class": "seed=1, condition=0)", "attributes": "seed=1, condition={'Smiling': 1})"}
    assert given[condition and condition["name"]] in example


def test_a_card_of_real_faces_says_what_it_is_not_for():
    assert "real people" in section(render(content(), About("a", "a", real_faces=True)), "Intended use and limits")
    assert "real people" not in render(content(), ABOUT)
