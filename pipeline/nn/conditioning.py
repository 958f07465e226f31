"""How a condition enters a hierarchical model."""

from torch import nn

from pipeline.nn.layers import Linear


class Conditioning(nn.Module):
    """Linear embeddings of a condition (B, size), added to the decoder's start and to every prior's raw parameters.

    They are initialized to zero: a new conditional model equals the unconditional one.
    """

    def __init__(self, size: int, start_width: int, latent_channels: int, num_groups: int):
        super().__init__()
        self.start = Linear(size, start_width, bias=False)
        self.priors = nn.ModuleList(Linear(size, 2 * latent_channels, bias=False) for _ in range(num_groups))
        for embedding in (self.start, *self.priors):
            nn.init.zeros_(embedding.weight)
