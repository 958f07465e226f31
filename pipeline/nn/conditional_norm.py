"""Batch norm whose scale and shift depend on what the network is told (de Vries et al. 2017, arXiv:1707.00683)."""

from torch import Tensor, nn

from pipeline.nn.batch_norm import BatchNorm2d


class ConditionalBatchNorm2d(BatchNorm2d):
    """(1 + s(c)) BN(x) + t(c) per channel, where s and t are linear in c; plain batch norm with a `size` of 0.

    Statistics span all processes and all conditions together. s and t are nothing at first, so that a fresh layer is
    plain batch norm.
    """

    def __init__(self, channels: int, size: int):
        super().__init__(channels)
        self.modulation = nn.Linear(size, 2 * channels, bias=False) if size else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """(B, channels, H, W) from x of that shape and `told` (B, size)."""
        y = super().forward(x)
        if self.modulation is None:
            return y
        scale, shift = self.modulation(told)[:, :, None, None].chunk(2, dim=1)  # (B, channels, 1, 1) each
        return y * (1 + scale) + shift
