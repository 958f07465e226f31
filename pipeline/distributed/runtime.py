"""Processes and devices. The only module that uses Accelerate; the trainer's collectives go through it.

It does not depend on models or data. With one process each collective is the identity. If a process does not join a
collective in time, all processes end (see `watchdog`). They wait for the work of another one as long as it advances.
"""

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, ProfileKwargs
from torch import Tensor, nn

from pipeline.distributed import collectives
from pipeline.distributed.agreement import disagreement
from pipeline.distributed.device_settings import DEFAULT_SETTINGS, DeviceSettings
from pipeline.distributed.host_memory import keep_freed_memory
from pipeline.distributed.logs import launched_rank, report_error
from pipeline.distributed.watchdog import Watchdog, Work, World, wait_until
from shard_data import progress

Precision = Literal["fp32", "bf16", "fp64"]
Result = TypeVar("Result")

BACKEND_MARGIN = 30.0
"""Seconds added to the timeout of gloo and NCCL, so that the watchdog ends the run first and names the missing rank."""


class Runtime:
    """This process's rank and device, and its collectives."""

    def __init__(
        self,
        precision: Precision = "fp32",
        cpu_threads: int | None = None,
        expect_processes: int | None = None,
        collective_timeout: float = 120.0,
        progress_timeout: float = 600.0,
        device_settings: DeviceSettings = DEFAULT_SETTINGS,
        ddp_bucket_mb: int = 25,
    ):
        """Joins the process group that the launcher set up.

        `collective_timeout`: seconds that processes wait for a rank in a collective before all of them end.
        `progress_timeout`: seconds that work which others wait for otherwise may make no progress.
        `ddp_bucket_mb`: MiB of gradients that one collective averages.
        Raises ValueError where the launcher made fewer processes than it announced or than `expect_processes` asks for,
        and where it was configured for GPUs on a machine that has none. Raises ConnectionError where a process does not
        join.
        """
        self._work = Work()
        self.watchdog = Watchdog(self._work, progress_timeout)
        timeout = timedelta(seconds=collective_timeout + BACKEND_MARGIN)
        device_settings.apply()
        # With synchronized batch norm DDP has no buffers to broadcast. Not static_graph: up to torch 2.13 it fails when
        # gradients accumulate (pytorch 187732), and it gains nothing where every parameter has a gradient.
        ddp = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=ddp_bucket_mb
        )
        with connecting(timeout):
            self.accelerator = Accelerator(
                mixed_precision="bf16" if precision == "bf16" else "no",
                cpu=not torch.cuda.is_available(),
                kwargs_handlers=[ddp, InitProcessGroupKwargs(backend=gpu_backend(), timeout=timeout)],
            )
        self.precision = precision
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        check_process_count(self.world_size, expect_processes)
        check_gpus()
        if self.device.type == "cpu":
            torch.set_num_threads(cpu_threads or cores_per_process())
            keep_freed_memory()
        # Flags and objects in host memory use their own group, so that no device has to wait. None: the default group.
        on_gpus = self.device.type == "cuda" and self.world_size > 1
        self._hosts = collectives.new_host_group(timeout) if on_gpus else None
        self._num_rendezvous = 0
        if self.world_size > 1:
            self._watch_others(collective_timeout)

    def _watch_others(self, timeout: float) -> None:
        groups = [None] + ([self._hosts] if self._hosts is not None else [])

        def joined() -> int:
            return sum(map(collectives.num_collectives, groups))

        self._store = collectives.connect_store("watchdog")
        with connecting(timedelta(seconds=timeout)):
            self.watchdog.join(World(self.rank, self.world_size, self._store, timeout, joined))

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model behind DDP (with more than one process) and autocast, and the optimizer, both on the device."""
        with warnings.catch_warnings():
            # torch 2.13 deprecates an argument that Accelerate passes.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Gradients stay on their rank until the last micro-batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def rehearsing(self) -> AbstractContextManager:
        """Inside it the collectives of models and `mean` exchange nothing: one rank can run what needs all of them."""
        return collectives.rehearsing()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for calls that do not go through the prepared model's forward."""
        return self.accelerator.autocast()

    def profiler(
        self, skipped: int, warm_up: int, recorded: int, on_recorded: Callable[[Any], None]
    ) -> torch.profiler.profile:
        """Records operators on CPU and GPU, after `skipped` and `warm_up` steps; `step()` on it ends a step.

        `on_recorded` gets it after the last of the `recorded` steps, or at its `stop()` after fewer.
        """
        schedule = {"skip_first": skipped, "wait": 0, "warmup": warm_up, "active": recorded, "repeat": 1}
        return ProfileKwargs(schedule_option=schedule, on_trace_ready=on_recorded).build()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a detached tensor over ranks."""
        return self.sum(value) / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a detached tensor over ranks."""
        return value if self.world_size == 1 else collectives.all_reduce(value.detach().clone())

    def agree(self, flag: Tensor) -> bool:
        """Whether the flag is true on every rank: one collective, one read of the device."""
        votes = self.sum(flag.to(torch.float32))
        return votes.item() == self.world_size

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is true on any rank: one collective, without waiting for a device."""
        return collectives.any_of(flags, self._hosts)

    def all_agree(self, flag: bool) -> bool:
        """Whether a flag that no device holds is true on every rank, without waiting for a device."""
        return not self.any_of(not flag)[0]

    def gather(self, value: Tensor) -> Tensor:
        """Equal-sized tensors of all ranks, joined along dimension 0 in rank order, on every rank."""
        return self.accelerator.gather(value)

    def run_on_main(self, work: Callable[[], Result], name: str = "its work") -> Result | None:
        """Runs `work` on the main process while the others wait, as long as it advances (`shard_data.progress`).

        `name` completes "no progress in": "writing the checkpoint". Returns the result there, and None elsewhere. Its
        ValueError or OSError is raised on every rank.
        """
        return self._run(work if self.is_main else lambda: None, name, workers=1)

    def run_on_all(self, work: Callable[[], Result], name: str = "its work") -> Result:
        """Runs `work` on every rank. Blocks until all ranks finish, as long as one of them advances. A ValueError or
        OSError of any rank is raised on every rank; if several fail, that of the lowest rank.
        """
        return self._run(work, name, workers=self.world_size)

    def _run(self, work: Callable[[], Result], name: str, workers: int) -> Result:
        result, failure = None, None
        self._work.name = name
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
        finally:
            self._work.name = ""
        self._rendezvous(workers)
        failures = [failure for failure in self.gather_objects(failure) if failure is not None]
        if failures:
            raise raised_on_all_ranks(failures[0])
        return result

    def _rendezvous(self, workers: int) -> None:
        """Blocks until the first `workers` ranks arrive. Not a collective, which would time out; the watchdog checks
        that the other ranks are alive and that their work advances.
        """
        if self.world_size == 1:
            return
        self._num_rendezvous += 1
        count, opened = f"rendezvous/{self._num_rendezvous}/count", f"rendezvous/{self._num_rendezvous}/open"
        if self.rank < workers and self._store.add(count, 1) == workers:
            self._store.set(opened, "")
        self._work.waiting = True
        wait_until(lambda: self._store.check([opened]))
        self._work.waiting = False
        collectives.barrier(self._hosts)
        if self.is_main:
            self._store.delete_key(count)
            self._store.delete_key(opened)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return collectives.gather_objects(value, self._hosts)

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every rank."""
        return collectives.from_main(value, self._hosts)

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Raises ValueError on every rank where any fact differs between ranks, with the values and their ranks."""
        problem = disagreement(self.gather_objects(dict(facts)))
        if problem is not None:
            raise raised_on_all_ranks(ValueError(problem))

    def advance(self) -> None:
        """A piece of work is done that other ranks wait for without a timeout."""
        progress.advance()

    def barrier(self) -> None:
        """Blocks until all ranks arrive, as long as the others advance."""
        self._rendezvous(self.world_size)

    @contextmanager
    def propagate_failure(self) -> Iterator[None]:
        """An error inside ends the other processes too, with its message, unless every rank raises it."""
        try:
            yield
        except Exception as error:
            if not is_raised_on_all_ranks(error):
                self.watchdog.report_failure(error)
                error.is_reported = not self.is_main
            raise

    @contextmanager
    def closing(self) -> Iterator[None]:
        """For the whole work of a script: `propagate_failure`, then `close`."""
        try:
            with self.propagate_failure():
                yield
        except Exception as error:
            if is_raised_on_all_ranks(error):
                # The launcher ends all processes when the first one exits, so the main process reports before that.
                if self.is_main:
                    report_error(error)
                error.is_reported = True
                self.barrier()
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Leaves the process group, so that the interpreter ends without a warning.

        Not after a failure: destroying the group could block on processes that no longer exist.
        """
        self.watchdog.close()
        if self.watchdog.failed:
            return
        # Free DDP's state before the process group: its threads could abort the interpreter at exit.
        self.accelerator.free_memory()
        self.accelerator.end_training()
        collectives.leave()

    @property
    def device_name(self) -> str:
        """The GPU's product name; "CPU" for any CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def describe(self) -> str:
        """One line for the banner."""
        number = torch.get_num_threads()
        threads = f", {number} thread{'s' if number > 1 else ''} each" if self.device.type == "cpu" else ""
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{processes} on {self.device_name}{threads}, {self.precision}"


@contextmanager
def connecting(timeout: timedelta) -> Iterator[None]:
    """Raises ConnectionError where the other processes cannot be reached: one may be stopped, or gone."""
    try:
        yield
    except RuntimeError as error:
        if not collectives.is_lost_connection(error):
            raise
        place = f"rank {launched_rank()} on {socket.gethostname()}"
        seconds = timeout.total_seconds()
        problem = str(error).partition("\n")[0]
        message = f"{place} could not connect to all other processes within {seconds:g} s: {problem}"
        raise ConnectionError(message) from error


def cores_per_process() -> int:
    """The cores this process may use, shared fairly with the other local ranks.

    (`accelerate launch` sets OMP_NUM_THREADS=1.)
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def gpu_backend() -> str:
    """How processes with GPUs exchange data: by NCCL, which refuses processes that share a GPU; then by gloo."""
    num_gpus, num_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "gloo" if 0 < num_gpus < num_processes else "nccl"


