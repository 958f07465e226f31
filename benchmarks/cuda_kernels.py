"""A model of what an operator launches on a CUDA device, and of the bytes that it moves.

Kernels: a view or an allocation launches nothing; an operator on lists of tensors (`_foreach_...`) as many as torch's
multi-tensor kernels need; any other operator one, unless `RULES` says otherwise.
Bytes: an operator that launches something reads its tensor arguments once and writes its results once. `RULES` adds the
second passes of batch norm, convolution and gathering. Caches and workspaces are not counted.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload


class Kernel(NamedTuple):
    """One launch."""

    name: str
    bytes: int
    """Read and written."""


Expansion = Callable[[tuple, dict, Any], list[Kernel]]

EXPANSIONS: dict[str, Expansion] = {}
"""Custom operators by name ("nvae::batch_norm") -> (arguments, keyword arguments, result) -> the kernels of their CUDA
branch. A kernel whose name is in `COLLECTIVES` counts as a collective too."""

COLLECTIVES = {
    "allreduce_": 0,
    "allgather_": 1,
    "_allgather_base_": 1,
    "broadcast_": 0,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
}
"""Operators of the process group, and the number of the argument that a rank contributes."""

FREE = {
    *("_unsafe_view", "_reshape_alias", "detach", "detach_", "alias", "lift_fresh", "lift", "record_stream"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
}
"""Operators that launch nothing, besides views (whose schema says so)."""

OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
"""Operators that do not read the tensor that they write."""

Rule = Callable[[tuple, Any], tuple[int, int]]


def _convolution(args: tuple, out: Tensor) -> tuple[int, int]:
    has_bias = args[2] is not None  # cuDNN convolves; a kernel of its own adds the bias
    return 1 + has_bias, 2 * tensor_bytes(out) * has_bias


def _convolution_backward(args: tuple, out: Any) -> tuple[int, int]:
    launches = sum(args[-1])  # the gradients of input, weight and bias that the mask asks for; each reads dy
    return launches, (launches - 1) * tensor_bytes(args[0])


def _batch_norm(args: tuple, out: Any) -> tuple[int, int]:
    # In training: moments, running statistics, affine map.
    return (3, tensor_bytes(args[0])) if args[5] else (1, 0)


def _batch_norm_backward(args: tuple, out: Any) -> tuple[int, int]:
    return 2, tensor_bytes(args[0]) + tensor_bytes(args[1])  # sums over dy and x; then dx


def _cat(args: tuple, out: Any) -> tuple[int, int]:
    return ceil(len(args[0]) / 128), 0


def _all_gather(args: tuple, out: Any) -> tuple[int, int]:
    results = len(args[0][0])  # NCCL gathers into one tensor, from which the list is copied
    return 1 + results, 2 * results * sum(map(tensor_bytes, args[1]))


RULES: dict[str, Rule] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_batch_norm_backward": _batch_norm_backward,
    "aten::cat": _cat,
    "aten::stack": _cat,
    "aten::constant_pad_nd": lambda args, out: (2, tensor_bytes(out)),  # fill, copy
    "aten::upsample_bilinear2d_backward": lambda args, out: (2, tensor_bytes(out)),
    "c10d::allgather_": _all_gather,
}
"""(arguments, result) -> launches, and the bytes of passes over data that the operator's signature does not show."""


