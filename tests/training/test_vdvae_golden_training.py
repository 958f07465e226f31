"""VDVAE's training rules against numbers of its reference release: seven steps of the trainer, in float64.

Steps 3 and 4 are skipped, one by the norm and one by a NaN; the first has a learning rate of 0; some are clipped.
Values are compared within 1e-9.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.distributed.runtime import Runtime
from pipeline.models.vdvae_conversion import name_from_reference
from pipeline.run.compilation import compile_training
from pipeline.training import trainer as trainer_module
from pipeline.training.ema import EMA
from pipeline.training.gradients import GradientRules
from pipeline.training.objective import Objective, ObjectiveConfig
from pipeline.training.optim import LearningRate, OptimConfig, build_optimizer
from pipeline.training.regularizers import RegularizerConfig, Regularizers
from pipeline.training.state import TrainingState
from pipeline.training.train_config import TrainConfig
from pipeline.training.trainer import Trainer
from tests.helpers import golden
from tests.helpers.golden import close
from tests.helpers.vdvae_cases import VDVAECase, golden_file

FILES = [golden_file("vdvae_small"), golden_file("vdvae_deep")]


@pytest.fixture(scope="module", params=FILES)
def case(request) -> VDVAECase:
    return VDVAECase(request.param)


def optim_config(rules: dict) -> OptimConfig:
    """The settings that mean the release's options."""
    return OptimConfig(
        name="adamw",
        schedule="constant",
        lr=rules["lr"],
        lr_min=0.0,
        warmup_steps=rules["warmup_iters"],
        warmup_from_zero=True,
        beta1=rules["betas"][0],
        beta2=rules["betas"][1],
        eps=rules["eps"],
        weight_decay=rules["weight_decay"],
        gradient_unit="nats_per_dimension",
        clip=rules["grad_clip"],
        skip_threshold=rules["skip_threshold"],
    )


def build_trainer(case: VDVAECase, runtime: Runtime, train: TrainConfig) -> Trainer:
    optim, model = optim_config(case.file["training"]), case.model()
    objective = Objective(ObjectiveConfig(schedule="constant", kl_balancing="none"), model.groups, train.steps)
    if train.compile != "off":
        compile_training(train, model, objective, backend="aot_eager")
    wrapped, optimizer = runtime.prepare(model, build_optimizer(model, optim))
    regularizers = Regularizers(RegularizerConfig(strength=0), model, seed=0)
    ema = EMA(model, train.ema_decay, train.ema_warmup)
    inputs = SimpleNamespace(total_steps=7, model_inputs=lambda batch: (case.x[batch.positions], None))
    return Trainer(
        train,
        runtime=runtime,
        data=inputs,
        state=TrainingState(model, optimizer, regularizers, ema),
        wrapped_model=wrapped,
        objective=objective,
        learning_rate=LearningRate(optim, train.steps, steps_per_epoch=10),
        gradients=GradientRules(optim, model.num_dimensions),
    )


def noise_of(case: VDVAECase, row: dict) -> list[Tensor]:
    noise = [eps * row.get("eps_scale", 1.0) for eps in case.noise(row["eps_key"])]
    if "eps_nan" in row:
        noise[0].view(-1)[0] = torch.nan
    return noise


def check_tensors(found: dict[str, Tensor], row: dict, key: str) -> None:
    """Norm and sum of each tensor, in the release's order, which is ours."""
    values = list(found.values())
    close(torch.stack([value.norm() for value in values]), row[f"{key}_norm"], what=f"step {row['step']}")
    sums = torch.stack([value.sum() for value in values])
    torch.testing.assert_close(sums, row[f"{key}_sum"], rtol=1e-9, atol=1e-9)


WAYS = {"at once": {}, "image by image": {"micro_batch": 1}, "compiled": {"micro_batch": 1, "compile": "whole"}}
SLOW = {"compiled": pytest.mark.slow}


@pytest.mark.parametrize("way", [pytest.param(way, marks=SLOW.get(way, ())) for way in WAYS])
def test_seven_steps(case, make_runtime, monkeypatch, way):
    rules, count = case.file["training"], len(case.x)
    settings = {"ema_decay": rules["ema_rate"], "ema_warmup": False, "precision": "fp64", **WAYS[way]}
    train = TrainConfig(steps=7, batch_size=count, **settings)
    trainer = build_trainer(case, make_runtime("fp64"), train)
    parts = torch.arange(count).split(train.images_per_pass)
    for row in rules["steps"]:
        noise = noise_of(case, row)
        monkeypatch.setattr(
            trainer_module, "draw_noise", lambda *given, noise=noise: [group[given[3]] for group in noise]
        )
        before = copied(trainer.state.tensors())
        skipped = trainer.train_step(row["step"], [SimpleNamespace(positions=positions) for positions in parts])
        assert (skipped is not None) is row["skipped"]
        close(trainer.state.optimizer.param_groups[0]["lr"], row["lr"])
        if skipped is None:
            check_statistics(trainer, row)
        else:
            assert skipped.norm == pytest.approx(row["grad_norm"], rel=1e-9, nan_ok=True)
            after = trainer.state.tensors()
            assert all(torch.equal(after[stem][name], old) for stem in before for name, old in before[stem].items())
        check_tensors(dict(trainer.model.named_parameters()), row, "param")
        check_tensors(trainer.state.ema.state(), row, "ema")
    check_end(trainer, case)


def copied(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {stem: {name: tensor.clone() for name, tensor in group.items()} for stem, group in tensors.items()}


def check_statistics(trainer: Trainer, row: dict) -> None:
    """The release's are in nats per dimension."""
    figures, dimensions = trainer.interval_scalars(), trainer.model.num_dimensions
    close(figures["train/loss"] / dimensions, row["elbo"])
    close(-figures["train/log_px"] / dimensions, row["distortion"])
    close(figures["train/kl"] / dimensions, row["rate"])
    close(figures["train/grad_norm"], row["grad_norm"])


@torch.no_grad()
def check_end(trainer: Trainer, case: VDVAECase) -> None:
    """All tensors after the last step, and what the model then computes."""
    rules, average = case.file["training"], trainer.state.ema.state()
    weights = dict(trainer.model.named_parameters())
    for name, value in rules["params"].items():
        close(weights[name_from_reference(name)], value, what=name, slack=1e-9 * value.abs().max().item())
        expected = rules["ema_params"][name]
        close(average[name_from_reference(name)], expected, what=name, slack=1e-9 * expected.abs().max().item())
    check_bound(trainer, case, rules["final_eval"])
    with trainer.averaged_weights():
        check_bound(trainer, case, rules["final_eval_ema"])


def check_bound(trainer: Trainer, case: VDVAECase, expected: dict) -> None:
    model = trainer.model
    out = model.bound(case.x, model.features(case.x), case.noise("eps"))  # as validation does, which is not compiled
    for found, key in ((-out.log_px, "recon"), (out.kl.T, "kl_all"), (out.log_qz, "log_q"), (-out.elbo, "nelbo")):
        close(found, expected[key], what=key)


@pytest.mark.parametrize("path", [golden_file("vdvae_units")])
def test_learning_rate(path):
    for warmup, factors in golden.load(path)["warmup"].items():
        config = OptimConfig(lr=0.5, lr_min=0.0, schedule="constant", warmup_steps=warmup, warmup_from_zero=True)
        learning_rate = LearningRate(config, total_steps=1000, steps_per_epoch=10)
        close([learning_rate(step) for step in range(len(factors))], [0.5 * factor for factor in factors])
