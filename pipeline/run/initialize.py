"""`--init`: a new run that starts from the weights of a checkpoint."""

import logging

import torch

from pipeline.run.session import Session
from pipeline.storage.checkpoint import Checkpoint

log = logging.getLogger("pipeline")

MAX_SHOWN = 20
"""Tensors that a message names at most."""


def initialize(session: Session, checkpoint: Checkpoint) -> None:
    """Loads the checkpoint's weights, the averaged ones where it has them, into a session at step 0.

    Tensors of the same name and shape are loaded, in the precision of this run; the others are logged. Raises
    ValueError where none fits, or a value is not finite.
    """
    trainer = session.trainer
    weights = checkpoint.tensors.get("ema") or checkpoint.tensors.get("model", {})
    own = trainer.model.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise ValueError(f"--init: no tensor of {checkpoint.path} has the name and shape of one of this model")
    for name, tensor in fitting.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"--init: {name!r} of {checkpoint.path} has non-finite values")
    trainer.model.load_state_dict(own | fitting)
    if trainer.state.ema is not None:
        trainer.state.ema.load_state(trainer.model.state_dict())
    facts = checkpoint.facts  # of a release's weights, `source` decides on the license of what is trained from them
    session.initialized_from = facts.get("initialized_from") or facts.get("source")
    log.info("initialized %d of %d tensors from %s", len(fitting), len(own), checkpoint.path)
    report("initialized at random, because the checkpoint does not have them in this shape", own.keys() - fitting)
    report("not loaded, because this model does not have them in this shape", weights.keys() - fitting)


def report(what: str, names: set[str]) -> None:
    """Logs the names of tensors, if there are any."""
    if names:
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        log.warning("%d tensors are %s: %s%s", len(names), what, ", ".join(sorted(names)[:MAX_SHOWN]), more)
