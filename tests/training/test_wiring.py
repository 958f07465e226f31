"""The parts of the trainer are wired as the docs say: compared with the plain loop of helpers/plain_training.py, which
shares none of them. What a session writes beside the weights: scores, and counters that survive a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.config import build, overlay
from pipeline.data.holdout import held_out_indices
from pipeline.data.order import Order
from pipeline.distributed.runtime import Runtime
from pipeline.evaluate import build_parser, build_request, evaluate
from pipeline.recipe import Recipe, build_model
from pipeline.run.resume import choose_checkpoint, restore
from pipeline.run.session import Session
from pipeline.storage.checkpoint import Checkpoints
from pipeline.tracking.tracker import Tracker
from pipeline.training.progress import TrainingDiverged
from pipeline.training.regularizers import Regularizers
from tests.helpers import plain_training
from tests.helpers.model_cases import MLP
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples

SHARD_SIZES = [10, 7, 7, 7, 7, 3]
"""Of the training split of `tiny_set`."""
QUIET = ("validation.every=0", "samples.every=0", "tracking.log_every=1", "checkpoint.every=1", "checkpoint.keep=null")
SPECTRAL = (
    f"regularizers.strength={plain_training.STRENGTH}",
    f"regularizers.initial_strength={plain_training.FIRST_STRENGTH}",
    "regularizers.first_power_iterations=3",  # far from converged: the vectors that are carried on matter
    "regularizers.power_iterations=1",
)
CASES = {"mlp_vae": (MLP, ("regularizers.strength=0",), (1.0,)), "nvae": (None, SPECTRAL, (1.0, 2.0, 2.0))}
"""name: (model section, overrides, alpha of KL balancing per group: 4^scale / groups of the scale, over the least)."""
DRAWS = {
    "mlp_vae": [[0.3612230, -0.8041482], [-0.3761723, 1.0690200], [2.0302157, 0.8342944]],
    "nvae": [[1.0683092, -0.1649007], [0.1980596, -2.1078379], [0.0522874, -2.4036391]],
}
"""The first two of positions 0, 4 and 59 under seed 3, written down once."""


@pytest.fixture(autouse=True, scope="module")
def _leave_no_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_recipe(root: Path, model: dict | None, *overrides: str) -> Recipe:
    settings = tiny_settings(root)
    return build(Recipe, overlay(settings | {"model": dict(model or settings["model"])}, overrides))


def train(
    recipe: Recipe,
    folder: Path,
    prepare: Callable[[Session], None] = lambda session: None,
    stop: int | None = None,
) -> Session:
    """The session after training in `folder`, up to `stop`. `prepare` is called before; a stopped run is resumed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    session = Session(recipe, Runtime(recipe.train.precision, cpu_threads=1), folder)
    checkpoint = choose_checkpoint(session.checkpoints, "auto")
    if checkpoint is not None:
        restore(session, checkpoint)
    prepare(session)
    start = session.trainer.step
    with Tracker(recipe.tracking, folder, session.settings, is_main=True, start_step=start) as tracker:
        session.run(tracker, should_stop=lambda: session.trainer.step == stop)
    return session


def records(folder: Path) -> dict[int, dict[str, float]]:
    """metrics.jsonl by step."""
    return {record["step"]: record for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def training_images(positions: range) -> torch.Tensor:
    """The images of `tiny_set` at these positions of the training stream, as the model takes them."""
    _, indices = Order(SHARD_SIZES, plain_training.SEED, window=32).at(positions)
    return as_input(random_samples(41, 16, 16, 3, seed=1).images[indices])


def as_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2) / 255)


# ------------------------------------------------------------------------------------------------------ the plain loop


class Pair(NamedTuple):
    """The project's training in a folder, and the plain one."""

    case: str
    folder: Path
    noise: list[list[torch.Tensor]]
    """Of each forward pass in the project's training."""
    plain: list[plain_training.Step]

    def checkpoint(self, step: int) -> dict[str, dict[str, torch.Tensor]]:
        """The project's tensors after `step`, counted from 0."""
        return Checkpoints(self.folder / "checkpoints").load(self.folder / f"checkpoints/step_{step + 1:08d}").tensors


