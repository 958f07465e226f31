"""The process group and its collectives. No other module of pipeline calls torch.distributed.

With one process each collective is the identity and needs no process group. `group` None is the default group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
Store = dist.Store

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before 2.13

_alone = False
_rehearsing = False


@contextmanager
def alone() -> Iterator[None]:
    """Inside this context this process computes as if it were the only one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


@contextmanager
def rehearsing() -> Iterator[None]:
    """Inside this context `all_reduce` and `all_gather` exchange nothing: the others' values are taken to be this
    process's own.
    """
    global _rehearsing
    _rehearsing = True
    try:
        yield
    finally:
        _rehearsing = False


def num_processes() -> int:
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


def all_reduce(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place. Returns them."""
    if num_processes() > 1 and not _rehearsing:
        dist.all_reduce(values)
    return values


def all_gather(values: Tensor) -> Tensor:
    """The contiguous values of all processes, which have equal shapes, concatenated in rank order along dimension 0."""
    if num_processes() == 1:
        return values
    if _rehearsing:
        return torch.cat([values] * num_processes())
    gathered = values.new_empty((num_processes() * values.shape[0], *values.shape[1:]))
    _all_gather_single(gathered, values)
    return gathered


def any_of(flags: tuple[bool, ...], group: Group | None = None) -> tuple[bool, ...]:
    """For each flag, whether it is true on any process. `group` has host memory."""
    if num_processes() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return tuple(map(bool, votes.tolist()))


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """The values of all processes, in rank order."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes()
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(value: Any, group: Group | None = None) -> Any:
    """The main process's value."""
    values = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def barrier(group: Group | None = None) -> None:
    if num_processes() > 1:
        dist.barrier(group)


# ------------------------------------------------------------------------------------------------- the process group


def new_host_group(timeout: timedelta) -> Group:
    """A group that exchanges host memory, beside a default group that exchanges device memory."""
    return dist.new_group(backend="gloo", timeout=timeout)


def num_collectives(group: Group | None = None) -> int:
    """Collectives that this process has entered in a group."""
    return (group or dist.group.WORLD)._get_sequence_number_for_group()


def connect_store(prefix: str) -> Store:
    """A connection of its own to the store of the process group: a wait in another connection does not block it."""
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store().clone())


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because a process died. The error does not name which. (gloo's errors have no
    type.)
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
