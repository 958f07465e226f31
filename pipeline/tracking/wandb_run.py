"""The run in Weights & Biases (W&B). The one door to wandb.

W&B's page puts each key into a section named after what precedes the key's slash, and a run has no other way to name
sections (docs.wandb.ai, "How can I organize my logged charts and media in the W&B UI?"). So every key is logged twice:
as in `metrics.jsonl`, for programs, marked hidden from automatic panels; and under its section, for eyes. The page then
opens with the sections Latent groups, Objective, Samples, Throughput and Validation, over the step.

What W&B gets: the resolved settings, figures, pictures, and what it measures of the machine. Not the code, the state of
git, the terminal's text or a key.

A run is one in W&B over all its attempts, online and offline. W&B takes steps in ascending order only (a lower one is
dropped, and by `wandb sync` even renumbered), so each attempt finds out what W&B has, and tells what comes after it:
online the server says its last step, offline the earlier attempts' files do, which are to be synced in their order.
"""

import contextlib
import logging
import netrc
import os
import queue
import re
import signal
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.schema import Section
from pipeline.tracking.wandb_files import cut_torn_end, is_offline, mark_synced, record_files, whole_records

logger = logging.getLogger(__name__)

PANELS = {
    "train": "Objective/",
    "kl": "Latent groups/kl ",
    "active_units": "Latent groups/active units ",
    "samples": "Samples/",
    "reconstructions": "Samples/reconstructions",
    "perf": "Throughput/",
    "val": "Validation/",
}
"""What W&B's page shows in place of a key's beginning, up to its slash."""

SUMMARIES = {
    "val/elbo": "max,last",
    "val/bpd": "min,last",
    "val/nll": "min,last",
    "val/bpd_nll": "min,last",
    "perf/images_per_second": "mean,last",
}
"""What W&B's table of runs shows of a key, where it is more than the last value."""

DEFAULT_SERVER = "https://api.wandb.ai"


class TrackingConfig(Section):
    """Where figures and pictures go, beside `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a W&B key is found, offline where not. online: a fresh start ends if W&B refuses it."""
    project: str = "nvae-pipeline"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is the key's own."""
    name: str | None = None
    """Name of the run in W&B; null is the name of the run folder."""
    tags: list[str] = Field(default_factory=list)
    """W&B tags."""
    log_every: PositiveInt = 50
    """Steps between records of training figures."""
    wandb_timeout: PositiveFloat = 30.0
    """Seconds that W&B may take to find its server (it tries twice), and to finish."""


