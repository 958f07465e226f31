"""Optimizers, and the learning rate as a function of the optimizer step."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from pipeline.schema import Section


class OptimConfig(Section):
    """The optimizer and its learning rate. Defaults are those of the NVAE paper."""

    name: Literal["adamax", "adamw", "adam"] = "adamax"
    """`adamax` and `adam` add weight decay to the gradient; `adamw` decouples it."""
    lr: float = Field(1e-2, gt=0)
    """Peak learning rate."""
    lr_min: float = Field(1e-4, ge=0)
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "cosine_per_epoch", "constant", "step"] = "cosine"
    """`cosine` decays at every step, `cosine_per_epoch` as in the NVAE reference release, `step` by `decay_factor` each
    `decay_epochs`. All start with the warm-up."""
    decay_epochs: float = Field(30.0, gt=0)
    """Epochs between two decays of the schedule `step`."""
    decay_factor: float = Field(0.5, gt=0, le=1)
    """Factor by which the schedule `step` multiplies the learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up. Give this or `warmup_epochs`."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs of linear warm-up. Give this or `warmup_steps`."""
    warmup_from_zero: bool = False
    """Whether the learning rate of the warm-up's first step is 0, as in VDVAE and always in `cosine_per_epoch`; else it
    is a `warmup_steps`-th of `lr`."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the mean square (adam, adamw) or maximum (adamax) of gradients."""
    eps: float = Field(1e-3, gt=0)
    """Added to the denominator. 1e-3 belongs to NVAE's Adamax; Adam and AdamW are commonly used with 1e-8."""
    weight_decay: float = Field(3e-4, ge=0)
    """L2 coefficient, on every parameter."""
    gradient_unit: Literal["nats_per_image", "nats_per_dimension"] = "nats_per_image"
    """Unit of the loss whose gradients the optimizer takes. `clip`, `skip_threshold`, `eps`, `train/grad_norm` and the
    weight decay of `adamax` and `adam` depend on it. VDVAE states them for `nats_per_dimension`: gradients divided by
    the number of image dimensions."""
    clip: float = Field(0.0, ge=0)
    """Largest global norm of the gradient, in `gradient_unit`; larger gradients are scaled down to it. 0: off."""
    skip_threshold: float = Field(0.0, ge=0)
    """Global norm of the gradient before clipping, in `gradient_unit`, from which on a step is skipped on every rank
    and changes nothing. `train.max_skipped_steps` in a row end the run. 0: off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("optim.warmup_steps and optim.warmup_epochs are both set; keep one of them")
        if self.schedule.startswith("cosine") and self.lr_min > self.lr:
            raise ValueError(f"optim.lr_min={self.lr_min} is above optim.lr={self.lr}; lower it")
        return self


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over all parameters, one group in registration order. The caller sets its `lr` at each step."""
    classes = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    # One pass over the state (fused; Adamax has none), or a few kernels for thousands of small tensors (foreach).
    how = {"foreach": True} if config.name == "adamax" else {"fused": True}
    return classes[config.name](
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **how,
    )


class LearningRate:
    """(step) -> learning rate, for optimizer steps counted from 0. `steps_per_epoch` may be fractional."""

    def __init__(self, config: OptimConfig, total_steps: int, steps_per_epoch: float):
        self.config = config
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.warmup_steps = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
        self.warmup_epochs = config.warmup_epochs or config.warmup_steps / steps_per_epoch

    def __call__(self, step: int) -> float:
        rules = {
            "cosine": self._cosine,
            "cosine_per_epoch": self._cosine_per_epoch,
            "constant": self._constant,
            "step": self._step,
        }
        return rules[self.config.schedule](step)

    def _constant(self, step: int) -> float:
        return self.config.lr * self._warmup(step)

    def _step(self, step: int) -> float:
        decays = math.floor(step / (self.config.decay_epochs * self.steps_per_epoch))
        return self._constant(step) * self.config.decay_factor**decays

    def _cosine(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.config.lr * self._warmup(step)
        return self._decay(self.config.lr, (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1))

    def _warmup(self, step: int) -> float:
        """Linear warm-up. By default it ends with step `warmup_steps - 1`, and its first step is not wasted on a rate
        of zero.
        """
        done = step if self.config.warmup_from_zero else step + 1
        return min(done / self.warmup_steps, 1.0) if self.warmup_steps else 1.0

    def _cosine_per_epoch(self, step: int) -> float:
        """As in the reference release: zero at step 0, an epoch at the peak after the warm-up, then a cosine by epochs.

        The cosine starts at the last warm-up value instead of `lr`; the last epoch is trained at `lr_min`.
        """
        if step < self.warmup_steps:
            return self.config.lr * step / self.warmup_steps
        peak = self.config.lr * (1 - 1 / self.warmup_steps) if self.warmup_steps else self.config.lr
        held = math.floor(self.warmup_epochs)  # index of the epoch at the peak
        epoch, last = math.floor(step / self.steps_per_epoch), round(self.total_steps / self.steps_per_epoch) - 1
        return self._decay(peak, (epoch - held) / max(last - held, 1)) if epoch > held else peak

    def _decay(self, peak: float, progress: float) -> float:
        """Half a cosine from `peak` at progress 0 to `lr_min` at progress 1 and after."""
        lr_min = self.config.lr_min
        return lr_min + (peak - lr_min) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
