"""What a run is started as, for `attempts.jsonl` and the lines at its start."""

import platform
import socket
import subprocess
from pathlib import Path

import torch

from pipeline.distributed.agreement import code_version
from pipeline.run.session import Session
from pipeline.storage.attempts import FILE, AttemptFacts, add_attempt

ROOT = Path(__file__).resolve().parents[2]


def record_start(session: Session, attempt: int) -> AttemptFacts:
    """Adds this start to the run's `attempts.jsonl`, where the disk takes it. On the main process."""
    facts = start_facts(session, attempt)
    with session.files.writing("records of attempts", session.folder / FILE):
        add_attempt(session.folder, facts)
    return facts


def start_facts(session: Session, attempt: int) -> AttemptFacts:
    """The facts of this start."""
    trainer, runtime = session.trainer, session.runtime
    return AttemptFacts(
        attempt=attempt,
        step=trainer.step,
        total_steps=trainer.total_steps,
        model=session.recipe.model.name,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        latent_groups=len(trainer.model.groups),
        data=str(session.recipe.data.root),
        images=session.data.order.epoch_size,
        processes=runtime.world_size,
        device=runtime.device_name,
        threads=torch.get_num_threads() if runtime.device.type == "cpu" else 0,
        precision=runtime.precision,
        host=socket.gethostname(),
        torch=torch.__version__,
        python=platform.python_version(),
        code=code_version()[:16],
        revision=revision(),
        data_fingerprint=session.data.train.fingerprint,
    )


def revision(root: Path = ROOT) -> str:
    """The git commit of the code, with `-dirty` where files differ from it; empty where the code is no git checkout.

    A copy of the code that a SLURM job made has it in its file REVISION.
    """
    if (root / "REVISION").is_file():
        return (root / "REVISION").read_text().strip()[:100]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
