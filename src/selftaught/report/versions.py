"""What a run was computed with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "selftaught", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "reasoning-gym",
    "math-verify", "peft", "vllm", "ray",
)  # fmt: skip


def versions() -> dict[str, str | int | list[str]]:
    """Versions of Python and of the packages that bear on a run's numbers, the platform, the processors, the loops."""
    import torch

    from selftaught.kernels import loops

    found: dict[str, str | int | list[str]] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["platform"] = platform.platform()
    found["cpu"] = _cpu_name()
    found["cpu_count"] = os.cpu_count() or 1
    found["torch_threads"] = torch.get_num_threads()
    found["cpu_loops"] = "compiled" if loops.usable() else "none"
    if torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
