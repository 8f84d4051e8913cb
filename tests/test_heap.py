"""The heap: which blocks stay, and in which holes tensors are put."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from selftaught import heap


def test_the_heap_is_fixed_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    library = SimpleNamespace(mallopt=lambda what, size: asked.append((what, size)) or 1)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert heap.fix_heap() and asked == [(-3, heap.MAPPED_FROM), (-1, heap.KEPT)]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1048576")
    assert not heap.fix_heap() and len(asked) == 2
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())  # a library without mallopt
    assert not heap.fix_heap()


REUSE = """
from selftaught import heap
assert heap.fix_heap()
kept = [heap.empty(3, 2**16) for _ in range(40)]
holes = {x.data_ptr() for x in kept[20:40:2]}
del kept[20:40:2]
again = [heap.empty(3, 2**16) for _ in range(10)]
print(len(holes & {x.data_ptr() for x in again}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of another C library")
def test_a_tensor_takes_the_hole_that_one_of_its_shape_has_left() -> None:
    ran = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True)
    assert ran.stdout == "10\n"


@pytest.mark.parametrize("shape", [(7,), (0, 5), (256, 129), (3, 200, 64)])
def test_an_empty_tensor_is_torch_s(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        ours = heap.empty(*shape)
    own = torch.empty(shape)
    assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (own.shape, own.stride(), own.dtype, own.device)


@pytest.mark.parametrize("size", [2, 200])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_one_like_another_has_its_order_of_memory(size: int, axes: tuple[int, ...]) -> None:
    x = torch.randn(3, size, 64).permute(axes)
    ours = heap.empty_like(x)
    assert (ours.shape, ours.stride()) == (x.shape, x.stride()) == (x.shape, torch.empty_like(x).stride())
