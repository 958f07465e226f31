"""Shared by the command-line tools: how they name themselves, exit codes, error messages, and starting other tools."""

import argparse
import logging
import os
import re
import select
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, NoReturn

from pipeline.distributed.logs import launched_rank, log_lines, report_error, start_logging
from shard_data import progress
from shard_data.terminal import has_reader, next_lines

log = logging.getLogger("pipeline")
ROOT = Path(__file__).resolve().parents[1]

Failures = Mapping[type[Exception], int]
NO_FAILURES: Failures = {}
INSTALLED = "nvae-"
"""How the names of the console commands begin; pyproject.toml lists them."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves words with hyphens whole: `hf-hub:OWNER/NAME` and `--dry-run` are typed as they stand."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class CommandLine(argparse.ArgumentParser):
    """The parser of a command that is a script of a checkout, `train.py`, and a console command, `nvae-train`.

    Usage, errors and help name the command as it was called, and other commands in the same way.
    """

    def __init__(self, name: str, description: str, epilog: str | None = None):
        called = Path(sys.argv[0]).name
        super().__init__(
            prog=called if called.startswith(INSTALLED) else name,
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def format_help(self) -> str:
        """The text of --help."""
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Exits with 2 and one line, without the usage, which can have 15 lines."""
        if option := re.match(r"argument (--\S+): expected one argument$", message):
            message += f", and one that begins with a dash as {option[1]}=-1"
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            options = re.findall(r"--[\w-]+", self.format_usage())
            message += "".join(f"; did you mean {option}?" for option in get_close_matches(unknown[1], options, n=1))
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def as_called(text: str) -> str:
    """A text that names commands, as they are called here: scripts of a checkout, or console commands.

    A SLURM job runs a copy of a checkout's code, in the checkout.
    """
    in_checkout = (ROOT / "pyproject.toml").is_file() or Path("pipeline/cli.py").is_file()
    is_installed = Path(sys.argv[0]).name.startswith(INSTALLED) or not in_checkout
    return with_installed_names(text) if is_installed else text


def with_installed_names(text: str) -> str:
    """`python pipeline/evaluate.py`, `evaluate.py` and `python -m pipeline.status` become `nvae-evaluate` and
    `nvae-status`; likewise `python -m shard_data`. docs/settings.md is not installed; nvae-recipe prints it.
    """
    text = text.replace("python -m shard_data", "nvae-shards").replace("docs/settings.md", "nvae-recipe")
    script = r"(?:accelerate launch |python )?(?:pipeline/)?\b(\w+)\.py\b"
    module = r"python -m pipeline\.(?:\w+\.)?(\w+)"
    return re.sub(f"{script}|{module}", lambda found: INSTALLED + (found[1] or found[2]).replace("_", "-"), text)


def run_tool(work: Callable[[], int | None], interrupted: str = "", failures: Failures = NO_FAILURES) -> int:
    """Runs a command, on one process or several, and returns its exit code.

    0, or what `work` returns: done; 0 also where the reader of what it prints ends early (`| head`). 2: a user error,
    reported in one message. 130: interrupted by Ctrl-C; the message continues with `interrupted`. `failures`: exit
    codes of further errors that are reported in one message.
    """
    start_logging(launched_rank() == 0)
    codes = {ValueError: 2, OSError: 2, **failures}
    try:
        code = work() or 0
        has_reader()
        return code
    except tuple(codes) as error:
        if isinstance(error, BrokenPipeError) and not has_reader("\n"):  # a pipe of another kind is an error
            return 0
        report_error(error)
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        if interrupted and launched_rank() == 0:
            log.error("error: interrupted; %s", interrupted)
        return 130


def log_next(commands: Sequence[str]) -> None:
    """Logs the commands that come next, as they are called here; not where another program started this one."""
    log_lines(next_lines([as_called(command) for command in commands]))


def run_python(*arguments: str, progress_timeout: float | None = None) -> None:
    """Runs `python ARGUMENTS` in a new process, which finds this project first. Its progress (`shard_data.progress`)
    counts as this process's own.

    Raises ValueError if it fails, or makes no progress for `progress_timeout` seconds; then it is killed.
    """
    command = f"`python {shlex.join(arguments)}`"
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe:
        try:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = os.environ | {"PYTHONPATH": path, progress.VARIABLE: str(writer)}
            process = subprocess.Popen([sys.executable, *arguments], env=environment, pass_fds=[writer])
        finally:
            os.close(writer)
        with process:
            try:
                while _waits_for(pipe, progress_timeout):
                    progress.advance()
            except TimeoutError:
                process.kill()
                raise ValueError(f"{command} made no progress for {progress_timeout:g} s and was ended") from None
            except BaseException:  # Ctrl-C
                process.kill()
                raise
    if process.returncode != 0:
        raise ValueError(f"{command} ended with exit code {process.returncode}; see above")


def _waits_for(pipe: BinaryIO, timeout: float | None) -> bool:
    """Blocks until there is progress, True, or the process has ended, False. Raises TimeoutError."""
    if not select.select([pipe], [], [], timeout)[0]:
        raise TimeoutError
    return pipe.read(2**16) != b""
