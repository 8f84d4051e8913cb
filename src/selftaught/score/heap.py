"""The C library's heap, told to give back what is freed.

glibc raises the size from which a block is mapped by itself as a program frees larger blocks, up to 32 MiB. Activations
then lie on its heap among smaller blocks, and what a backward pass frees stays with the process: half a gigabyte of
a step of a 135M model. With a fixed size they are mapped, and returned when freed;
the price is that the kernel hands out zeroed pages anew, a fifth of the time of such an update. Who has the memory and
wants the time sets MALLOC_MMAP_THRESHOLD_=33554432.
"""

from __future__ import annotations

import ctypes
import os
import sys

MAPPED_FROM = 2**18  # bytes; activations of a few hundred tokens are larger
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