class WandbRun:
    """A W&B run that can neither stop nor delay training.

    `last_step` is the last that W&B has from earlier attempts (-1: none); up to it, nothing is told again. Its calls
    are made one after the other on a thread of its own. After an error, or when a thousand calls wait because the W&B
    service is stuck, W&B is off for the rest of the attempt, which is said once.
    """

    def __init__(self, run: Any, timeout: float, last_step: int):
        self._run = run
        self._timeout = timeout
        self._last_step = last_step
        self._defined: set[str] = set()
        self._off = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]) -> None:
        """Figures and pictures of a step, each under its key and, for W&B's page, under its section."""
        if step > self._last_step:
            self._send(lambda: self._log(step, dict(scalars), dict(images)))

    def catch_up(self, records: Sequence[Mapping[str, float]]) -> None:
        """Tell what W&B lacks of the records of `metrics.jsonl` from earlier attempts. Their pictures are not told."""
        if self._last_step > max((record["step"] for record in records), default=-1):
            logger.info("W&B has steps up to %d already; they are not told again", self._last_step)
        missing = [record for record in records if record["step"] > self._last_step]
        if missing:
            steps = missing[0]["step"], missing[-1]["step"]
            logger.info("W&B: %d records of earlier attempts are sent now, steps %d to %d", len(missing), *steps)
            self._send(lambda: self._log_again(missing))

    def alert(self, title: str, text: str) -> None:
        """A message to the people who watch this run."""
        self._send(lambda: self._run.alert(title=title[:63], text=text, level="WARN"))

    def finish(self, exit_code: int) -> None:
        """Ends the run; returns within twice the timeout, whatever the service does."""
        self._send(lambda: self._run.finish(exit_code=exit_code))
        self._send(None)
        self._thread.join(2 * self._timeout if not self._off else 1.0)
        if self._thread.is_alive():
            logger.warning("W&B did not finish in time; what it has not sent lies in %s", self._run.dir)
            end_service()  # otherwise wandb waits for it when Python exits

    def _log_again(self, records: Sequence[Mapping[str, float]]) -> None:
        for record in records:
            scalars = {key: value for key, value in record.items() if key not in ("step", "time")}
            self._log(record["step"], scalars, {}, record["time"])

    def _log(
        self, step: int, scalars: dict[str, float], images: dict[str, np.ndarray], seconds: float | None = None
    ) -> None:
        """`seconds` since 1970, where it was not now."""
        import wandb

        values = {**scalars, **images}
        record: dict[str, Any] = {"step": step} if seconds is None else {"step": step, "_timestamp": seconds}
        for key, value in values.items():
            for name in dict.fromkeys((key, panel_name(key))):
                record[name] = wandb.Image(value) if key in images else value
            self._define(key)
        self._run.log(record, step=step)

    def _define(self, key: str) -> None:
        if key in self._defined:
            return
        self._defined.add(key)
        panel = panel_name(key)
        has_panel = panel != key
        self._run.define_metric(key, step_metric="step", summary=SUMMARIES.get(key), hidden=has_panel or "/" not in key)
        if has_panel:
            self._run.define_metric(panel, step_metric="step", summary="none")

    def _send(self, call: Callable[[], None] | None) -> None:
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._switch_off("its service does not answer")

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:  # nothing that W&B does may end training
                self._switch_off(describe(error))
                return

    def _switch_off(self, why: str) -> None:
        if self._off:
            return
        self._off = True
        logger.warning("W&B is off from here on (%s); metrics.jsonl goes on", why)


def panel_name(key: str) -> str:
    """`kl/8x8_group03` -> `Latent groups/kl 8x8_group03`; a key of no section as it is."""
    prefix, _, rest = key.partition("/")
    return PANELS[prefix] + rest if prefix in PANELS else key


def start_wandb(
    config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any], *, fresh: bool
) -> WandbRun | None:
    """The W&B run of a run folder, the same one after a restart; None where W&B is disabled or cannot work at all."""
    mode, reason = choose_mode(config.wandb)
    if mode == "disabled":
        return None
    if mode == "online":
        run, reason = connect(config, run_dir, run_config)
        if run is not None:
            return WandbRun(run, config.wandb_timeout, last_step=run.starting_step - 1)
        if fresh and config.wandb == "online":
            raise ValueError(
                f"tracking.wandb=online, but W&B cannot be used: {reason}. Check the key (wandb login --relogin) and "
                "the network, or run with tracking.wandb=offline"
            )
    try:
        last_steps = close_files(run_dir)
        run = init_run("offline", config, run_dir, run_config)
    except Exception as error:  # wandb raises many kinds
        logger.warning("W&B is off (%s); metrics.jsonl has everything", describe(error))
        return None
    say_offline(reason, run_dir, last_steps)
    return WandbRun(run, config.wandb_timeout, max(last_steps.values(), default=-1))


def choose_mode(wanted: str) -> tuple[str, str]:
    """(online, offline or disabled; why). `auto` follows WANDB_MODE where set, then asks whether there is a key."""
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE", "auto")
        if wanted in ("offline", "disabled"):
            return wanted, f"WANDB_MODE={wanted}"
        return ("online", "") if find_key() else ("offline", "no W&B key found: set WANDB_API_KEY or run `wandb login`")
    return wanted, f"tracking.wandb={wanted}"


