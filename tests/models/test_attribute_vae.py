"""attribute_vae: conditioning, the terms of its loss, and its parts in pipeline.nn."""

import copy
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import build, overlay
from pipeline.models.attribute_vae import AttributeVAE, AttributeVAEConfig
from pipeline.models.base import evaluating
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.models.conditions import AttributeCondition, ClassCondition
from pipeline.models.noise import draw_noise
from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.independence import cross_covariance
from pipeline.recipe import Recipe
from pipeline.run.classifier_folder import load_classifier, load_frozen_classifier, save_classifier
from tests.helpers.model_cases import BASELINE, BY_ATTRIBUTES, FACES, make_trainer, write_data
from tests.helpers.recipes import tiny_settings

NAMES = ("Hat", "Black", "Blond", "Smile", "Gray")
CONDITION = AttributeCondition(chosen=NAMES, exclusive=(("Black", "Blond", "Gray"),))
SHAPE = (3, 8, 8)
ALL = {"adversary_weight": 2.0, "independence_weight": 3.0, "local_channels": 1, "pull_weight": 0.5}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_conditions(count: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, len(NAMES)), generator=generator).double()


def make_model(shape=SHAPE, border=0, **settings) -> AttributeVAE:
    """In float64, with every parameter moved away from its start, so that nothing is zero by chance. The classifier is
    loaded where its folder is given.
    """
    sizes = {"width": 4, "latent_size": 24, "features": 16, "embedding": 6}
    torch.manual_seed(0)
    frozen = load_frozen_classifier(settings["classifier"]) if "classifier" in settings else None
    model = AttributeVAEConfig(**(sizes | settings)).build(shape, border, 8, CONDITION, frozen).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * random(*parameter.shape, seed=100 + number))
    return model


def classifying(classifier: Path | str, shape=SHAPE, **settings) -> AttributeVAE:
    """A model with the term of this classifier, of weight 1."""
    return make_model(shape, classification_weight=1.0, classifier=str(classifier), **settings)


def inputs(model: AttributeVAE, count: int = 6) -> tuple[Tensor, list[Tensor], Tensor]:
    x = torch.sigmoid(random(count, *model.image_shape))
    noise = draw_noise(model.noise_groups, 0, "train", range(count), dtype=torch.float64)
    return x, noise, some_conditions(count)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory) -> Path:
    """A classifier of more attributes than the model's, in another order."""
    return write_classifier(tmp_path_factory.mktemp("classifiers") / "aid", seed=3)


def write_classifier(folder: Path, seed: int, names=("Smile", "Beard", *NAMES[:3], "Gray"), shape=SHAPE) -> Path:
    torch.manual_seed(seed)
    classifier = Classifier(ClassifierConfig(kind="attributes", names=names, image_shape=shape, width=4))
    save_classifier(classifier, folder, step=1, facts={})
    return folder


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_cross_covariance_by_its_definition():
    a, b = random(7, 3), random(7, 2, seed=2)
    rows = torch.stack([torch.cat([a[:, i], b[:, j]]).view(2, 7) for i in range(3) for j in range(2)])  # (6, 2, 7)
    expected = sum(pair.cov(correction=0)[0, 1] ** 2 for pair in rows) / 2
    torch.testing.assert_close(cross_covariance(a, b), expected)
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert cross_covariance(signs[:, :1], signs[:, 1:]) == 0
    assert torch.autograd.gradcheck(cross_covariance, (a.requires_grad_(), b.requires_grad_()))


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "top"), [(8, 4), (28, 7), (32, 4), (48, 6), (64, 4), (128, 4)])
def test_sizes(side, top):
    model = make_model((3, side, side), width=2).eval()
    assert model.local_shape[1:] == (top, top)
    x, noise, condition = inputs(model, 2)
    assert model.reconstruct(x, noise, condition).shape == x.shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="30 is not a multiple of 4"):
        make_model((3, 30, 30))
    with pytest.raises(ValueError, match=r"local_channels=2.*latent_size=24"):
        make_model(local_channels=2)
    with pytest.raises(ValueError, match=r"condition\.name=attributes"):
        AttributeVAEConfig().build(SHAPE, 0, 8, ClassCondition(num_classes=10))
    with pytest.raises(ValueError, match=r"condition\.name=attributes"):
        AttributeVAEConfig().build(SHAPE, 0, 8, None)
    with pytest.raises(ValueError, match="local_channels above 0"):
        AttributeVAEConfig(independence_weight=1.0)
    with pytest.raises(ValueError, match="python -m pipeline.train_classifier"):
        AttributeVAEConfig(classification_weight=1.0)


