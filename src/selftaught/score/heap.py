"""The C library's heap, told which blocks to keep and which to give back.

A block that is mapped by itself is returned when freed, and the kernel hands out zeroed pages anew for the next one:
for a layer's activations that takes a quarter of the time of the product that fills them. One that lies on the heap
is used again, and stays with the process among smaller blocks. glibc moves the border between the two by itself as
larger blocks are freed, up to 32 MiB. Here it is fixed above a layer's tensors and below the vocabulary's, and the end
of the heap is kept. Steps of a 135M model: from 1 MiB 14.8 to 15.8 s in 3.17 GB, from 4 MiB with the end kept 13.3 to
13.8 s in 3.25 GB, from 32 MiB 13.5 to 14.1 s in 3.34 GB. Who wants it otherwise sets MALLOC_MMAP_THRESHOLD_, in bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

MAPPED_FROM = 2**22  # bytes
KEPT = 2**30  # bytes, free at the end of the heap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_fixed = False


def give_back() -> None:
    """Return the heap's free pages, if it was fixed here: what one phase has left lies in holes of the next one."""
    if _fixed:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def fix_heap() -> bool:
    """Fix the size from which blocks are mapped, and keep the heap's end; False where the C library cannot.

    A size that the user has chosen, by MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES, stays.
    """
    global _fixed
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        _fixed = all(library.mallopt(*pair) == 1 for pair in ((_M_MMAP_THRESHOLD, MAPPED_FROM),
                                                              (_M_TRIM_THRESHOLD, KEPT)))
    except AttributeError:  # another C library
        _fixed = False
    return _fixed
