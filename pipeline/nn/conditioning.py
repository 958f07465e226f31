"""How a condition enters a hierarchical model."""

from collections.abc import Sequence

from torch import nn

from pipeline.nn.layers import Linear


class Conditioning(nn.Module):
    """Linear embeddings of a condition (B, size), added to the decoder's start and to every prior's raw parameters.

    They are initialized to zero: a new conditional model equals the unconditional one. `latent_channels`: of each
    group.
    """

    def __init__(self, size: int, start_width: int, latent_channels: Sequence[int]):
        super().__init__()
        self.start = Linear(size, start_width, bias=False)
        self.priors = nn.ModuleList(Linear(size, 2 * channels, bias=False) for channels in latent_channels)
        for embedding in (self.start, *self.priors):
            nn.init.zeros_(embedding.weight)
