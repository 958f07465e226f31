"""How malloc treats the memory of freed tensors, for training on CPUs."""

import ctypes
import os

PARAMETERS = {
    -3: 2**30,  # M_MMAP_THRESHOLD: smaller blocks come from the heap
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: free memory that the heap keeps
    -2: 2**26,  # M_TOP_PAD: by how much the heap grows
}
"""Of glibc's mallopt: bytes by parameter."""

VARIABLES = {
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
}
"""By which a user sets them."""


def keep_freed_memory() -> None:
    """From now on this process keeps freed memory for its next tensors.

    By default glibc returns large blocks to the kernel, which then has to provide every page of the next step's
    activations again. Does nothing where the user has set malloc's parameters, or has another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or VARIABLES & os.environ.keys():
        return
    for parameter, size in PARAMETERS.items():
        mallopt(parameter, size)
