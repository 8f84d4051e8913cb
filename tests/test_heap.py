"""The heap: which blocks stay, and in which holes tensors are put."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from selftaught import heap
from selftaught.heap import MAPPED_FROM, again, keeping
from selftaught.loss import chunked_loss
from selftaught.records import TokenLoss
from selftaught.vocabulary import Head


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


def test_memory_is_taken_again_only_of_tensors_that_nobody_holds() -> None:
    rows = 2 * MAPPED_FROM // 4096
    with keeping():
        one, other = again(rows, 1024), again(rows, 1024)
        first, second = one.data_ptr(), other.data_ptr()
        assert first != second
        part = one[3:5]
        del one
        third = again(rows, 1024)  # the part holds the first
        assert third.data_ptr() not in (first, second)
        del part
        shorter = again(rows - 1, 1024)
        assert shorter.data_ptr() == first and shorter.shape == (rows - 1, 1024)
        detached = other.requires_grad_().detach()
        del other
        assert again(rows, 1024).data_ptr() != second
        assert detached.fill_(1.0).sum() == detached.numel()
        with keeping():
            del detached
        assert again(rows, 1024).data_ptr() == second  # the inner block has forgotten nothing
    shorter.fill_(2.0)  # outlives the block
    assert heap._blocks == []


def test_a_chunked_loss_is_the_same_in_memory_that_is_taken_again() -> None:
    V, H, N = MAPPED_FROM // (4 * 64) + 1000, 8, 150
    draw = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=draw)
    states, tokens = torch.randn(N, H, generator=draw), torch.randint(V, (N,), generator=draw)
    found = []
    for chunk in (None, 16):  # of several chunks above what is mapped; of none
        hidden, weight = states.clone().requires_grad_(), head.clone().requires_grad_()
        loss = chunked_loss(lambda student, views, credit: TokenLoss(-student.at_sampled), {"student": hidden},
                            {"student": Head(weight)}, tokens, {}, torch.ones(N), chunk=chunk).loss
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
