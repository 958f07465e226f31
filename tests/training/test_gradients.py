"""VDVAE's training rules, which all models can use: gradients in nats per dimension, a skip threshold, AdamW, a warm-up
from zero and a moving average of constant decay. Compared with a plain loop around torch's own AdamW.
"""

import math
import re
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.noise import draw_noise
from pipeline.training.gradients import GradientRules
from pipeline.training.optim import OptimConfig
from pipeline.training.progress import Progress, SkipReason, TrainingDiverged
from pipeline.training.trainer import Trainer
from tests.helpers.compiling import no_compiler_needed
from tests.helpers.model_cases import make_recipe, make_trainer, write_data

DIMENSIONS = 3 * 16 * 16
BATCH = 8
LR, WARMUP, BETAS, EPS, WEIGHT_DECAY, EMA_DECAY = 0.02, 3, (0.8, 0.9), 1e-3, 0.1, 0.7
STEPS, CLIP, THRESHOLD = 7, 0.03, 1.0
RULES = (
    *("optim.name=adamw", "optim.schedule=constant", f"optim.lr={LR}", "optim.lr_min=0"),
    *(f"optim.warmup_steps={WARMUP}", "optim.warmup_from_zero=true", f"optim.weight_decay={WEIGHT_DECAY}"),
    *(f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}", f"optim.eps={EPS}"),
    *("optim.gradient_unit=nats_per_dimension", f"optim.clip={CLIP}", f"optim.skip_threshold={THRESHOLD}"),
    *(
        f"train.ema_decay={EMA_DECAY}",
        "train.ema_warmup=false",
        "train.precision=fp64",
        "data.flip=false",
        f"train.steps={STEPS}",
    ),
)
FACTORS = {2: 1000.0, 3: math.nan}
"""step: factor of its images. The first makes a large gradient."""


class Step(NamedTuple):
    taken: bool
    lr: float
    norm: float
    tensors: dict[str, Tensor]
    """Weights after the step, and their average."""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def build(labelled, make_runtime, *overrides: str) -> Trainer:
    trainer = make_trainer(make_recipe("mlp_vae", labelled, *RULES, *overrides), make_runtime("fp64"))
    inputs = trainer.data.model_inputs
    trainer.data.model_inputs = lambda batch: (inputs(batch)[0] * factor_at(int(batch.positions[0])), None)
    return trainer