@pytest.mark.parametrize("conditioning", ["join", "batch_norm"])
def test_the_attributes_reach_posterior_and_decoder(conditioning):
    model = make_model(conditioning=conditioning).eval()
    x, noise, condition = inputs(model)
    z = model.encode(x, noise, condition)
    assert not torch.allclose(z[0], model.encode(x, noise, 1 - condition)[0], atol=1e-3)
    assert not torch.allclose(model.decode(z, condition), model.decode(z, 1 - condition), atol=1e-3)


def test_a_local_unit_acts_at_its_place():
    """Before the blocks, whose convolutions carry it further."""
    model = make_model(local_channels=1, conditioning="join").eval()
    seen = []
    model.start_norm.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    z, condition = random(1, 24, 1, 1), some_conditions(1)
    moved = z.clone()
    moved[0, 24 - 16 + 5] += 1  # place (1, 1) of the 4x4 map
    for latent in (z, moved):
        model.decode([latent], condition)
    changed = (seen[0] - seen[1]).abs().amax(1)[0]  # (4, 4)
    assert changed[1, 1] > 1e-3
    assert changed.count_nonzero() == 1


OPTIONS = {
    "plain": {},
    "join": {"conditioning": "join"},
    "flows": {"flows": {"name": "iaf", "length": 2}},
    "split": {"local_channels": 1},
    "classification": {"classification_weight": 1.0},
    "adversary": {"adversary_weight": 1.0},
    "independence": {"independence_weight": 1.0, "local_channels": 1},
    "pull": {"pull_weight": 1.0},
    "all": {"classification_weight": 1.0, **ALL},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_gets_a_gradient(option, classifier_folder):
    """DDP waits for each: a term that is off has none."""
    settings = OPTIONS[option]
    if "classification_weight" in settings:
        settings = settings | {"classifier": str(classifier_folder)}
    model = make_model(**settings)
    out = model(*inputs(model))
    named = {name for name in ("classification", "adversary", "independence", "pull") if f"{name}_weight" in settings}
    assert set(out.penalties) == named
    assert all(penalty.shape == (6,) for penalty in out.penalties.values())
    (sum(out.penalties.values()) - out.elbo).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    with evaluating(model):
        assert model(*inputs(model)).penalties == {}


def test_a_weight_multiplies_its_term(classifier_folder):
    settings = {"classifier": str(classifier_folder), "local_channels": 1}
    weights = {"classification": 2.0, "adversary": 3.0, "independence": 4.0, "pull": 5.0}
    ones = make_model(**settings, **{f"{name}_weight": 1.0 for name in weights})
    others = make_model(**settings, **{f"{name}_weight": weight for name, weight in weights.items()})
    plain, weighted = (model(*inputs(model)).penalties for model in (ones, others))
    for name, weight in weights.items():
        torch.testing.assert_close(weighted[name], weight * plain[name])


# ---- the terms -------------------------------------------------------------------------------------------------------


def test_pull_is_half_the_square_of_the_latent():
    model = make_model(pull_weight=1.0)
    x, noise, condition = inputs(model)
    pull = model(x, noise, condition).penalties["pull"]
    z = model.encode(x, noise, condition)[0].flatten(1)
    torch.testing.assert_close(pull, z.square().sum(1) / 2)


def test_the_adversary_minimizes_the_term_and_the_encoder_maximizes_it():
    model = make_model(adversary_weight=1.0)
    x, noise, condition = inputs(model)
    condition[0, 1] = 0.5  # unknown: not part of the term
    term = model(x, noise, condition).penalties["adversary"].sum()
    weights = {"encoder": model.summary[0].weight, "adversary": model.adversary[0].weight}
    found = torch.autograd.grad(term, list(weights.values()))
    z = model.encode(x, noise, condition)[0].flatten(1)
    known = condition != 0.5
    plain = F.binary_cross_entropy_with_logits(model.adversary(z)[known], condition[known], reduction="sum")
    torch.testing.assert_close(term, plain)
    encoder, adversary = torch.autograd.grad(plain, list(weights.values()))
    torch.testing.assert_close(found[0], -encoder)
    torch.testing.assert_close(found[1], adversary)


def test_one_attribute_is_changed_and_its_rivals_with_it(classifier_folder):
    model = classifying(classifier_folder)
    condition = some_conditions(500)
    condition[:, 1:3] *= (torch.arange(500) % 3 > 0)[:, None]
    condition[::50, 0] = 0.5
    noise = random(500, seed=7)
    changed = model.with_one_attribute_changed(condition, noise)
    quantiles = torch.distributions.Normal(0.0, 1.0).cdf(noise)
    for before, after, quantile in zip(condition, changed, quantiles, strict=True):
        column = int(quantile * len(NAMES))
        expected = before.clone()
        if before[column] != 0.5:
            expected[column] = 1 - before[column]
            if expected[column] == 1 and NAMES[column] in CONDITION.exclusive[0]:
                rivals = [NAMES.index(name) for name in CONDITION.exclusive[0] if name != NAMES[column]]
                expected[rivals] = 0
        assert torch.equal(after, expected)
    share = (changed != condition)[:, [0, 3]].double().mean(0)
    assert torch.allclose(share, torch.full_like(share, 1 / len(NAMES)), atol=0.06)
    extreme = torch.tensor([-40.0, 40.0], dtype=torch.float64)  # quantiles 0 and 1
    assert (model.with_one_attribute_changed(condition[1:3], extreme) != condition[1:3]).any(1).all()


def test_the_classification_term_is_that_of_the_edited_image(classifier_folder):
    model = classifying(classifier_folder, (3, 12, 12), border=2)
    x, noise, condition = inputs(model)
    found = copy.deepcopy(model)(x, noise, condition).penalties["classification"]
    classifier = load_classifier(classifier_folder).double()
    (z,) = model.encode(x, noise, condition)  # moves the running statistics, which training mode does not read
    changed = model.with_one_attribute_changed(condition, noise[1].flatten())
    both = model.decode([torch.cat([z, z])], torch.cat([condition, changed]))
    logits = classifier(both[len(x) :, :, 2:-2, 2:-2])
    columns = [classifier.names.index(name) for name in NAMES]
    expected = F.binary_cross_entropy_with_logits(logits[:, columns], changed, reduction="none").sum(1)
    torch.testing.assert_close(found, expected)


def test_images_and_edits_are_normalized_as_in_evaluation(classifier_folder):
    """With weights that do not change, running statistics become those of a batch; evaluation must then give the
    reconstructions of training. They did not while edits had a pass of their own: a run whose images had log p(x | z)
    of -3,400 nats with the statistics of the batch had -41,500 with the running ones.
    """
    model = classifying(classifier_folder)
    x, noise, condition = inputs(model)
    noise = [noise[0], torch.full_like(noise[1], 0.5)]  # one attribute is changed in all images
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm2d):
            module.momentum = 1.0
        if name.endswith("modulation"):  # the condition matters, unlike in a new model
            module.weight.data = random(*module.weight.shape, seed=len(name))
    with torch.no_grad():
        trained = model(x, noise, condition).log_px
        model.eval()
        # Biased and unbiased variances differ by 1 / (pixels of the batch - 1).
        torch.testing.assert_close(model(x, noise, condition).log_px, trained, rtol=0.01, atol=0)


