"""wandb's service process, and the key of Weights & Biases (W&B)."""

import netrc
import os
import shlex
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROC = Path("/proc")
DEFAULT_SERVER = "https://api.wandb.ai"


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


def how_to_upload(run_dir: Path) -> str:
    """The command that uploads a run, for messages."""
    return f"to upload this run later: python -m pipeline.tracking.upload {shlex.quote(str(run_dir))}"


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


def teardown() -> None:
    """End wandb's service."""
    import wandb

    wandb.teardown()


def kill_service() -> None:
    """Kill the wandb service that this process started, by its process id."""
    for thread in PROC.glob("self/task/*/children"):
        for pid in _read(thread).split():
            if _read(PROC / pid / "comm").startswith("wandb-core"):
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _read(path: Path) -> str:
    """A file of PROC; empty where its process or thread, a worker that loads data for instance, has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def default_entity() -> str:
    """The user or team that a W&B key belongs to. Raises what wandb raises."""
    import wandb

    return wandb.Api().default_entity