def factor_at(position: int) -> float:
    return FACTORS.get(position // BATCH, 1.0)


def train(trainer: Trainer) -> list[Step]:
    """By the trainer."""
    stream, steps = iter(trainer.data.batches(0)), []
    for step in range(STEPS):
        skipped = trainer.train_step(step, list(islice(stream, trainer.config.micro_batches)))
        norm = skipped.norm if skipped else trainer.interval_scalars()["train/grad_norm"]
        trainer.progress.count_step(skipped, 3)
        state = trainer.state
        tensors = named(dict(state.model.state_dict()), state.ema.state())
        steps.append(Step(skipped is None, state.optimizer.param_groups[0]["lr"], norm, tensors))
    return steps


def train_plainly(model: nn.Module, images: Tensor) -> list[Step]:
    """The same by hand, on whole batches of `images`."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY, foreach=False, fused=False)
    average, steps = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    for step in range(STEPS):
        positions = range(step * BATCH, (step + 1) * BATCH)
        noise = draw_noise(model.noise_groups, 1, "train", list(positions), torch.device("cpu"), torch.float64)
        out = model(images[positions] * factor_at(positions[0]), noise)
        optimizer.zero_grad()
        ((out.kl.sum(1) - out.log_px) / DIMENSIONS).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        optimizer.param_groups[0]["lr"] = LR * min(step / WARMUP, 1.0)
        if taken := norm < THRESHOLD:
            optimizer.step()
            average = {
                name: EMA_DECAY * average[name] + (1 - EMA_DECAY) * tensor
                for name, tensor in model.state_dict().items()
            }
        steps.append(Step(taken, optimizer.param_groups[0]["lr"], norm, named(model.state_dict(), average)))
    return steps


def named(weights: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {"model": weights, "ema": average}
    return {f"{part}/{name}": tensor.clone() for part, group in parts.items() for name, tensor in group.items()}


@pytest.mark.parametrize("overrides", [(), ("train.micro_batch=2",), ("train.compile=whole", "train.micro_batch=4")])
def test_steps_are_those_of_a_plain_loop(labelled, make_runtime, overrides):
    """Two of seven are skipped, by norm and by NaN; some of the others are clipped; the first has no learning rate."""
    start = build(labelled, make_runtime)
    images = torch.cat([batch.images for batch in start.data.batches(0)]).double() / 255
    expected = train_plainly(start.model, images)
    with no_compiler_needed("aot_eager"):
        found = train(build(labelled, make_runtime, *overrides))
    assert [step.taken for step in expected] == [True, True, False, False, True, True, True]
    assert {step.norm > CLIP for step in expected if step.taken} == {True, False}
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.taken, ours.lr) == (theirs.taken, theirs.lr), number
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-12, nan_ok=True), number
        torch.testing.assert_close(ours.tensors, theirs.tensors, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("norm", "allowed"), [(0.0, True), (399.9, True), (400.0, False), (math.inf, False), (math.nan, False)]
)
def test_only_a_norm_below_the_threshold_may_update(norm, allowed):
    rules = GradientRules(OptimConfig(skip_threshold=400), DIMENSIONS)
    assert bool(rules.allow(torch.tensor(norm))) is allowed
    without = GradientRules(OptimConfig(), DIMENSIONS)
    assert bool(without.allow(torch.tensor(norm))) is math.isfinite(norm)


def test_endless_skipping_ends_with_a_setting_that_helps(labelled, make_runtime, caplog):
    """A threshold below every norm, as in openai/vdvae 25. What the message proposes lets the run go on."""
    own = ("optim.skip_threshold=1e-4", "optim.clip=0", "train.max_skipped_steps=4", "train.steps=9")
    trainer = make_trainer(make_recipe("mlp_vae", labelled, *RULES, *own), make_runtime("fp64"))
    with pytest.raises(TrainingDiverged, match="^4 steps in a row were skipped; the last: gradient norm") as error:
        trainer.fit()
    assert trainer.counters() == {"step": 4, "samples_seen": 32, "skipped_samples": 0} | dict.fromkeys(
        ("skipped_steps", "skipped_in_a_row", "skipped_by_norm"), 4
    )
    assert "step 3: gradient norm" in caplog.text
    assert "not below optim.skip_threshold=0.0001; skipped on every rank (4 in a row, 4 so far)" in caplog.text
    message = str(error.value)
    assert "\n" not in message
    assert "train.max_skipped_steps" in message
    (proposed,) = re.findall(r"for instance (optim.skip_threshold=\S+),", message)
    helped = make_trainer(make_recipe("mlp_vae", labelled, *RULES, *own, proposed), make_runtime("fp64"))
    helped.resume(trainer.progress, trainer.state.tensors())
    assert helped.fit()
    scalars = helped.interval_scalars()
    assert (scalars["train/skipped_steps"], scalars["train/skipped_by_norm"]) == (4, 4)


def test_skips_by_norm_and_by_nan_are_counted_apart_and_together():
    progress = Progress()
    for reason in (SkipReason(500.0, 400.0), SkipReason(), SkipReason(410.0, 400.0), None, SkipReason()):
        progress.count_step(reason, 4)
    assert progress == Progress(step=5, skipped_steps=4, skipped_in_a_row=1, skipped_by_norm=2)
    with pytest.raises(TrainingDiverged, match="4 steps in a row were skipped; the last: non-finite loss or gradient"):
        [
            progress.count_step(reason, 4)
            for reason in (SkipReason(500.0, 400.0), SkipReason(500.0, 400.0), SkipReason())
        ]
