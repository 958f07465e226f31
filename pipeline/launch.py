"""Starts a command on several processes, as `accelerate launch` does and with its options.

    python pipeline/launch.py --config_file accelerate_configs/cpu_2proc.yaml pipeline/train.py --model nvae
    nvae-launch --multi_gpu --num_processes 8 -m pipeline.train --model nvae

If processes fail, it ends with the exit code of the first one. `accelerate launch` always ends with 1, and prints a
traceback of its own and a report of 35 lines below the error of the command.
"""

import logging
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

DESCRIPTION = """Starts a command on several processes, as `accelerate launch` does and with its options, which follow.
For instance: python pipeline/launch.py --config_file accelerate_configs/multi_gpu.yaml pipeline/train.py --model nvae.
accelerate_configs/ has a file for each kind of machine. The exit code is that of the first process that failed."""
USER_ERROR = 2  # the command has printed it
PEER_FAILED = 81  # see pipeline/distributed/watchdog.py: ended because another process failed


def run_alone(options: Namespace) -> None:
    """Replaces this process by the command, which so gets every signal and gives its own exit code."""
    command, environment = prepare_simple_launcher_cmd_env(options)
    os.execvpe(command[0], command, environment)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; the command's own; 128 + N after signal N."""
    parser = launch.launch_command_parser()
    parser.prog, parser.description = Path(sys.argv[0]).name, DESCRIPTION
    parser.usage = "%(prog)s [options] SCRIPT [arguments of SCRIPT]"
    options = parser.parse_args(arguments)
    launch.simple_launcher = run_alone
    torch_log = logging.getLogger("torch.distributed")  # the errors below say the same
    torch_log.handlers = [logging.NullHandler()]
    torch_log.propagate = False
    try:
        launch.launch_command(options)
    except ChildFailedError as error:
        return report(error)
    except SignalException as error:
        return 128 + error.sigval
    except ValueError as error:  # options that accelerate refuses
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def report(error: ChildFailedError) -> int:
    """One line for each process that failed by itself, unless the command has printed its error. Returns the exit code
    of the first one.
    """
    _, first = error.get_first_failure()
    for rank, failure in error.failures.items():
        ended_by_others = failure is not first and failure.exitcode in (PEER_FAILED, -signal.SIGTERM)
        if failure.exitcode != USER_ERROR and not ended_by_others:
            print(f"rank {rank} (process {failure.pid}) {describe(failure)}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def describe(failure: ProcessFailure) -> str:
    """How a process ended."""
    if failure.exitcode < 0:
        return f"was killed by {failure.signal_name()}"
    return f"ended with exit code {failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main())
