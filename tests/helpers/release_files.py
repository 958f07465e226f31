"""Checkpoints as NVAE's reference release writes them, made from options alone: no file of the release is needed."""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from tests.models.nvae_restatement_layout import random_state

TINY = {
    "dataset": "mnist",
    "arch_instance": "res_mbconv",
    "num_latent_scales": 2,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "ada_groups": True,
    "min_groups_per_scale": 1,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_nf": 1,
    "num_mixture_dec": 3,
    "num_x_bits": 8,
    "use_se": True,
    "res_dist": True,
    "batch_size": 10,
    "num_process_per_node": 8,
    "num_proc_node": 1,
    "epochs": 12,
    "warmup_epochs": 3,
    "learning_rate": 8e-3,
    "learning_rate_min": 1e-4,
    "weight_decay": 3e-4,
    "weight_decay_norm": 1e-1,
    "weight_decay_norm_init": 1.0,
    "weight_decay_norm_anneal": True,
    "kl_anneal_portion": 0.3,
    "kl_const_portion": 1e-4,
    "kl_const_coeff": 1e-4,
    "seed": 5,
    "root": "/tmp/expr",
    "distributed": True,
}
"""Options of a tiny model for MNIST."""
CELLS = {
    "normal_enc": ["res_bnswish", "res_bnswish"],
    "down_enc": ["res_bnswish", "res_bnswish"],
    "normal_dec": ["mconv_e6k5g0"],
    "up_dec": ["mconv_e6k5g0"],
    "normal_pre": ["res_bnswish", "res_bnswish"],
    "down_pre": ["res_bnswish", "res_bnswish"],
    "normal_post": ["mconv_e3k5g0"],
    "up_post": ["mconv_e3k5g0"],
    "ar_nn": [""],
}


def release_state(options: dict, seed: int = 0) -> "OrderedDict[str, Tensor]":
    """Random float32 weights under the release's names, where some weights are there twice."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in random_state(options, seed).items():
        once = name.removesuffix("_normalized")
        state[name] = state[once] if once in state else tensor.float() if tensor.is_floating_point() else tensor
    return state


def release_content(**changes: object) -> dict:
    """What the release saves. `changes`: of its options."""
    options = TINY | changes
    return {
        "epoch": 4,
        "state_dict": release_state(options),
        "optimizer": {"state": {}, "param_groups": []},
        "global_step": 153,
        "args": argparse.Namespace(**options),
        "arch_instance": CELLS,
        "scheduler": {"T_max": 8, "base_lrs": [8e-3]},
        "grad_scalar": {"scale": 1024.0},
    }


def write_release_file(path: Path, content: dict | None = None) -> Path:
    torch.save(release_content() if content is None else content, path)
    return path
