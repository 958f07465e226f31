"""The card of a model folder, README.md: front matter for the Hugging Face Hub, and what a stranger has to know."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import dump, flatten
from pipeline.inference.card_figures import Reports, hub_results, tables
from pipeline.inference.hub import front_matter
from pipeline.inference.markdown import block, bullets, code, escape
from pipeline.inference.model_folder import CONFIG, PICTURE, ModelContent
from pipeline.inference.releases import License, release_of
from pipeline.inference.text import printable
from pipeline.models.conditions import AttributeCondition, ClassCondition
from pipeline.recipe import Recipe, build_model

VAE = "variational autoencoder (Kingma & Welling 2014, [arXiv:1312.6114](https://arxiv.org/abs/1312.6114))"
MODELS = {
    "nvae": "NVAE (Vahdat & Kautz 2020, [arXiv:2007.03898](https://arxiv.org/abs/2007.03898)), a hierarchical "
    "variational autoencoder",
    "vdvae": "VDVAE (Child 2020, [arXiv:2011.10650](https://arxiv.org/abs/2011.10650)), a very deep hierarchical "
    "variational autoencoder",
    "efficient_vdvae": "Efficient-VDVAE (Hazami et al. 2022, [arXiv:2203.13751](https://arxiv.org/abs/2203.13751)), a "
    "hierarchical variational autoencoder",
    "mlp_vae": f"A {VAE} of fully connected layers",
    "conv_vae": f"A {VAE} of strided convolutions",
    "resnet_vae": f"A {VAE} of residual blocks",
    "attribute_vae": f"A convolutional {VAE} that edits images by changing their attributes",
}
TRAINED_BY = {"torch": "Version of torch", "world_size": "Processes"}
"""Facts of a checkpoint that the card states."""
STATED = ("averaged", "total_steps")
"""What the card says in words of where the weights come from; the rest is listed."""
NO_REPORTS: Reports = {}
MAX_LISTED = 20
"""Facts and names of a list that are shown."""


@dataclass(frozen=True)
class About:
    """What a card states beside the model."""

    name: str
    """The card's title."""
    location: str
    """What `pipeline.load` is given: hf-hub:OWNER/NAME, or the folder's name."""
    license: License | None = None
    datasets: Sequence[str] = ()
    """Ids of data sets on the Hub."""
    manifest: Mapping[str, Any] | None = None
    """Of the shard set that the model was trained on, if it is at hand."""
    real_faces: bool = False
    """Whether the data set shows real people."""
    picture: str | None = None
    """What samples.png shows; None where there is none."""


