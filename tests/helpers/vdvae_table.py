"""The recipes of VDVAE's release (Child 2020): how it trains them, and on how many GPUs. Architectures are in
vdvae_units.pt.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One recipe of the release."""

    units: str
    """Its name in vdvae_units.pt."""
    steps: int
    images_per_gpu: int
    nodes: int
    gpus_per_node: int

    @property
    def batch_size(self) -> int:
        return self.images_per_gpu * self.nodes * self.gpus_per_node


VDVAE = {
    "vdvae_cifar10": Row("cifar10", 1_050_000, 16, 1, 2),
    "vdvae_imagenet32": Row("imagenet32", 1_700_000, 8, 4, 8),
    "vdvae_imagenet64": Row("imagenet64", 1_600_000, 4, 4, 8),
    "vdvae_ffhq256": Row("ffhq256", 1_700_000, 1, 4, 8),
}
"""The release does not say how its 32 GPUs are spread over nodes."""
