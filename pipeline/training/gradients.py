"""What happens to gradients between the backward pass and the optimizer: their unit, clipping, and the skip threshold.

Source of the skip threshold: Child, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on
Images", 2020. Its thresholds are for gradients of a loss in nats per dimension.
"""

import torch
from torch import Tensor, nn

from pipeline.training.optim import OptimConfig
from pipeline.training.progress import SkipReason


class GradientRules:
    """The settings `gradient_unit`, `clip` and `skip_threshold` of section `optim`, for images of `num_dimensions`."""

    def __init__(self, config: OptimConfig, num_dimensions: int):
        self.divisor = num_dimensions if config.gradient_unit == "nats_per_dimension" else 1
        self.largest_norm = config.clip
        self.skip_threshold = config.skip_threshold

    def in_unit(self, loss: Tensor) -> Tensor:
        """The loss whose gradients are taken, from one in nats per image."""
        return loss if self.divisor == 1 else loss / self.divisor

    def clip(self, model: nn.Module) -> Tensor:
        """Clips the gradients of `model`. Returns their global norm before that, a scalar on the device."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.largest_norm:
            nn.utils.clip_grads_with_norm_(model.parameters(), self.largest_norm, norm, foreach=True)
        return norm

    def allow(self, norm: Tensor) -> Tensor:
        """Whether gradients of this norm may update the weights, a flag on the device. A NaN is not below any number.

        The gradients are already averaged over the processes, so every rank has the same norm.
        """
        return norm < self.skip_threshold if self.skip_threshold else torch.isfinite(norm)

    def skip_reason(self, norm: Tensor) -> SkipReason:
        """Why a step with gradients of this norm was skipped. Reads the device."""
        value = norm.item()
        exceeded = self.skip_threshold and self.skip_threshold <= value < float("inf")
        return SkipReason(value, self.skip_threshold) if exceeded else SkipReason()