def _vectors(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Of one number per channel."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(x.new_empty(x.shape[1], dtype=dtype) for _ in range(count))


CUDA_ONLY: dict[str, Callable[[tuple], Any]] = {
    "aten::batch_norm_stats": lambda args: _vectors(args[0], 2),
    "aten::batch_norm_gather_stats_with_counts": lambda args: _vectors(args[0], 2),
    "aten::batch_norm_elemt": lambda args: torch.empty_like(args[0]),
    "aten::batch_norm_backward_reduce": lambda args: _vectors(args[0], 4),
    "aten::batch_norm_backward_elemt": lambda args: torch.empty_like(args[0]),
}
"""Operators that exist on CUDA only, and not for fake tensors: arguments -> what they return."""

CHUNK = 65_536  # elements of one block of a multi-tensor kernel (ATen/native/cuda/MultiTensorApply.cuh)
MAX_BLOCKS = 320
MAX_TENSORS = (110, 64, 48, 36, 30)  # by the number of lists
MAX_TENSORS_WITH_SCALARS = (96, 64, 48, 36, 30)  # where each tensor has a scalar of its own


def multi_tensor_launches(sizes: list[int], max_tensors: int) -> int:
    """Launches of a multi-tensor kernel over tensors of these sizes: one is full with `max_tensors` tensors or
    `MAX_BLOCKS` chunks, and a tensor that does not fit continues in the next one.
    """
    launches = tensors = blocks = 0
    for size in sizes:
        if not size:
            continue
        tensors += 1
        chunks = ceil(size / CHUNK)
        full, rest = divmod(blocks + chunks, MAX_BLOCKS)
        launches += full
        if full:
            tensors = 1 if rest else 0
        blocks = rest
        if tensors == max_tensors:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + bool(blocks)


def _foreach(name: str, args: tuple) -> int:
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    if name.startswith("_foreach_") and not takes_fast_route(lists, may_cast=name == "_foreach_copy_"):
        return len(lists[0])
    scalars = any(isinstance(value, (list, tuple)) and value and not isinstance(value[0], Tensor) for value in args)
    depth = len(lists) + (not name.endswith("_") and name != "_foreach_norm")  # results are a list too
    limits = MAX_TENSORS_WITH_SCALARS if scalars else MAX_TENSORS
    launches = multi_tensor_launches([tensor.numel() for tensor in lists[0]], limits[min(depth, 5) - 1])
    return launches + (name == "_foreach_norm")  # a second kernel combines the chunks


def takes_fast_route(lists: list[Sequence[Tensor]], may_cast: bool = False) -> bool:
    """Whether torch uses multi-tensor kernels; else it takes the tensors one by one (ATen/native/ForeachUtils.h).

    All tensors need one dtype (`may_cast`: one in each list), and those at one place in the lists one shape and layout.
    """
    dtypes = [{tensor.dtype for tensor in tensors} for tensors in lists]
    uniform = all(len(found) == 1 for found in dtypes) if may_cast else len(set().union(*dtypes)) == 1
    layouts = ({_layout(tensor) for tensor in tensors} for tensors in zip(*lists, strict=True))
    return uniform and all(len(found) == 1 for found in layouts)


def _layout(tensor: Tensor) -> tuple:
    """Shape, and the strides that matter."""
    strides = (stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    return tuple(tensor.shape), tuple(strides)


def kernels(func: OpOverload, args: tuple, kwargs: dict, out: Any) -> list[Kernel]:
    """What the call launches. The first kernel has the bytes of all."""
    name = func._schema.name
    short = name.partition("::")[2]
    if name in EXPANSIONS:
        return EXPANSIONS[name](args, kwargs, out)
    if func.is_view or short in FREE or not name.startswith(("aten::", "c10d::")):
        return []
    launches, extra = 1, 0
    if short.startswith(("_foreach_", "_fused_")):
        launches = _foreach(short, args)
    elif name in RULES:
        launches, extra = RULES[name](args, out)
    moved = bytes_moved(func, args, kwargs, out) + extra
    return [Kernel(short, 0 if number else moved) for number in range(launches)]


def bytes_moved(func: OpOverload, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes of all tensor arguments that the operator reads, and of all that it writes."""
    name = func._schema.name.partition("::")[2]
    read = written = 0
    results = {id(tensor): tensor for tensor in tensors_in(out)}
    for declared, value in zip(func._schema.arguments, args, strict=False):
        is_written = declared.alias_info is not None and declared.alias_info.is_write
        for tensor in tensors_in(value):
            if is_written:
                results[id(tensor)] = tensor
            if not (is_written and name in OVERWRITES):
                read += tensor_bytes(tensor)
    read += sum(map(tensor_bytes, tensors_in(kwargs)))
    written = sum(map(tensor_bytes, results.values()))
    return read + written


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements in memory: those that an expanded tensor repeats count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()