def connect(config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any]) -> tuple[Any, str]:
    """(online run, "") or (None, why not). Never asks for a key."""
    if not find_key():
        return None, "no key found: set WANDB_API_KEY or run `wandb login`"
    try:
        run = init_run("online", config, run_dir, run_config)
        for path in filter(is_offline, record_files(run_dir, run_id(run_dir))):
            mark_synced(path)  # what it holds is now sent from metrics.jsonl
        logger.info("W&B: %s", run.url)
        return run, ""
    except Exception as error:  # wandb raises many kinds
        with contextlib.suppress(Exception):
            import wandb

            wandb.teardown()  # its service holds the run's id until then
        return None, describe(error)


def close_files(run_dir: Path) -> dict[Path, int]:
    """The earlier attempts' files, made fit for `wandb sync`, and the last step that each holds (-1: none)."""
    last_steps = {}
    for path in record_files(run_dir, run_id(run_dir)):
        cut_torn_end(path)
        last_step = read_last_step(path)
        if last_step is None:
            mark_synced(path)  # otherwise `wandb sync` stops there and leaves the others, too
        last_steps[path] = -1 if last_step is None else last_step
    return last_steps


def read_last_step(path: Path) -> int | None:
    """The last step of an attempt's file; -1 where it holds none, None where it does not even name its run."""
    from wandb.proto.wandb_internal_pb2 import Record

    last_step = None
    for data, _ in whole_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            last_step = record.history.step.num
        elif record.HasField("run") and last_step is None:
            last_step = -1
    return last_step


def say_offline(reason: str, run_dir: Path, last_steps: Mapping[Path, int]) -> None:
    """Why a run is offline, and how it comes to W&B. What the server has of attempts that were online is not known."""
    was_online = any(step >= 0 and not is_offline(path) for path, step in last_steps.items())
    later = f"To upload this run later: wandb sync {run_dir / 'wandb'}"
    how = "The next attempt that reaches W&B sends what this one tells" if was_online else later
    logger.info("W&B: offline (%s). %s", reason, how)


def init_run(mode: str, config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any]) -> Any:
    """`wandb.init`, bounded in time, silent, and with nothing captured that is not told here."""
    import wandb

    settings = {
        "init_timeout": config.wandb_timeout,
        "login_timeout": config.wandb_timeout,
        "finish_timeout": config.wandb_timeout,
        "silent": True,
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "x_transaction_log_flush_interval": 1.0,  # seconds of records that a kill can take from the offline file
    }
    # Older releases of wandb lack the flush interval, and the timeout of finish, which is bounded here too.
    known = {name: value for name, value in settings.items() if name in wandb.Settings.model_fields}
    return wandb.init(
        mode=mode,
        dir=run_dir,
        id=run_id(run_dir),
        resume="allow",
        project=config.project,
        entity=config.entity,
        name=config.name or run_dir.resolve().name,
        tags=config.tags,
        config=dict(run_config),
        allow_val_change=True,
        settings=wandb.Settings(**known),
    )


def run_id(run_dir: Path) -> str:
    """The W&B id of a run folder, kept in its file `wandb_run_id`. A new folder takes a sweep's WANDB_RUN_ID."""
    path = run_dir / "wandb_run_id"
    found = path.read_text().strip() if path.is_file() else os.environ.get("WANDB_RUN_ID", "")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
        found = uuid.uuid4().hex[:12]
    path.write_text(found + "\n")
    return found


def find_key() -> str | None:
    """The W&B key that wandb would find in the environment or in netrc; nobody is asked and it is told to nobody."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return os.environ[variable]
    host = urlsplit(os.environ.get("WANDB_BASE_URL", DEFAULT_SERVER)).netloc
    for path in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        try:
            entry = netrc.netrc(os.path.expanduser(path)).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry:
            return entry[2]
    return None


def describe(error: Exception) -> str:
    """An error in one line, without the key."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = find_key()
    return text.replace(key, "***") if key else text


def end_service() -> None:
    """Kill the wandb service that this process started, by its id."""
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core"):
                os.kill(int(pid), signal.SIGKILL)