def test_the_classifier_stays_frozen_and_outside_the_model(classifier_folder):
    model = classifying(classifier_folder)
    plain = make_model()
    model(*inputs(model)).penalties["classification"].sum().backward()
    assert model.state_dict().keys() - plain.state_dict().keys() == {"classifier_seen"}
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    frozen = model.edit_classifier.classifier
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training
    before = load_classifier(classifier_folder).state_dict()
    assert all(torch.equal(tensor.float(), before[name].float()) for name, tensor in frozen.state_dict().items())


def test_only_training_needs_the_classifier():
    config = AttributeVAEConfig(width=4, latent_size=24, classification_weight=1.0, classifier="not/there")
    model = config.build(SHAPE, 0, 8, CONDITION).double()
    model.eval()(*inputs(model))
    with pytest.raises(ValueError, match="needs a classifier"):
        model.train()(*inputs(model))


def test_a_missing_classifier_ends_training_before_it_starts(tmp_path, make_runtime):
    model = FACES | {"classification_weight": 1.0, "classifier": str(tmp_path / "gone")}
    settings = tiny_settings(write_data(tmp_path)) | {"model": model, "condition": BY_ATTRIBUTES}
    recipe = build(Recipe, overlay(settings, BASELINE))  # needs no files
    with pytest.raises(ValueError, match="gone: there is no classifier.*python -m pipeline.train_classifier"):
        make_trainer(recipe, make_runtime())


