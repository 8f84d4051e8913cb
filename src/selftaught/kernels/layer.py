"""A decoder layer of a decoding step in two calls, before and after its attention, by the loops of `cpu/decoding.c`.

With a call for each of its parts the layers of a 135M model took 31 to 35 ms for 16 rows, with two 28: threads wait
for Python less often.
Shapes: B rows, which are the last axis, H hidden, I inner width, D of one head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selftaught.kernels.loops import PANEL, library


class Norm(NamedTuple):
    """x (weight + offset) / sqrt(mean(x^2) + eps)."""

    weight: Tensor
    eps: float
    offset: float


class Linear(NamedTuple):
    """W x + b, or W x: (M, K), (M,)."""

    weight: Tensor
    bias: Tensor | None


def before(x_HB: Tensor, norm: Norm, projections: Sequence[Linear], of_heads: Sequence[Norm], cos_BD: Tensor,
           sin_BD: Tensor) -> list[Tensor]:
    """Query (Hq, B, D), key and value (Hkv, B, D): the projections of x after its norm.

    Query and key are normed by head, if there are norms for it, and rotated. All is contiguous.
    """
    (rows, width), height = cos_BD.shape, x_HB.shape[0]
    heads = [linear.weight.shape[0] // width for linear in projections]
    out = [x_HB.new_empty(count, rows, width) for count in heads]
    room = x_HB.new_empty(rows * (1 + height) + height * _padded(rows) + sum(heads) * (2 * width + 1) * rows)
    norms = [norm, *of_heads]
    weights, biases = ((_POINTER * 3)(*map(_at, each)) for each in zip(*projections, strict=True))
    library().before(ctypes.byref(_Before(
        _at(x_HB), _at(norm.weight), weights, biases, (_POINTER * 2)(*(_at(n.weight) for n in of_heads)), _at(cos_BD),
        _at(sin_BD), _at(room), (_POINTER * 3)(*map(_at, out)), height, rows, width, (_SIZE * 3)(*heads),
        (_REAL * 3)(*(n.eps for n in norms)), (_REAL * 3)(*(n.offset for n in norms)), torch.get_num_threads())))
    return out


def after(seen_BK: Tensor, x_HB: Tensor, projection: Linear, norm: Norm, gate: Tensor, up: Tensor, down: Tensor
          ) -> Tensor:
    """The rest of the layer from what its attention has seen: y = x + W seen + b, then y + D (silu(G n) U n), (H, B).

    n is y after the norm; G, U (I, H) and D (H, I). All is contiguous.
    """
    (height, rows), (inner, width) = x_HB.shape, (gate.shape[0], seen_BK.shape[1])
    out = torch.empty_like(x_HB)
    room = x_HB.new_empty(rows * (1 + 2 * (height + inner)) + max(height, inner, width) * _padded(rows))
    library().after(ctypes.byref(_After(
        *map(_at, (seen_BK, x_HB, *projection, norm.weight, gate, up, down, room, out)), height, inner, width, rows,
        norm.eps, norm.offset, torch.get_num_threads())))
    return out


_POINTER, _SIZE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Before(ctypes.Structure):
    """As in cpu/decoding.c."""

    _fields_ = [
        ("x", _POINTER), ("norm", _POINTER), ("w", _POINTER * 3), ("bias", _POINTER * 3), ("of", _POINTER * 2),
        ("cos", _POINTER), ("sin", _POINTER), ("room", _POINTER), ("out", _POINTER * 3), ("H", _SIZE), ("B", _SIZE),
        ("D", _SIZE), ("heads", _SIZE * 3), ("eps", _REAL * 3), ("offset", _REAL * 3), ("threads", ctypes.c_int),
    ]  # fmt: skip


class _After(ctypes.Structure):
    """As in cpu/decoding.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("seen", "x", "o", "bias", "norm", "gate", "up", "down", "room", "out")),
        *((name, _SIZE) for name in ("H", "I", "K", "B")), ("eps", _REAL), ("offset", _REAL),
        ("threads", ctypes.c_int),
    ]  # fmt: skip


def _at(x: Tensor | None) -> int | None:
    """Where it lies; whoever asks holds it until the loop has returned."""
    return None if x is None else x.data_ptr()


def _padded(rows: int) -> int:
    """In whole panels."""
    return -(-rows // PANEL) * PANEL
