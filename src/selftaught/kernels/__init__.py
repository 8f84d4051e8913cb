"""Fast passes over rows of logits on an NVIDIA GPU; `usable` says when they can take the place of torch's operators.

`rows` needs Triton, which comes with torch's CUDA builds, and is imported by whoever found something usable. On a CPU
the same kernels run only through Triton's interpreter, in tests (`interpreted`).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_interpreted = False
_off = False


def usable(*logits_nV: Tensor) -> bool:
    """Can the kernels read all of these? They must be float32 on a CUDA device, with contiguous rows."""
    if _off or not all(z.is_cuda or _interpreted for z in logits_nV):
        return False
    return _has_triton() and all(z.dtype == torch.float32 and z.dim() == 2 and z.shape[0] > 0 and z.stride(1) == 1
                                 for z in logits_nV)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Use the kernels for tensors of the CPU: very slow. TRITON_INTERPRET=1 must have been set before `rows` came in."""
    global _interpreted
    _interpreted, before = True, _interpreted
    try:
        yield
    finally:
        _interpreted = before


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Use torch's operators alone, to compare with."""
    global _off
    _off, before = True, _off
    try:
        yield
    finally:
        _off = before


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
