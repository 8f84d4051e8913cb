"""The C library's heap, told to give back what is freed.

glibc raises the size from which a block is mapped by itself as a program frees larger blocks, up to 32 MiB. Activations
then lie on its heap among smaller blocks, and what a backward pass frees stays with the process: half a gigabyte of
a step of a 135M model. With a fixed size the larger ones are mapped, and returned when freed; the price is that the
kernel hands out zeroed pages anew. At 256 KiB that is a quarter of the time of such an update (13.3 against 10.5 s,
3.02 against 3.30 GB), at 1 MiB hardly anything. Who wants it otherwise sets MALLOC_MMAP_THRESHOLD_, in bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys

MAPPED_FROM = 2**20  # bytes
_M_MMAP_THRESHOLD = -3  # of malloc.h


def return_freed() -> bool:
    """Fix the size from which blocks are mapped; False where the C library has no such setting.

    A size that the user has chosen, by MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES, stays.
    """
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM) == 1
    except AttributeError:  # another C library
        return False