def render(content: ModelContent, about: About, reports: Reports = NO_REPORTS) -> str:
    """The card, Markdown. `reports`: evaluations of exactly these weights, by the names of their files."""
    parts = [
        f"---\n{_front_matter(content, about, reports)}\n---",
        f"# {escape(about.name)}",
        _what(content, about),
        "" if about.picture is None else f"![Samples]({PICTURE})\n\n*{escape(about.picture)}*",
        f"## Use\n\n{_use(content, about)}",
        f"## Data\n\n{_data(content, about)}",
        f"## Figures\n\n{tables(reports)}",
        f"## Training\n\n{_training(content)}",
        f"## Intended use and limits\n\n{_limits(content, about)}",
        f"## License\n\n{license_text(about.license)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def data_name(recipe: Recipe, manifest: Mapping[str, Any] | None = None) -> str:
    """The name of the data set: of its manifest, else of its source, else of its folder."""
    source = (recipe.data.source or "").split()
    folder = (recipe.data.root or "").rstrip("/").rpartition("/")[2]
    return printable(str(manifest["name"]) if manifest else source[0] if source else folder or "unknown")


def _front_matter(content: ModelContent, about: About, reports: Reports) -> str:
    recipe = content.recipe
    kinds = {ClassCondition: ["class-conditional"], AttributeCondition: ["attribute-conditional"]}
    license = about.license
    return front_matter(
        library_name="nvae-pipeline",
        pipeline_tag="unconditional-image-generation",
        license=license and license.id,
        license_name=license and license.name and printable(license.name),
        license_link=license and license.link,
        datasets=list(about.datasets) or None,
        tags=["variational-autoencoder", recipe.model.name, *kinds.get(type(recipe.condition), [])],
        model_name=printable(about.name),
        results=hub_results(reports, data_name(recipe, about.manifest), about.datasets),
    )


def _what(content: ModelContent, about: About) -> str:
    recipe = content.recipe
    with torch.device("meta"):
        model = build_model(recipe)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    latents = sum(channels * height * width for channels, height, width in (group.shape for group in model.groups))
    conditions = {ClassCondition: ", conditioned on the class", AttributeCondition: ", conditioned on attributes"}
    size, channels, groups = recipe.data.size, recipe.data.channels, len(model.groups)
    return (
        f"{MODELS.get(recipe.model.name, recipe.model.name)}{conditions.get(type(recipe.condition), '')}, trained on "
        f"{code(data_name(recipe, about.manifest))}: images of {size} x {size} pixels, "
        f"{channels} color channel{'s' if channels > 1 else ''}. {millions:.2f} million parameters; "
        f"{latents:,} latent variables in {groups} group{'s' if groups > 1 else ''}."
    )


def _use(content: ModelContent, about: About) -> str:
    channels, size = content.recipe.data.channels, content.recipe.data.size
    given, names = _condition(content)
    comment = "" if ":" in about.location else "  # the path of this folder"
    example = (
        f"import pipeline\n\nmodel = pipeline.load({ascii(about.location)}){comment}\n"
        f"images = model.sample(16, temperature=0.7, seed=1{given})  # (16, {channels}, {size}, {size}) in [0, 1]\n"
        f"latents = model.encode(images{given})  # one tensor for each group of latent variables\n"
        f"again = model.decode(latents{given})"
    )
    return (
        f"With nvae-pipeline, whose package is `pipeline`:\n\n{block(example, 'python')}\n\n{names}"
        "`pipeline/sample.py`, `edit.py` and `evaluate.py` take the same name. The weights are a safetensors file, "
        "compared with its sha256 when it is loaded. Nothing in this folder runs code."
    )


def _condition(content: ModelContent) -> tuple[str, str]:
    """The argument of the example, and the names that can be given."""
    condition = content.recipe.condition
    if isinstance(condition, AttributeCondition):
        names = ", ".join(map(code, condition.chosen))
        return f", condition={{{ascii(condition.chosen[0])}: 1}}", f"Attributes: {names}.\n\n"
    if not isinstance(condition, ClassCondition):
        return "", ""
    names = content.facts.get("classes")
    names = names[:MAX_LISTED] if isinstance(names, list) else []
    shown = ", ".join(f"{number} {code(name)}" for number, name in enumerate(names))
    return ", condition=0", f"Classes, by number or name: {shown}.\n\n" if shown else ""


def _data(content: ModelContent, about: About) -> str:
    data, facts, manifest = content.recipe.data, content.facts, about.manifest
    lines = [f"Fingerprint of the shard set: {code(facts.get('data_fingerprint') or 'not stated')}"]
    if data.source:
        lines.append(f"By its recipe, made with {code(f'python -m shard_data {data.source}')}")
    if manifest:
        counts = [f"{code(name)} {split['count']:,}" for name, split in manifest["splits"].items()]
        lines.append(f"Images by split: {', '.join(counts)}")
        lines += [f"Transform, {line}" for line in _listed(manifest["transform"])]
        lines += [f"Origin, {line}" for line in _listed(manifest.get("source"))]
    lines.append(f"Trained on the split {code(data.train_split)}")
    held_out = facts.get("holdout")
    if isinstance(held_out, Mapping):
        lines.append(f"Held out from it for validation: {code(held_out.get('count'))} images")
    inputs = {
        "bits per channel": data.bits,
        "binarization": data.binarize,
        "black border": data.pad,
    }
    if data.flip:
        lines.append("Training images are mirrored with probability 1/2")
    lines += [f"Model input, {name}: {code(value)}" for name, value in inputs.items() if value not in (8, "none", 0)]
    return f"{code(data_name(content.recipe, manifest))}\n\n{bullets(lines)}"


def _listed(facts: Any) -> list[str]:
    """Nested facts, one per line."""
    flat = flatten(facts) if isinstance(facts, Mapping) else {}
    shown = [f"{code(name)}: {code(json.dumps(value, default=str))}" for name, value in flat.items()]
    return shown[:MAX_LISTED] + ([f"and {len(flat) - MAX_LISTED} more"] if len(flat) > MAX_LISTED else [])


def _training(content: ModelContent) -> str:
    train, source = content.recipe.train, content.facts.get("source")
    source = source if isinstance(source, Mapping) else {}
    total = source.get("total_steps")
    of = f" of {total:,}" if isinstance(total, int) and total > 0 else ""
    precision = "" if release_of(content.facts) else f", in {code(train.precision)}"  # such files do not state it
    steps = f"{content.step:,}{of}" if content.step else "An unknown number of"
    lines = [f"{steps} optimizer steps of {train.batch_size} images{precision}"]
    if source.get("averaged") is True:
        lines.append(f"The weights are a moving average over the steps, of decay {train.ema_decay:g}")
    lines += _origin("Origin of the weights", source)
    lines += _origin("Training started from weights", content.facts.get("initialized_from"))
    lines += _readjusted(content.facts.get("readjusted"))
    lines += [f"{title}: {code(content.facts[name])}" for name, title in TRAINED_BY.items() if name in content.facts]
    settings = block(dump(content.recipe, defaults=False), "yaml")
    return f"{bullets(lines)}\n\nSettings that differ from their defaults (all of them: `{CONFIG}`):\n\n{settings}"


def _origin(title: str, source: Any) -> list[str]:
    """A line on where weights come from, if that is stated."""
    facts = source.items() if isinstance(source, Mapping) else ()
    stated = {name: value for name, value in facts if name not in STATED and value is not None}
    shown = [f"{escape(str(name).replace('_', ' '))} {code(value)}" for name, value in stated.items()]
    return [f"{title}: {', '.join(shown)}"] if shown else []


def _readjusted(how: Any) -> list[str]:
    """A line on batch norm's statistics where they were re-estimated (`readjust`)."""
    if not isinstance(how, Mapping):
        return []
    iterations, temperature, batch_size, seed = (
        code(how.get(name)) for name in ("iterations", "temperature", "batch_size", "seed")
    )
    return [
        f"Batch norm's running statistics are those of samples at temperature {temperature} ({iterations} batches of "
        f"{batch_size}, seed {seed}) instead of those of training. Sample at this temperature, and measure likelihoods "
        "with the statistics of training"
    ]


def _limits(content: ModelContent, about: About) -> str:
    size = content.recipe.data.size
    lines = [
        "For research and teaching on generative models: likelihoods, samples, latent variables.",
        f"It models images like those that it was trained on, of {size} x {size} pixels in the same alignment. Samples "
        "repeat what is frequent in the data, and its biases.",
        "A high likelihood does not mean that an image belongs to the data (Nalisnick et al. 2019, "
        "[arXiv:1810.09136](https://arxiv.org/abs/1810.09136)).",
    ]
    if about.real_faces:
        lines.append(
            "The training images show real people. It is not for identifying or judging anyone, and its samples and "
            "edits are not to be passed off as photographs. Attributes are opinions of annotators, not facts."
        )
    return bullets(lines)


def license_text(license: License | None) -> str:
    """Markdown; says so where none is stated."""
    if license is None:
        return "None is stated. Ask the author before you use or share these weights."
    name = escape(license.name or license.id)
    text = f"[{name}]({license.link})" if license.link else name
    return f"The weights: {text}. {license.note}".rstrip()
