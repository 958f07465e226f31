"""Two processes on gloo, without a launcher, for the units that need a process group."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def start_rank(rank: int, folder: str) -> None:
    """Joins the other rank, whose files are in the same folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))


def run_two_ranks(worker: Callable[[int, str], None], folder: Path) -> Path:
    """Runs `worker(rank, folder)` on both; returns the folder, for its results."""
    mp.spawn(worker, (str(folder),), nprocs=2)
    return folder
