"""Where a run goes if the command line does not say."""

import os
import re
from pathlib import Path


def default_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-ID for a trial of a W&B sweep: ID is its run's in W&B, so that each trial has a
    folder of its own. wandb's agent sets both variables.
    """
    trial = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    return Path("runs") / (f"{name}-{trial}" if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", trial) else name)
