"""Starts the run in Weights & Biases (W&B).

W&B receives the resolved settings, the environment (versions, devices, the data's fingerprint), scalars, pictures, and
wandb's own measurements of the machine. It does not receive the code, changes to it, the output of the terminal or a
key. Each key of `metrics.jsonl` is logged once, under the same name; W&B's page groups keys into sections by the part
before the slash.

A run is one W&B run over all its attempts. W&B accepts steps in ascending order only, so an online attempt reads the
last step from the server and sends what comes after it. An offline attempt writes wandb's local files without reading
those of earlier attempts: `python -m pipeline.tracking.upload RUN` uploads such a run from `metrics.jsonl`.
"""

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.storage.status import read_status
from pipeline.tracking.tracking_config import TrackingConfig
from pipeline.tracking.wandb_run import WandbRun
from pipeline.tracking.wandb_service import describe, find_key, how_to_upload, run_within, teardown

logger = logging.getLogger(__name__)

SEED_ENDING = re.compile(r"(.+)-seed\d+")


def start_wandb(
    config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any], *, fresh: bool
) -> WandbRun | None:
    """The W&B run of a run folder, the same one after a restart; None if W&B is disabled or cannot be started."""
    mode, reason = choose_mode(config.wandb)
    if mode == "disabled":
        return None
    if mode == "online":
        try:
            return connect(config, run_dir, run_config)
        except ConnectionError as error:
            reason = str(error)
        if fresh and config.wandb == "online":
            raise ValueError(
                f"tracking.wandb=online, but W&B cannot be used: {reason}. Check the key (wandb login --relogin) and "
                "the network, or run with tracking.wandb=offline"
            )
    try:
        run = run_within(2 * config.wandb_timeout, lambda: init_run("offline", config, run_dir, run_config))
    except Exception as error:  # wandb raises many kinds
        logger.warning("W&B is off (%s); metrics.jsonl is written", describe(error))
        return None
    logger.info("W&B: offline (%s); %s", reason, how_to_upload(run_dir))
    return WandbRun(run, run_dir, config.wandb_timeout, None, read_status(run_dir).total_steps)


def choose_mode(wanted: str) -> tuple[str, str]:
    """(online, offline or disabled; why). `auto` uses WANDB_MODE if it is set, otherwise it checks for a key."""
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE", "auto")
        if wanted in ("offline", "disabled"):
            return wanted, f"WANDB_MODE={wanted}"
        return ("online", "") if find_key() else ("offline", "no W&B key found: set WANDB_API_KEY or run `wandb login`")
    return wanted, f"tracking.wandb={wanted}"


def connect(
    config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any], upload_timeout: float | None = None
) -> WandbRun:
    """The online run. Never prompts for a key. Raises ConnectionError, without the key in its message.

    `upload_timeout` (seconds) replaces `config.wandb_timeout` for finishing the run.
    """
    if not find_key():
        raise ConnectionError("no key found: set WANDB_API_KEY or run `wandb login`")
    finish_timeout = upload_timeout or config.wandb_timeout
    try:
        run = run_within(
            2 * config.wandb_timeout, lambda: init_run("online", config, run_dir, run_config, finish_timeout)
        )
        last_step = run.starting_step - 1
    except Exception as error:  # wandb raises many kinds
        with contextlib.suppress(Exception):
            run_within(config.wandb_timeout, teardown)  # until then its service holds the run's id
        raise ConnectionError(describe(error)) from None
    for path in run_dir.glob("wandb/offline-run-*/*.wandb"):
        # Their content is sent from metrics.jsonl; this is how `wandb sync` marks a file as uploaded.
        path.with_name(path.name + ".synced").touch()
    logger.info("W&B: %s", run.url)
    return WandbRun(run, run_dir, finish_timeout, last_step, read_status(run_dir).total_steps)


def init_run(
    mode: str,
    config: TrackingConfig,
    run_dir: Path,
    run_config: Mapping[str, Any],
    finish_timeout: float | None = None,
) -> Any:
    """`wandb.init` with time limits, without output, and without recording code, git state or terminal output."""
    import wandb

    settings = {
        "init_timeout": config.wandb_timeout,
        "login_timeout": config.wandb_timeout,
        "finish_timeout": finish_timeout or config.wandb_timeout,
        "finish_timeout_raises": True,
        "silent": True,
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "x_transaction_log_flush_interval": 1.0,  # seconds of records that a kill can take from the offline file
    }
    # Older releases of wandb lack some of these; `finish` is limited in WandbRun as well.
    known = {name: value for name, value in settings.items() if name in wandb.Settings.model_fields}
    return wandb.init(
        mode=mode,
        dir=run_dir,
        id=run_id(run_dir),
        resume="allow",
        project=config.project,
        entity=config.entity,
        name=config.name or run_dir.resolve().name,
        group=group_of(config, run_dir),
        tags=list(config.tags),
        config=dict(run_config),
        allow_val_change=True,
        settings=wandb.Settings(**known),
    )


def group_of(config: TrackingConfig, run_dir: Path) -> str | None:
    """The run's group in W&B; None: what WANDB_RUN_GROUP says, or no group. Runs NAME-seedN are the group NAME."""
    if config.group or "WANDB_RUN_GROUP" in os.environ:
        return config.group
    found = SEED_ENDING.fullmatch(run_dir.resolve().name)
    return found[1] if found else None


def run_id(run_dir: Path) -> str:
    """The W&B id of a run folder, stored in its file `wandb_run_id`. A new folder uses a sweep's WANDB_RUN_ID."""
    path = run_dir / "wandb_run_id"
    found = path.read_text().strip() if path.is_file() else os.environ.get("WANDB_RUN_ID", "")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
        found = uuid.uuid4().hex[:12]
    path.write_text(found + "\n")
    return found
