"""Batch norm whose scale and shift depend on a condition (de Vries et al. 2017, arXiv:1707.00683)."""

from torch import Tensor, nn

from pipeline.nn.batch_norm import BatchNorm2d


class ConditionalBatchNorm2d(BatchNorm2d):
    """(1 + s(c)) BN(x) + t(c) per channel, with s and t linear in the condition c. `size` 0: plain batch norm.

    The statistics are over all images of all processes, whatever their condition. s and t are initialized to zero: a
    new layer equals plain batch norm.
    """

    def __init__(self, channels: int, size: int):
        super().__init__(channels)
        self.modulation = nn.Linear(size, 2 * channels, bias=False) if size else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, channels, H, W) from x of that shape and a condition (B, size)."""
        y = super().forward(x)
        if self.modulation is None:
            return y
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)  # (B, channels, 1, 1) each
        return y * (1 + scale) + shift
