"""The settings of logging."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from pipeline.schema import Section


class TrackingConfig(Section):
    """Where metrics and pictures are logged, in addition to `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if a W&B key is found, otherwise offline. online: a fresh start fails if W&B refuses it."""
    project: str = "nvae-pipeline"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is the default of the key."""
    name: str | None = None
    """Name of the run in W&B; null is the name of the run folder."""
    group: str | None = None
    """Group of the run in W&B; null is the name of a run folder NAME-seedN without its ending, so that seeds are one
    group, and no group for other names."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    log_every: PositiveInt = 50
    """Steps between records of training metrics."""
    wandb_timeout: PositiveFloat = 30.0
    """Seconds that W&B may take to log in, to start the run, and to finish it."""
    tensorboard: bool = False
    """Also write metrics and pictures to RUN/tensorboard, for TensorBoard. Needs the package tensorboard."""
