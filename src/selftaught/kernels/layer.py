"""Decoder layers by the loops: those of a decoding step (`cpu/decoding.c`) all in one call, or each in two.

Threads wait for Python less often: with a call for each of its parts the layers of a 135M model took 31 to 35 ms for
16 rows, with two for each layer 28; elsewhere 64 tokens took 4.98 s so, and 4.15 with one call for all of them.
Shapes: B rows, which are the last axis, H hidden, I inner width, D of one head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selftaught.heap import empty, empty_like
from selftaught.kernels import loops
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


class Parts(NamedTuple):
    """All numbers of a layer: norm, projections to query, key and value, norms of the first two by head, if any, then
    what `after` takes. All is contiguous."""

    norm: Norm
    projections: Sequence[Linear]
    of_heads: Sequence[Norm]
    out: Linear
    between: Norm
    gate: Tensor
    up: Tensor
    down: Tensor

    def heads(self, width: int) -> list[int]:
        """Of queries, keys and values."""
        return [linear.weight.shape[0] // width for linear in self.projections]


def before(x_HB: Tensor, parts: Parts, cos_BD: Tensor, sin_BD: Tensor) -> list[Tensor]:
    """Query (Hq, B, D), key and value (Hkv, B, D): the projections of x after its norm.

    Query and key are normed by head, if there are norms for it, and rotated. All is contiguous.
    """
    rows, width = cos_BD.shape
    out = [x_HB.new_empty(count, rows, width) for count in parts.heads(width)]
    room = x_HB.new_empty(_room_before(parts, rows, width))
    library().before(ctypes.byref(_before(x_HB, parts, cos_BD, sin_BD, room, out)))
    return out


def after(seen_BK: Tensor, x_HB: Tensor, parts: Parts) -> Tensor:
    """The rest of the layer from what its attention has seen: y = x + W seen + b, then y + D (silu(G n) U n), (H, B).

    n is y after the norm; G, U (I, H) and D (H, I). All is contiguous.
    """
    out, room = torch.empty_like(x_HB), x_HB.new_empty(_room_after(parts, x_HB.shape[1]))
    library().after(ctypes.byref(_after(seen_BK, x_HB, parts, room, out)))
    return out


def norm_turned(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x (w + offset) / sqrt(mean(x^2) + eps), over the axis before the last: (..., H, B)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, room, (height, rows) = empty_like(x), x.new_empty(x.shape[-1]), x.shape[-2:]
    library().norm_turned(*map(_at, (x, weight, y, room)), x.numel() // (height * rows), height, rows, eps, offset)
    return y


def normed(x_nH: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x w / sqrt(mean(x^2) + eps), (n, H), and that root's inverse, (n, 1); x becomes x + what is `added` before.

    All is contiguous.
    """
    y, root, (n, width) = empty(*x_nH.shape), x_nH.new_empty(x_nH.shape[0], 1), x_nH.shape
    library().normed(_at(x_nH), None if added is None else _at(added), *map(_at, (weight, root, y)), n, width, eps,
                     torch.get_num_threads())
    return y, root


def rotate_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of x (heads, D, B) by cos and sin (B, D), turned back: (heads, B, D)."""
    heads, width, rows = x.shape
    out = x.new_empty(heads, rows, width)
    library().rotate_turned(*map(_at, (x, cos, sin, out)), heads, width, rows)
    return out


class Stack:
    """Layers that follow one another, in one call for a token of every row."""

    def __init__(self, layers: Sequence[tuple[Parts, float, int | None]], held: Sequence[loops.Held],
                 width: int) -> None:
        """Of each layer its parts, scaling and window, and what it attends to.

        It knows where all of that lies, and holds nothing of it but room: when anything has moved it must be made anew.
        """
        parts = [each for each, _, _ in layers]
        rows, height = held[0].held_k.shape[1], parts[0].norm.weight.shape[0]
        new = parts[0].norm.weight.new_empty
        most = [max(counts) for counts in zip(*(each.heads(width) for each in parts), strict=True)]
        self._x, self._cos, self._sin = new(height, rows), new(rows, width), new(rows, width)
        between, made = new(2, height, rows), [new(count, rows, width) for count in most]
        seen, scores = new(rows, most[0], width), max(map(loops.scores_of, held), key=Tensor.numel)
        room = new(max(max(_room_before(each, rows, width), _room_after(each, rows)) for each in parts))
        self._layers, x = (_Layer * len(layers))(), self._x
        for i, ((each, scaling, window), its, layer) in enumerate(zip(layers, held, self._layers, strict=True)):
            out = between[i % 2]
            layer.before = _before(x, each, self._cos, self._sin, room, made)
            layer.attention = loops.attention([part.data_ptr() for part in made], its, scores, seen,
                                              each.heads(width)[0], window, scaling)
            layer.after = _after(seen.view(-1)[: rows * each.out.weight.shape[1]].view(rows, -1), x, each, room, out)
            x = out
        self._out, self._room = x, (between, made, seen, scores, room)

    def step(self, x_HB: Tensor, cos_BD: Tensor, sin_BD: Tensor, written: int) -> Tensor:
        """What the last layer makes of x, (H, B), after so many tokens; keys and values of each row's are put down."""
        self._x.copy_(x_HB)
        self._cos.copy_(cos_BD)
        self._sin.copy_(sin_BD)
        library().decode(self._layers, len(self._layers), written)
        return self._out.clone()


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


class _Layer(ctypes.Structure):
    """As in cpu/decoding.c."""

    _fields_ = [("before", _Before), ("attention", loops.Attention), ("after", _After)]


def _room_before(parts: Parts, rows: int, width: int) -> int:
    height = parts.norm.weight.shape[0]
    return rows * (1 + height) + height * _padded(rows) + sum(parts.heads(width)) * (2 * width + 1) * rows


def _before(x_HB: Tensor, parts: Parts, cos: Tensor, sin: Tensor, room: Tensor, out: Sequence[Tensor]) -> _Before:
    rows, width = cos.shape
    norms = [parts.norm, *parts.of_heads]
    weights, biases = ((_POINTER * 3)(*map(_at, each)) for each in zip(*parts.projections, strict=True))
    return _Before(
        _at(x_HB), _at(parts.norm.weight), weights, biases, (_POINTER * 2)(*(_at(n.weight) for n in parts.of_heads)),
        _at(cos), _at(sin), _at(room), (_POINTER * 3)(*map(_at, out)), x_HB.shape[0], rows, width,
        (_SIZE * 3)(*parts.heads(width)), (_REAL * 3)(*(n.eps for n in norms)), (_REAL * 3)(*(n.offset for n in norms)),
        torch.get_num_threads())


def _room_after(parts: Parts, rows: int) -> int:
    (inner, height), width = parts.gate.shape, parts.out.weight.shape[1]
    return rows * (1 + 2 * (height + inner)) + max(height, inner, width) * _padded(rows)


def _after(seen_BK: Tensor, x_HB: Tensor, parts: Parts, room: Tensor, out: Tensor) -> _After:
    (inner, height), (rows, width) = parts.gate.shape, seen_BK.shape
    given = seen_BK, x_HB, *parts.out, parts.between.weight, parts.gate, parts.up, parts.down, room, out
    return _After(*map(_at, given), height, inner, width, rows, parts.between.eps, parts.between.offset,
                  torch.get_num_threads())


def _at(x: Tensor | None) -> int | None:
    """Where it lies; whoever asks holds it until the loop has returned."""
    return None if x is None else x.data_ptr()


def _padded(rows: int) -> int:
    """In whole panels."""
    return -(-rows // PANEL) * PANEL
