"""Fast passes over rows of logits on an NVIDIA GPU; `usable` says when they can take the place of torch's operators.

`rows` needs Triton, which comes with torch's CUDA builds, and is imported by whoever found something usable. On a CPU
the same kernels run only through Triton's interpreter, in tests (`interpreted`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_interpreted = False
_off = False


def usable(*logits_nV: Tensor) -> bool:
    """Can the kernels read all of these? They must be float32 on the current CUDA device, with contiguous rows."""
    if _off or not all(_interpreted or (z.is_cuda and z.get_device() == torch.cuda.current_device())
                       for z in logits_nV):
        return False
    if not all(z.dtype == torch.float32 and z.dim() == 2 and z.shape[0] > 0 and z.stride(1) == 1 for z in logits_nV):
        return False
    return _has_triton() and (_interpreted or all(_works(z.get_device()) for z in logits_nV))


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Use the kernels for tensors of the CPU: very slow. TRITON_INTERPRET=1 must have been set before `rows` came."""
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
def _works(index: int) -> bool:
    """Do the kernels compile and count right on this device? Asked once; if not, torch's operators take their place."""
    try:
        from selftaught.kernels import rows

        rows.check(torch.device("cuda", index))
    except Exception as error:  # whatever a compiler or a driver raises: the run goes on without them
        warnings.warn(f"the kernels for divergences do not run on cuda:{index}, torch's slower operators take their "
                      f"place: {error}", stacklevel=2)
        return False
    return True


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
