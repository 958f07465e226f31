"""The NVAE paper's settings (Vahdat & Kautz 2020, table 6), as options of the reference release, and what they make."""

from typing import NamedTuple

COMMON = {
    "arch_instance": "res_mbconv",
    "num_latent_per_group": 20,
    "num_cell_per_cond_enc": 2,
    "num_cell_per_cond_dec": 2,
    "num_mixture_dec": 10,
    "use_se": True,
    "res_dist": True,
    "weight_decay": 3e-4,
    "learning_rate": 1e-2,
    "learning_rate_min": 1e-4,
    "warmup_epochs": 5,
    "kl_anneal_portion": 0.3,
    "kl_const_portion": 1e-4,
    "kl_const_coeff": 1e-4,
    "weight_decay_norm_anneal": False,
    "weight_decay_norm_init": 1.0,
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_preprocess_blocks": 1,
    "num_postprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_cells": 2,
    "num_x_bits": 8,
}
FACES = {
    "num_channels_enc": 30, "num_channels_dec": 30, "num_latent_scales": 5, "num_groups_per_scale": 16,
    "ada_groups": True, "min_groups_per_scale": 4, "num_nf": 2, "num_x_bits": 5, "weight_decay_norm_anneal": True,
}  # fmt: skip


class Row(NamedTuple):
    """One model of the table."""

    options: dict
    epochs: int
    images_per_gpu: int
    nodes: int
    gpus_per_node: int
    millions: float
    """Parameters."""
    tensors: int
    groups: tuple[int, ...]
    """By scale, lowest resolution first."""
    convs: int
    batch_norms: int
    start: tuple[int, int, int]
    """Shape of the learned tensor that the decoder starts from."""

    @property
    def batch_size(self) -> int:
        return self.images_per_gpu * self.nodes * self.gpus_per_node


PAPER = {
    "nvae_mnist": Row(
        COMMON | {
            "dataset": "mnist", "num_channels_enc": 32, "num_channels_dec": 32, "num_latent_scales": 2,
            "num_groups_per_scale": 10, "ada_groups": True, "num_preprocess_blocks": 2, "num_postprocess_blocks": 2,
            "num_preprocess_cells": 3, "num_postprocess_cells": 3, "num_nf": 0, "weight_decay_norm": 1e-2,
        },
        400, 200, 1, 2, 33.363, 1269, (5, 10), 255, 214, (256, 4, 4),
    ),
    "nvae_cifar10": Row(
        COMMON | {
            "dataset": "cifar10", "num_channels_enc": 128, "num_channels_dec": 128, "num_latent_scales": 1,
            "num_groups_per_scale": 30, "num_nf": 1, "weight_decay_norm": 1e-2,
        },
        400, 32, 1, 8, 130.852, 2566, (30,), 610, 364, (256, 16, 16),
    ),
    "nvae_celeba64": Row(
        COMMON | {
            "dataset": "celeba_64", "num_channels_enc": 64, "num_channels_dec": 64, "num_latent_scales": 3,
            "num_groups_per_scale": 20, "ada_groups": True, "num_nf": 1, "weight_decay_norm": 1e-1,
        },
        90, 16, 1, 8, 153.281, 3072, (5, 10, 20), 730, 436, (512, 8, 8),
    ),
    "nvae_imagenet32": Row(
        COMMON | {
            "dataset": "imagenet_32", "num_channels_enc": 192, "num_channels_dec": 192, "num_latent_scales": 1,
            "num_groups_per_scale": 28, "num_nf": 1, "weight_decay_norm": 1e-2, "weight_decay_norm_anneal": True,
            "warmup_epochs": 1,
        },
        45, 24, 3, 8, 268.509, 2398, (28,), 570, 340, (384, 16, 16),
    ),
    "nvae_celebahq256": Row(
        COMMON | FACES | {"dataset": "celeba_256", "weight_decay_norm": 1e-2},
        300, 4, 3, 8, 330.799, 3746, (4, 4, 4, 8, 16), 986, 460, (960, 8, 8),
    ),
    "nvae_ffhq256": Row(
        COMMON | FACES | {"dataset": "ffhq", "weight_decay_norm": 1e-1, "learning_rate": 8e-3},
        200, 4, 3, 8, 330.799, 3746, (4, 4, 4, 8, 16), 986, 460, (960, 8, 8),
    ),
}  # fmt: skip
