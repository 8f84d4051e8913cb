"""The C library's heap, told which blocks to keep; memory that is taken again; and matrices that lie in a row.

A block that is mapped by itself is returned when freed, and the kernel hands out zeroed pages anew for the next one:
for a layer's activations that takes a quarter of the time of the product that fills them. One that lies on the heap
is used again, and stays with the process among smaller blocks. glibc moves the border between the two by itself as
larger blocks are freed, up to 32 MiB. Here it is fixed above a layer's tensors and below the vocabulary's, and the end
of the heap is kept. Steps of a 135M model: from 4 MiB 10.5 to 11.3 s in 2.92 GB, from 16 MiB 10.1 to 10.3 s in 2.93 GB:
by then 64 rows of its vocabulary are used again, too; larger chunks come from `again`. Who wants it otherwise sets
MALLOC_MMAP_THRESHOLD_, in bytes.

torch asks for memory at multiples of 64 bytes, for which glibc looks for a hole that is 96 bytes larger: one that a
layer's passing tensor has left is too small for every tensor of that shape, and stays empty among what is kept for the
backward pass. `empty` asks for 16 bytes, which any hole has. Beside torch's own: 2.98 GB without it, 2.92 with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAPPED_FROM = 2**24  # bytes
KEPT = 2**30  # bytes, free at the end of the heap
PAGE = 2**21  # bytes of a large page
SMALL = 2**14  # numbers that leave no hole to speak of
LINE = 16  # numbers of a line of the cache
_BYTES = 4  # of a number
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_blocks: list[NDArray[np.uint8]] = []
_keeping = 0
_lock = threading.Lock()


def fix_heap() -> bool:
    """Fix the size from which blocks are mapped, and keep the heap's end; False where the C library cannot.

    A size that the user has chosen, by MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES, stays.
    """
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        told = ctypes.CDLL(None).mallopt
        return all(told(*pair) == 1 for pair in ((_M_MMAP_THRESHOLD, MAPPED_FROM), (_M_TRIM_THRESHOLD, KEPT)))
    except AttributeError:  # another C library
        return False


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 on the CPU, in a hole of its very size if there is one."""
    if math.prod(shape) < SMALL:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return torch.from_numpy(np.empty(shape, np.float32))


def empty_lines(*shape: int) -> Tensor:
    """The same, from the border of a line of the cache on, where products read and write faster."""
    numbers = math.prod(shape)
    whole = np.empty(numbers + LINE, np.float32)
    start = -whole.ctypes.data // _BYTES % LINE
    return torch.from_numpy(whole[start : start + numbers].reshape(shape))  # no view of another tensor


def empty_like(x: Tensor) -> Tensor:
    """The same, of the shape of x, a dense tensor of float32 on the CPU, and in its order of memory."""
    if x.is_contiguous() or x.numel() < SMALL:
        return empty(*x.shape) if x.is_contiguous() else torch.empty_like(x)
    axes = sorted(range(x.dim()), key=x.stride, reverse=True)
    return torch.from_numpy(np.empty([x.shape[axis] for axis in axes], np.float32).transpose(np.argsort(axes)))


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Inside this block, or one around it, `again` takes memory again."""
    global _keeping
    with _lock:
        _keeping += 1
    try:
        yield
    finally:
        with _lock:
            _keeping -= 1
            if not _keeping:
                _blocks.clear()


def again(*shape: int) -> Tensor:
    """Uninitialised float32 on the CPU; what is mapped in the memory of an earlier one that nobody holds any more.

    The kernel zeroes every page of a new one.
    """
    numbers = math.prod(shape)
    with _lock:
        if not _keeping or numbers * _BYTES < MAPPED_FROM:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        idle = [block for block, count in zip(_blocks, _references(_blocks), strict=True)
                if count == _idle and block.size >= numbers * _BYTES + PAGE]
        if not idle:
            idle = [_mapped(numbers)]
            _blocks.append(idle[0])
        return torch.from_numpy(_numbers(min(idle, key=len), numbers).reshape(shape))


def _references(blocks: list[NDArray[np.uint8]]) -> list[int]:
    return [sys.getrefcount(blocks[number]) for number in range(len(blocks))]


_idle = _references([np.empty(1, np.uint8)])[0]  # of a block that nobody uses, however this interpreter counts


def _mapped(numbers: int) -> NDArray[np.uint8]:
    """Memory for so many, and a page more; in pages of 2 MiB if the kernel has them."""
    memory = mmap.mmap(-1, numbers * _BYTES + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # of a system, or a kernel, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _numbers(block: NDArray[np.uint8], numbers: int) -> NDArray[np.float32]:
    """The first of the block, from the border of a page."""
    start = -block.ctypes.data % PAGE
    return block[start : start + numbers * _BYTES].view(np.float32)


def in_a_row(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the matrices of float32 on a CPU that lie one behind the other, in the order given.

    Each has a storage of its own, of which nobody sees that it borders on another's. Large ones are left out: their
    products gain nothing, and their memory is better mapped one by one.
    """
    small = {name: x for name, x in tensors.items() if x.is_cpu and x.dtype == torch.float32 and x.dim() == 2
             and x.numel() * x.itemsize < MAPPED_FROM}
    ends = [0, *accumulate(x.numel() for x in small.values())]
    block = np.empty(ends[-1], np.float32)
    return {name: torch.from_numpy(block[start:end]).view(x.shape).copy_(x)
            for (name, x), (start, end) in zip(small.items(), pairwise(ends), strict=True)}


def together(*parts: Tensor) -> Tensor | None:
    """Matrices (M, K) of float32 on a CPU as one of all their rows, if each lies behind the one before; else None.

    It owns nothing: it is to be used while the parts are held. What is written to it is in them.
    """
    at, width = parts[0].data_ptr(), parts[0].shape[1]
    for x in parts:
        if not (x.is_cpu and x.dtype == torch.float32 and x.dim() == 2 and x.shape[1] == width and x.is_contiguous()
                and x.data_ptr() == at):
            return None
        at += x.numel() * x.itemsize
    return _matrix_at(parts[0].data_ptr(), sum(x.shape[0] for x in parts), width)


@lru_cache(2**12)  # it is looked for in every pass, and holds nothing
@torch.inference_mode(False)
def _matrix_at(address: int, rows: int, width: int) -> Tensor:
    memory = (ctypes.c_float * (rows * width)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, width)