def check_process_count(world_size: int, expected: int | None) -> None:
    """Raises ValueError where the launcher started another number of processes than it was configured for."""
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != world_size:
        raise ValueError(
            f"the launcher announced WORLD_SIZE={announced} but {world_size} process(es) joined; "
            "on CPU launch with --config_file accelerate_configs/cpu_2proc.yaml"
        )
    if expected is not None and expected != world_size:
        raise ValueError(
            f"train.expect_processes: {expected} processes were expected and {world_size} started; "
            "look at the launcher's num_processes (accelerate_configs/ holds configurations that work)"
        )


def check_gpus() -> None:
    """Raises ValueError where `accelerate launch` was configured for GPUs and this machine has none.

    Its configurations for GPUs name some in CUDA_VISIBLE_DEVICES, or start processes with a LOCAL_RANK; those for CPUs
    hide all GPUs there, or set ACCELERATE_USE_CPU.
    """
    environment = os.environ
    selected = environment.get("CUDA_VISIBLE_DEVICES", "all" if "LOCAL_RANK" in environment else "")
    for_cpu = selected in ("", "none") or selected.startswith("-1")
    for_cpu = for_cpu or environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if for_cpu or "ACCELERATE_DYNAMO_BACKEND" not in environment or torch.cuda.is_available():
        return
    raise ValueError(
        "the launcher was configured for GPUs and this machine has none; on CPUs launch with --config_file "
        "accelerate_configs/cpu.yaml (one process) or accelerate_configs/cpu_2proc.yaml (two), or set "
        "ACCELERATE_USE_CPU=true"
    )


def raised_on_all_ranks(error: Exception) -> Exception:
    """Marks an error that every rank raises at the same point."""
    error.on_every_rank = True
    return error


def is_raised_on_all_ranks(error: Exception) -> bool:
    """Whether every rank raises this error, so that collectives still work."""
    return getattr(error, "on_every_rank", False)
