"""What kind of processor this is, as far as it decides which library multiplies fastest and what code may run."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from pathlib import Path


@cache
def kind() -> str:
    """What `-march=native` depends on, so that a home folder may be shared by machines of several kinds."""
    told = ("vendor", "flags", "Features", "model", "CPU ")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(told)}))
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


@cache
def is_intel() -> bool:
    """Is torch's usual library for matrices, Intel's own, at home here? On other processors it takes slower kernels."""
    return "GenuineIntel" in kind()