def test_a_run_resumes_with_the_same_classifier_only_in_any_folder(tmp_path, classifier_folder):
    first = classifying(classifier_folder)
    first(*inputs(first))
    moved = shutil.copytree(classifier_folder, tmp_path / "elsewhere")
    other = write_classifier(tmp_path / "other", seed=4)
    second = classifying(moved)
    second.load_state_dict(first.state_dict())
    second(*inputs(second))
    third = classifying(other)
    third(*inputs(third))  # fine for a run of its own
    fourth = classifying(other)
    fourth.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="another classifier than the one that the run started with"):
        fourth(*inputs(fourth))


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (NAMES[:3], SHAPE, "was not trained on Smile, Gray; its attributes: Hat"),
        (NAMES, (3, 16, 16), "3x16x16 and 3x8x8"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(tmp_path, names, shape, message):
    folder = write_classifier(tmp_path / "unfit", 5, names, shape)
    with pytest.raises(ValueError, match=message):
        classifying(folder)


def test_under_bf16_the_terms_and_the_classifier_stay_in_float32(classifier_folder):
    model = classifying(classifier_folder, **ALL).float()
    x, noise, condition = inputs(model)
    x, noise, condition = x.float(), [each.float() for each in noise], condition.float()
    plain = model(x, noise, condition).penalties
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, noise, condition)
        mixed = cross_covariance(x[:, 0, 0], x[:, 1, 0])
    assert torch.equal(mixed, cross_covariance(x[:, 0, 0], x[:, 1, 0]))
    for name, penalty in out.penalties.items():
        assert penalty.dtype == torch.float32
        torch.testing.assert_close(penalty, plain[name], rtol=0.1, atol=0.05)
    assert {parameter.dtype for parameter in model.edit_classifier.classifier.parameters()} == {torch.float32}


# ---- two processes ---------------------------------------------------------------------------------------------------


def loss_and_gradients(model: AttributeVAE, share: slice) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss's mean over the images of `share`, the penalties of each, and the gradients."""
    x, noise, condition = inputs(model, 8)
    out = model(x[share], [each[share] for each in noise], condition[share])
    loss = (sum(out.penalties.values()) - out.elbo).mean()
    loss.backward()
    return loss.detach(), out.penalties, {name: parameter.grad for name, parameter in model.named_parameters()}


def worker(rank: int, folder: str, classifier: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    for conditioning in ("join", "batch_norm"):
        model = classifying(classifier, conditioning=conditioning, **ALL)
        loss, penalties, gradients = loss_and_gradients(model, slice(4 * rank, 4 * rank + 4))
        dist.all_reduce(loss)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        averaged = {name: gradient / 2 for name, gradient in gradients.items()}
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        penalties = {name: penalty.detach() for name, penalty in penalties.items()}
        torch.save((loss / 2, penalties, averaged, buffers), f"{folder}/{conditioning}_{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path, classifier_folder):
    """Every penalty of every image, the loss, every gradient, and the running statistics of conditional norms."""
    mp.spawn(worker, (str(tmp_path), str(classifier_folder)), nprocs=2)
    for conditioning in ("join", "batch_norm"):
        model = classifying(classifier_folder, conditioning=conditioning, **ALL)
        loss, penalties, gradients = loss_and_gradients(model, slice(None))
        found = [torch.load(tmp_path / f"{conditioning}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name, penalty in penalties.items():
            both = torch.cat([ranks[1][name] for ranks in found])
            torch.testing.assert_close(both, penalty.detach(), rtol=1e-11, atol=1e-13)
        for ranks in found:
            torch.testing.assert_close(ranks[0], loss, rtol=1e-12, atol=0)
            torch.testing.assert_close(ranks[2], gradients, rtol=1e-8, atol=1e-10)
            buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
            torch.testing.assert_close(ranks[3], buffers, rtol=1e-11, atol=1e-13)
