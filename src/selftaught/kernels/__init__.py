"""Fast passes over rows of logits; `usable` says when they can take the place of torch's operators, `rows_of` has them.

On an NVIDIA GPU they are `rows`, which needs Triton, that comes with torch's CUDA builds; on a CPU `cpu_rows`, which
needs a C compiler. Triton's interpreter runs `rows` on a CPU, in tests (`interpreted`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from selftaught.kernels import loops
from selftaught.kernels.base import is_off, off

__all__ = ["interpreted", "off", "rows_of", "usable"]

_interpreted = False


def usable(*logits_nV: Tensor) -> bool:
    """Can the kernels read all of these? They must be float32, on a CPU or the current CUDA device, and whole rows."""
    if is_off() or not all(z.dtype == torch.float32 and z.dim() == 2 and z.shape[0] > 0 and z.stride(1) == 1
                           for z in logits_nV):
        return False
    if _interpreted or not all(z.is_cpu for z in logits_nV):
        return _has_triton() and all(_interpreted or _works_on(z) for z in logits_nV)
    return loops.usable(*logits_nV)


def rows_of(logits_nV: Tensor) -> Any:
    """The kernels that read these, which are usable: the module `rows`, or `cpu_rows`."""
    by_loops = logits_nV.is_cpu and not _interpreted
    return importlib.import_module("selftaught.kernels.cpu_rows" if by_loops else "selftaught.kernels.rows")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Use the kernels for tensors of the CPU: very slow. TRITON_INTERPRET=1 must have been set before `rows` came."""
    global _interpreted
    _interpreted, before = True, _interpreted
    try:
        yield
    finally:
        _interpreted = before


def _works_on(z: Tensor) -> bool:
    return z.is_cuda and z.get_device() == torch.cuda.current_device() and _works(z.get_device())


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
