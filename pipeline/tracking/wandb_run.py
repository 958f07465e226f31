"""The run in Weights & Biases (W&B). The only module that imports wandb.

W&B receives the resolved settings, scalars, pictures, and wandb's own measurements of the machine. It does not receive
the code, the state of git, the output of the terminal or a key. Each key of `metrics.jsonl` is logged once, under the
same name; W&B's page groups keys into sections by the part before the slash.

A run is one W&B run over all its attempts. W&B accepts steps in ascending order only, so an online attempt reads the
last step from the server and sends what comes after it. An offline attempt writes wandb's local files without reading
those of earlier attempts: `python -m pipeline.tracking.upload RUN` uploads such a run from `metrics.jsonl`.
"""

import contextlib
import logging
import netrc
import os
import queue
import re
import shlex
import signal
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from pipeline.schema import Section
from pipeline.tracking.history import LoggedStep

logger = logging.getLogger(__name__)

SUMMARIES = {
    "val/elbo": "max,last",
    "val/bpd": "min,last",
    "val/nll": "min,last",
    "val/bpd_nll": "min,last",
    "perf/images_per_second": "mean,last",
}
"""What W&B's table of runs shows for a key, where it is more than the last value."""

HIDDEN = ("attempt", "samples_seen")
"""Keys for which W&B's page shows no chart unless one is added."""

DEFAULT_SERVER = "https://api.wandb.ai"


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
    tags: tuple[str, ...] = ()
    """W&B tags."""
    log_every: PositiveInt = 50
    """Steps between records of training metrics."""
    wandb_timeout: PositiveFloat = 30.0
    """Seconds that W&B may take to log in, to start the run, and to finish it."""


class WandbRun:
    """A W&B run that can neither stop nor delay training.

    `last_step` is the last step that W&B has (-1: none; None: unknown, because the run is offline). Steps up to it are
    not sent. All calls run one after the other on a separate thread. After an error, or when 1000 calls are queued
    because the wandb service does not answer, W&B is switched off for the rest of the attempt, with one warning.
    """

    def __init__(self, run: Any, run_dir: Path, timeout: float, last_step: int | None):
        self.last_step = last_step
        self._run = run
        self._run_dir = run_dir
        self._timeout = timeout
        self._exit_code = 0
        self._defined: set[str] = set()
        self._off = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the run's page."""
        return self._run.url

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log the scalars and pictures of a step."""
        if self.last_step is None or step > self.last_step:
            self._send(lambda: self._log(step, dict(scalars), dict(pictures), time=None))

    def send_missing(self, history: Sequence[LoggedStep]) -> list[LoggedStep]:
        """Send the steps that W&B lacks, and return them. Sends none if the run is offline."""
        if self.last_step is None:
            return []
        if self.last_step > max((logged.step for logged in history), default=-1):
            logger.info("W&B already has steps up to %d; they are not sent again", self.last_step)
        missing = [logged for logged in history if logged.step > self.last_step]
        if missing:
            steps = missing[0].step, missing[-1].step
            logger.info("W&B: sending %d steps that it lacks, %d to %d", len(missing), *steps)
            self._send(lambda: self._log_files(missing))
        return missing

    def alert(self, title: str, text: str) -> None:
        """Send an alert to those who watch this run."""
        self._send(lambda: self._run.alert(title=title[:63], text=text, level="WARN"))

    def finish(self, exit_code: int) -> bool:
        """Finish the run. Returns whether W&B received everything.

        Takes at most twice the timeout: a wandb service that has not finished by then is killed.
        """
        self._exit_code = exit_code
        try:
            self._calls.put_nowait(None)
            self._thread.join(2 * self._timeout)
        except queue.Full:
            self._switch_off("its service does not answer")
        if self._thread.is_alive():
            self._switch_off("it did not finish in time")
            kill_service()  # otherwise wandb would wait for it when Python exits
        return not self._off

    def _log_files(self, history: Sequence[LoggedStep]) -> None:
        import wandb

        for logged in history:
            pictures = {}
            for key, path in logged.pictures.items():
                try:
                    pictures[key] = wandb.Image(str(path))
                except Exception as error:  # a file that is no picture
                    logger.warning("W&B: %s cannot be sent: %s", path, describe(error))
            self._log(logged.step, logged.scalars, pictures, logged.time)

    def _log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Any], time: float | None) -> None:
        """`pictures` are arrays or wandb's images; `time` is in seconds since 1970 (None: now)."""
        import wandb

        record: dict[str, Any] = {"step": step, **scalars}
        if time is not None:
            record["_timestamp"] = time
        for key, picture in pictures.items():
            record[key] = picture if isinstance(picture, wandb.Image) else wandb.Image(picture)
        for key in [*scalars, *pictures]:
            if key not in self._defined:
                self._defined.add(key)
                self._run.define_metric(key, step_metric="step", summary=SUMMARIES.get(key), hidden=key in HIDDEN)
        self._run.log(record, step=step)

    def _send(self, call: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._switch_off("its service does not answer")

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            self._try(call)
        self._try(lambda: self._run.finish(exit_code=self._exit_code), even_if_off=True)

    def _try(self, call: Callable[[], None], even_if_off: bool = False) -> None:
        if self._off and not even_if_off:
            return
        try:
            call()
        except Exception as error:  # no error of W&B may end training
            self._switch_off(describe(error))

    def _switch_off(self, why: str) -> None:
        if self._off:
            return
        self._off = True
        logger.warning("W&B is off (%s). metrics.jsonl is still written; %s", why, how_to_upload(self._run_dir))


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
    return WandbRun(run, run_dir, config.wandb_timeout, last_step=None)


def how_to_upload(run_dir: Path) -> str:
    """The command that uploads a run, for messages."""
    return f"to upload this run later: python -m pipeline.tracking.upload {shlex.quote(str(run_dir))}"


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
    return WandbRun(run, run_dir, finish_timeout, last_step)


def teardown() -> None:
    """End wandb's service."""
    import wandb

    wandb.teardown()


def run_within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, which runs on a thread. Raises what it raises.

    If it takes longer than `seconds`, the wandb service is killed and TimeoutError is raised.
    """
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="wandb", daemon=True).start()
    try:
        return outcome.result(seconds)
    except FutureTimeout:
        kill_service()
        raise TimeoutError(f"no answer within {seconds:g} s") from None


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
        tags=list(config.tags),
        config=dict(run_config),
        allow_val_change=True,
        settings=wandb.Settings(**known),
    )


def run_id(run_dir: Path) -> str:
    """The W&B id of a run folder, stored in its file `wandb_run_id`. A new folder uses a sweep's WANDB_RUN_ID."""
    path = run_dir / "wandb_run_id"
    found = path.read_text().strip() if path.is_file() else os.environ.get("WANDB_RUN_ID", "")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
        found = uuid.uuid4().hex[:12]
    path.write_text(found + "\n")
    return found


def find_key() -> str | None:
    """The W&B key that wandb would find in the environment or in netrc. Never prompts, and never logs the key."""
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
    """The message of an error in one line, with the key masked."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = find_key()
    return text.replace(key, "***") if key else text


def kill_service() -> None:
    """Kill the wandb service that this process started, by its process id."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core"):
                os.kill(int(pid), signal.SIGKILL)
