"""Training written out plainly: what the parts of the trainer amount to together, without any of them.

Only the model's own output, the order of the data and the singular values of the regularizers are taken as given; they
have tests of their own. Everything else is here a second time, from docs and papers: noise, schedules, loss, gradient
accumulation, clipping, Adamax, moving average.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.base import VAE
from pipeline.training.regularizers import Regularizers

SEED, STEPS, BATCH, MICRO_BATCH = 3, 5, 12, 4
LR, LR_MIN, LR_WARMUP = 0.02, 0.001, 2
BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP = 0.8, 0.95, 1e-2, 0.05, 1.5
KL_BETA, KL_PORTION, KL_DELAY, KL_FLOOR = 0.7, 0.6, 0.1, 0.05
STRENGTH, FIRST_STRENGTH = 0.02, 0.5
EMA_DECAY = 0.2

SETTINGS = (
    *(f"train.seed={SEED}", f"train.steps={STEPS}", f"train.batch_size={BATCH}", f"train.micro_batch={MICRO_BATCH}"),
    *(f"train.ema_decay={EMA_DECAY}", "train.precision=fp64", "data.flip=false"),
    *(f"optim.lr={LR}", f"optim.lr_min={LR_MIN}", f"optim.warmup_steps={LR_WARMUP}", f"optim.clip={CLIP}"),
    *(f"optim.beta1={BETA1}", f"optim.beta2={BETA2}", f"optim.eps={EPS}", f"optim.weight_decay={WEIGHT_DECAY}"),
    *(f"objective.beta={KL_BETA}", f"objective.kl_warmup_portion={KL_PORTION}"),
    *(f"objective.kl_warmup_delay={KL_DELAY}", f"objective.kl_warmup_floor={KL_FLOOR}"),
)
"""The same for the project."""


@dataclass
class Step:
    """What one step used, and what was there after it."""

    noise: list[list[Tensor]]
    """By micro-batch and group."""
    parameters: dict[str, Tensor]
    average: dict[str, Tensor]
    figures: dict[str, float]
    """By their names in metrics.jsonl."""


def noise(shapes: Sequence[Sequence[int]], stream: str, positions: Sequence[int]) -> list[Tensor]:
    """Float32 draws of a generator for each sample, groups one behind the other, then made double."""
    rows = []
    for position in positions:
        digest = hashlib.blake2b(f"{SEED}/{stream}/{position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        rows.append(torch.randn(sum(math.prod(shape) for shape in shapes), generator=generator))
    parts = torch.stack(rows).double().split([math.prod(shape) for shape in shapes], dim=1)
    return [part.reshape(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True)]


def learning_rate(step: int) -> float:
    """Linear warm-up that ends at the peak, then half a cosine."""
    if step < LR_WARMUP:
        return LR * (step + 1) / LR_WARMUP
    return LR_MIN + (LR - LR_MIN) * 0.5 * (1 + math.cos(math.pi * (step - LR_WARMUP) / (STEPS - LR_WARMUP)))


def kl_warmup(step: int) -> float:
    return min(1.0, max(KL_FLOOR, (step / STEPS - KL_DELAY) / KL_PORTION))


def loss_of(kl: Tensor, log_px: Tensor, step: int, alpha: Tensor) -> Tensor:
    """Nats per image, with KL balancing until the warm-up has ended."""
    weights = torch.ones_like(alpha)
    if kl_warmup(step) < 1:
        weights = (kl.detach().abs().mean(0) + 0.01) / alpha
        weights = weights / weights.mean()
    return (KL_BETA * kl_warmup(step) * (weights * kl).sum(1) - log_px).mean()


def penalty_of(regularizers: Regularizers, step: int) -> tuple[Tensor, dict[str, float]]:
    spectral, batch_norm = regularizers.spectral(), regularizers.batch_norm()
    warmup = kl_warmup(step)
    strength = FIRST_STRENGTH ** (1 - warmup) * STRENGTH**warmup
    return strength * (spectral + batch_norm), {"spectral": spectral.item(), "batch_norm": batch_norm.item()}


def train(
    model: VAE, images: Callable[[range], Tensor], alpha: Sequence[float], regularizers: Regularizers | None
) -> list[Step]:
    """All steps of `model`. `images` gives those at positions of the training stream; `alpha` is of KL balancing."""
    parameters = list(model.parameters())
    means = [torch.zeros_like(parameter) for parameter in parameters]
    maxima = [torch.zeros_like(parameter) for parameter in parameters]
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = []
    for step in range(STEPS):
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        noises, outs, loss = [], [], 0.0
        for start in range(step * BATCH, (step + 1) * BATCH, MICRO_BATCH):
            positions = range(start, start + MICRO_BATCH)
            noises.append(noise([group.shape for group in model.groups], "train", positions))
            out = model(images(positions), noises[-1])
            outs.append(out)
            part = loss_of(out.kl, out.log_px, step, torch.tensor(alpha).double()) * MICRO_BATCH / BATCH
            _add(gradients, torch.autograd.grad(part, parameters))
            loss += part.item()
        figures = {}
        if regularizers is not None:
            penalty, figures = penalty_of(regularizers, step)
            _add(gradients, torch.autograd.grad(penalty, parameters, allow_unused=True))
            loss += penalty.item()
            regularizers.commit()
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        shorter = min(1.0, CLIP / (norm + 1e-6))
        with torch.no_grad():
            for parameter, gradient, mean, maximum in zip(parameters, gradients, means, maxima, strict=True):
                gradient = gradient * shorter + WEIGHT_DECAY * parameter
                mean.copy_(BETA1 * mean + (1 - BETA1) * gradient)
                maximum.copy_(torch.maximum(BETA2 * maximum, gradient.abs() + EPS))
                parameter -= learning_rate(step) / (1 - BETA1 ** (step + 1)) * mean / maximum
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, tensor in live.items():
            floating = tensor.is_floating_point()
            average[name] = decay * average[name] + (1 - decay) * tensor if floating else tensor
        figures |= {"loss": loss, "grad_norm": norm, "lr": learning_rate(step), "beta": KL_BETA * kl_warmup(step)}
        steps.append(Step(noises, live, dict(average), _named(figures, outs, model, step)))
    return steps


def _add(gradients: list[Tensor], more: Sequence[Tensor | None]) -> None:
    for gradient, summand in zip(gradients, more, strict=True):
        if summand is not None:
            gradient += summand


def _named(figures: dict[str, float], outs: Sequence, model: VAE, step: int) -> dict[str, float]:
    kl, log_px = torch.cat([out.kl for out in outs]), torch.cat([out.log_px for out in outs])
    elbo = (log_px - kl.sum(1)).mean().item()
    figures |= {"elbo": elbo, "log_px": log_px.mean().item(), "kl": kl.sum(1).mean().item()}
    figures |= {"bpd": -elbo / math.log(2) / 16 / 16 / 3, "skipped_steps": 0, "skipped_samples": 0}
    named = {f"train/{name}": value for name, value in figures.items()} | {"samples_seen": BATCH * (step + 1)}
    for k, group in enumerate(model.groups):
        units = sum(out.kl_units[k] for out in outs) / len(outs)
        named[f"kl/{group.name}"] = kl[:, k].mean().item()
        named[f"active_units/{group.name}"] = (units > 0.1).sum().item()
    return named