@pytest.fixture(scope="module", params=CASES)
def pair(request, tiny_set, tmp_path_factory) -> Pair:
    """Five steps of three micro-batches, in float64. The epoch ends within the fourth step. A validation after the
    second, which the plain loop does not have, changes none.
    """
    model, overrides, alpha = CASES[request.param]
    recipe = make_recipe(tiny_set, model, *plain_training.SETTINGS, *QUIET, "validation.every=2", *overrides)
    folder, drawn = tmp_path_factory.mktemp(request.param), []

    def listen(session: Session) -> None:
        session.trainer.model.register_forward_pre_hook(lambda _, arguments: drawn.append(arguments[1]))

    train(recipe, folder, listen)
    torch.manual_seed(plain_training.SEED)
    fresh = build_model(recipe).double()
    penalties = Regularizers(recipe.regularizers, fresh, plain_training.SEED) if model is None else None
    return Pair(request.param, folder, drawn, plain_training.train(fresh, training_images, alpha, penalties))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{where}, {name}: {text}"
        )


def test_weights_are_those_of_the_plain_loop_after_every_step(pair):
    """Learning rate, loss, accumulation, clipping, weight decay and Adamax, and batch norm's statistics."""
    for step, plain in enumerate(pair.plain):
        assert_close(pair.checkpoint(step)["model"], plain.parameters, f"step {step}")


def test_the_average_is_that_of_the_plain_loop_after_every_step(pair):
    for step, plain in enumerate(pair.plain):
        assert_close(pair.checkpoint(step)["ema"], plain.average, f"step {step}")


def test_what_is_logged_is_what_the_plain_loop_saw(pair):
    """Every figure of every step, and no other but those of time and validation."""
    found = records(pair.folder)
    assert list(found) == [1, 2, 3, 4, 5]
    for step, plain in enumerate(pair.plain):
        figures = {name: value for name, value in found[step + 1].items() if not name.startswith(("perf/", "val/"))}
        assert figures.keys() - {"step", "time", "attempt"} == plain.figures.keys()
        for name, value in plain.figures.items():
            assert figures[name] == pytest.approx(value, rel=1e-10, abs=1e-10), (step, name)


def test_the_noise_is_a_function_of_seed_stream_and_position(pair):
    plain = [noise for step in pair.plain for noise in step.noise]
    assert len(pair.noise) == len(plain) == 15
    for found, expected in zip(pair.noise, plain, strict=True):
        assert all(torch.equal(*groups) for groups in zip(found, expected, strict=True))


def test_the_noise_has_these_values(pair):
    found = [pair.noise[m][0].flatten(1)[row, :2].tolist() for m, row in ((0, 0), (1, 0), (14, 3))]
    assert found == [pytest.approx(values, abs=1e-6) for values in DRAWS[pair.case]]


def test_every_step_exercises_what_is_compared(pair):
    """Each gradient is clipped, each schedule takes each of its branches, and nothing stands still."""
    figures = [plain.figures for plain in pair.plain]
    assert all(step["train/grad_norm"] > 1.5 * plain_training.CLIP for step in figures)
    assert [step["train/lr"] for step in figures] == pytest.approx([0.01, 0.02, 0.02, 0.01525, 0.00575])
    assert [step["train/beta"] for step in figures] == pytest.approx([0.035, 0.7 / 6, 0.35, 0.7 * 5 / 6, 0.7])
    first, last = pair.plain[0], pair.plain[-1]
    moved = [(last.parameters[name] - tensor).abs().max() > 1e-2 for name, tensor in first.parameters.items()]
    assert sum(moved) > 0.9 * len(moved)  # biases before batch norm have no gradient
    assert max((last.average[name] - tensor).abs().max() for name, tensor in last.parameters.items()) > 1e-3


# -------------------------------------------------------------------------------------------------- scores of a session


@pytest.fixture(scope="module")
def validated(tiny_set, tmp_path_factory) -> tuple[Recipe, Path]:
    """A run of an NVAE that was validated at steps 2 and 4, on 13 images held out of training, and saved at 1 to 4."""
    overrides = ("train.steps=4", "validation.every=2", "validation.importance_samples=0", "train.ema_decay=0.8")
    held_out = ("data.holdout=13", "validation.split=val")
    recipe = make_recipe(tiny_set, None, *plain_training.SETTINGS, *QUIET, *overrides, *held_out)
    folder = tmp_path_factory.mktemp("validated")
    train(recipe, folder)
    return recipe, folder


