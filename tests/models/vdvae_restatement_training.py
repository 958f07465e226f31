"""The training rules of VDVAE restated in plain functions, independently of `pipeline`.

Part of the restatement of VDVAE (vdvae_restatement.py). The gradients come from autograd on that restatement.
"""

import math

import torch
from torch import Tensor

from tests.models.vdvae_restatement import forward


class Training:
    """Weights, their moving average and the moments of AdamW. `rules`: lr, warmup_iters, betas, eps, weight_decay,
    ema_rate, grad_clip, skip_threshold.
    """

    def __init__(self, args: dict, weights: dict[str, Tensor], rules: dict):
        self.args, self.rules, self.iteration, self.updates = args, rules, 0, 0
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.average = {name: value.clone() for name, value in weights.items()}
        self.first = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in weights.items()}

    def step(self, pixels: Tensor, eps: list[Tensor]) -> dict:
        """One iteration. A skipped one changes neither weights, moments nor the average; the schedule moves on."""
        rate = self.rules["lr"] * min(self.iteration / self.rules["warmup_iters"], 1.0)
        self.iteration += 1
        weights = {name: value.detach().requires_grad_() for name, value in self.weights.items()}
        out = forward((self.args, weights), pixels, eps)
        gradients = torch.autograd.grad(out["elbo"], list(weights.values()))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        terms = {name: float(out[name].detach().mean()) for name in ("elbo", "distortion", "rate")}
        skipped = any(map(math.isnan, terms.values())) or not norm < self.rules["skip_threshold"]
        if not skipped:
            shrink = min(1.0, self.rules["grad_clip"] / (norm + 1e-6))
            self.update({name: shrink * g for name, g in zip(weights, gradients, strict=True)}, rate)
        return terms | {"lr": rate, "grad_norm": norm, "skipped": skipped}

    @torch.no_grad()
    def update(self, gradients: dict[str, Tensor], rate: float) -> None:
        beta1, beta2 = self.rules["betas"]
        self.updates += 1
        for name, g in gradients.items():
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * g**2
            mean = self.first[name] / (1 - beta1**self.updates)
            square = self.second[name] / (1 - beta2**self.updates)
            w = self.weights[name] * (1 - rate * self.rules["weight_decay"])
            self.weights[name] = w - rate * mean / (square.sqrt() + self.rules["eps"])
            decay = self.rules["ema_rate"]
            self.average[name] = decay * self.average[name] + (1 - decay) * self.weights[name]