def test_a_score_is_the_negative_elbo_of_the_same_step(validated):
    """A checkpoint without a validation of its own step has none: an earlier step's says nothing about it."""
    _, folder = validated
    checkpoints, logged = Checkpoints(folder / "checkpoints"), records(folder)
    scores = [checkpoints.load(checkpoints.path(step)).score for step in (1, 2, 3, 4)]
    assert scores == [None, -logged[2]["val/elbo"], None, -logged[4]["val/elbo"]]
    assert scores[1] > 0


@pytest.mark.parametrize("step", [2, 4])
def test_a_score_belongs_to_the_averaged_weights(validated, step):
    """The bound computed from the checkpoint's own tensors, with noise of its own: the average's, and not the live
    weights'.
    """
    recipe, folder = validated
    checkpoint = Checkpoints(folder / "checkpoints").load(folder / f"checkpoints/step_{step:08d}")
    held_out = held_out_indices(13, 41, recipe.train.seed)
    images = as_input(random_samples(41, 16, 16, 3, seed=1).images[held_out])
    elbo = {}
    for stem in ("ema", "model"):
        model = build_model(recipe).double().eval()
        model.load_state_dict(checkpoint.tensors[stem])
        noise = plain_training.noise([group.shape for group in model.groups], "validate/0", range(13))
        with torch.no_grad():
            out = model(images, noise)
        elbo[stem] = (out.log_px - out.kl.sum(1)).mean().item()
    assert -checkpoint.score == pytest.approx(elbo["ema"], rel=1e-10)
    assert abs(elbo["ema"] - elbo["model"]) > 1e-3 * abs(elbo["ema"])


def test_evaluating_a_run_gives_the_elbo_of_its_validation(validated, make_runtime, tmp_path):
    _, folder = validated
    out = tmp_path / "out.json"
    overrides = [str(folder), "--out", str(out), "--precision", "fp64", "--batch-size", "5", "--split", "val"]
    evaluate(build_request(build_parser().parse_args(overrides)), make_runtime("fp64"))
    figures = json.loads(out.read_text())["figures"]
    for name in ("elbo", "kl", "log_px", "bpd"):
        assert figures[name] == pytest.approx(records(folder)[4][f"val/{name}"], rel=1e-10), name


def test_the_best_checkpoint_by_validation_stays(tiny_set, tmp_path):
    """Of five, where one is to be kept: the last, and the one of the highest bound."""
    elbos = iter([-30.0, -10.0, -20.0, -11.0, -40.0])
    overrides = ("train.steps=5", "validation.every=1", "checkpoint.keep=1", "regularizers.strength=0")
    held_out = ("data.holdout=5", "validation.split=val")
    recipe = make_recipe(tiny_set, MLP, *plain_training.SETTINGS, *QUIET, *overrides, *held_out)

    def fake(session: Session) -> None:
        session.evaluator.run = lambda model, step: {"val/elbo": next(elbos)}

    checkpoints = train(recipe, tmp_path, fake).checkpoints
    assert checkpoints.steps() == [2, 5]
    assert (checkpoints.best().step, checkpoints.best().score) == (2, 10.0)


# ------------------------------------------------------------------------------------------------------ after a resume


@pytest.mark.parametrize(("factor", "by_norm"), [(torch.nan, 0), (1e9, 2)])
def test_skips_in_a_row_are_counted_over_a_resume(tiny_set, tmp_path, factor, by_norm):
    """Two before the stop and one after it are three in a row; what is counted comes back as it was."""
    overrides = ("train.max_skipped_steps=3", "train.steps=9", "regularizers.strength=0", "optim.skip_threshold=1e8")
    recipe = make_recipe(tiny_set, MLP, *plain_training.SETTINGS, *QUIET, *overrides)

    def spoil(session: Session, first: int) -> None:
        trainer, data, inputs = session.trainer, session.data, session.data.model_inputs
        data.model_inputs = lambda batch: (inputs(batch)[0] * (factor if trainer.step >= first else 1), None)

    stopped = train(recipe, tmp_path, lambda session: spoil(session, first=2), stop=4).trainer
    counted = {"step": 4, "samples_seen": 48, "skipped_steps": 2, "skipped_in_a_row": 2, "skipped_samples": 0}
    counted |= {"skipped_by_norm": by_norm}
    assert stopped.counters() == counted
    seen = []

    def spoil_again(session: Session) -> None:
        seen.append(session.trainer)
        assert session.trainer.counters() == counted
        spoil(session, first=0)

    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        train(recipe, tmp_path, spoil_again)
    assert seen[0].step == 5
