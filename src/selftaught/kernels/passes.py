"""Passes of packed sequences by the loops: their attention (`cpu/attention.c`), and whole decoder layers, forward and
back, each in one call (`cpu/passes.c`).

Such a layer's products are those of the library by which torch multiplies, where that is Intel's own on its own
processor; elsewhere `score.layers` calls one part after the other, with the same numbers.

Shapes: n tokens of a pass, H hidden, I inner width, D of one head, Q = Hq D, A = (Hq + 2 Hkv) D.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from selftaught.heap import LINE, again, empty, empty_lines
from selftaught.kernels.loops import BLOCK, STRIPE, library
from selftaught.processor import is_intel

_NUMBER = 4  # bytes
_FORTH, _BACK = (2, 1), (5, 2)  # matrices and stripes of scores that attention needs room for


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed pass lie: runs of tokens, causal among themselves, that see what is before whole.

    (5, sequences): start and length, how many first tokens of the pass it sees, start and length of its prompt. Those
    of one prompt follow one another.
    """

    sequences: Tensor

    @classmethod
    def of(cls, sequences: list[tuple[int, int, int, int, int]]) -> Layout:
        return cls(torch.tensor(sequences, dtype=torch.int64, device="cpu").view(-1, 5).t().contiguous())

    @cached_property
    def most(self) -> int:
        """Keys that a token sees at most."""
        return int(self.sequences[[1, 2, 4]].sum(0).max())

    @cached_property
    def longest(self) -> int:
        """Keys before a sequence's own, at most."""
        return int(self.sequences[[2, 4]].sum(0).max())

    @cached_property
    def places(self) -> list[int]:
        """Where its five rows lie."""
        return [row.data_ptr() for row in self.sequences]

    @cached_property
    def _parts(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _prompts(self) -> list[int]:
        """The first sequence of each prompt, and their number."""
        same = self.sequences[2:].t().tolist()
        return [*(i for i, it in enumerate(same) if not i or it != same[i - 1]), len(same)]

    def parts(self, kv_heads: int) -> Tensor:
        """The first sequence of each part, and their number: work for every thread, of sequences with one prompt."""
        pieces = -(-2 * torch.get_num_threads() // (kv_heads * (len(self._prompts) - 1)))
        if pieces not in self._parts:
            cuts = [first + (end - first) * piece // pieces
                    for first, end in pairwise(self._prompts) for piece in range(pieces)]
            self._parts[pieces] = torch.tensor([*dict.fromkeys(cuts), self._prompts[-1]], dtype=torch.int64,
                                               device="cpu")
        return self._parts[pieces]

    def room(self, width: int, kv_heads: int, pieces: int, wide: int, stripes: int) -> tuple[int, int]:
        """Threads that have work, of so many pieces for each key head, and numbers that each of them needs.

        `wide` matrices (keys, D) and `stripes` of scores.
        """
        most = -(-self.most // BLOCK) * BLOCK
        return min(torch.get_num_threads(), pieces * kv_heads), most * (wide * width + stripes * STRIPE)


class _Pass(ctypes.Structure):
    """As in cpu/passes.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "query", "key", "value", "grad", "out", "log_sum", "start", "length", "common", "prompt", "prompt_length",
            "first", "made", "sums", "of_query", "of_key", "of_value", "before", "room")),
        *((name, ctypes.c_int64) for name in (
            "sequences", "parts", "longest", "heads", "kv_heads", "tokens", "width", "space", "query_head",
            "query_token", "key_head", "key_token", "value_head", "value_token", "of_query_token",
            "of_key_token")),
        ("scaling", ctypes.c_float), ("threads", ctypes.c_int),
    ]  # fmt: skip


def attend_pass(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of a packed pass: query (Hq, T, D), key and value (Hkv, T, D) to (T, Hq, D) and log-sums (Hq, T)."""
    heads, tokens, width = query.shape
    made, sums = empty(tokens, heads, width), query.new_empty(heads, tokens)
    given, _room = _pass(query, key, value, layout, scaling, (layout.sequences.shape[1], *_FORTH))
    given.made, given.sums = _at(made, sums)
    library().attend_pass(ctypes.byref(given))
    return made, sums


def attend_pass_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
                         layout: Layout, scaling: float, joined: Tensor | None = None
                         ) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in the order of memory of (T, heads, D), from that of `attend_pass`.

    They are put into `joined` (T, Hq + 2 Hkv, D), one beside the other, if it is given.
    """
    tokens, width = query.shape[1:]
    counts = query.shape[0], key.shape[0], value.shape[0]
    made = [empty(tokens, n, width) for n in counts] if joined is None else joined.split(counts, 1)
    first = layout.parts(key.shape[0])
    before = empty(first.shape[0] - 1, key.shape[0], 2, layout.longest, width)
    given, _room = _pass(query, key, value, layout, scaling, (first.shape[0] - 1, *_BACK))
    given.grad, given.out, given.log_sum, given.first, given.before = _at(grad, out, sums, first, before)
    given.of_query, given.of_key, given.of_value = _at(*made)
    given.of_query_token, given.of_key_token = made[0].stride(0), made[1].stride(0)
    given.parts, given.longest = first.shape[0] - 1, layout.longest
    library().attend_pass_backward(ctypes.byref(given))
    return made[0].transpose(0, 1), made[1].transpose(0, 1), made[2].transpose(0, 1)


def _pass(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, pieces: tuple[int, int, int]
          ) -> tuple[_Pass, Tensor]:
    """What both directions are given, and the room that it points to, which must be held while they run."""
    heads, tokens, width = query.shape
    threads, space = layout.room(width, key.shape[0], *pieces)
    room = empty(threads, space)
    given = _Pass(threads=threads, scaling=scaling, sequences=layout.sequences.shape[1], heads=heads,
                  kv_heads=key.shape[0], tokens=tokens, width=width, space=space)
    given.query, given.key, given.value, given.room = _at(query, key, value, room)
    given.start, given.length, given.common, given.prompt, given.prompt_length = layout.places
    given.query_head, given.query_token = query.stride()[:2]
    given.key_head, given.key_token = key.stride()[:2]
    given.value_head, given.value_token = value.stride()[:2]
    return given, room


def _at(*tensors: Tensor) -> list[int]:
    """Where they lie; whoever asks holds them until the loop has returned."""
    return [x.data_ptr() for x in tensors]


# ------------------------------------------------------------------------------------------------- layers in one call


class Weights(NamedTuple):
    """A layer's: norms (H,), queries', keys' and values' (A, H), (H, Q), both factors' (2 I, H), (H, I); contiguous."""

    norm: Tensor
    between: Tensor
    heads: Tensor
    out: Tensor
    inner: Tensor
    down: Tensor


class Shape(NamedTuple):
    """What the weights do not say: of both norms, of queries and of keys, D, and what scores are multiplied with."""

    eps: tuple[float, float]
    counts: tuple[int, int]
    width: int
    scaling: float


class Kept(NamedTuple):
    """For the way back.

    Both norms' roots (n numbers), heads after rotation (n, A), what they have seen (n, Hq, D) and log-sums (Hq, n), the
    sum before the second norm (n, H), and both factors of the gated layer (n, 2 I).
    """

    root: Tensor
    at: Tensor
    seen: Tensor
    sums: Tensor
    middle: Tensor
    again: Tensor
    both: Tensor


class _Layer(ctypes.Structure):
    """As in cpu/passes.c."""

    _fields_ = [
        ("attention", _Pass),
        *((name, ctypes.c_void_p) for name in (
            "sgemm", "cos", "sin", *Weights._fields, "x", "root", "again", "at", "middle", "both", "result", "room",
            "grad", "of_x", "of_norm", "of_between", "of_heads", "of_out", "of_inner", "of_down")),
        *((name, ctypes.c_int64) for name in ("n", "H", "I", "Q", "A", "D")),
        ("eps", ctypes.c_float * 2), ("adds", ctypes.c_int * 4), ("threads", ctypes.c_int),
    ]  # fmt: skip


def take_layers() -> bool:
    """Are `forward` and `backward` the fastest here?"""
    return is_intel() and sgemm_address() is not None


@cache
def sgemm_address() -> int | None:
    """Where Intel's product lies in torch's own library, if it is in there."""
    try:
        own = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return ctypes.cast(own.SGEMM, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def forward(x: Tensor, cos: Tensor, sin: Tensor, weights: Weights, layout: Layout, shape: Shape, keeps: bool
            ) -> tuple[Tensor, Kept | None]:
    """The layer of x, (n, H), by angles (n, D), and what its way back needs, if that is to be kept."""
    (n, height), (queries, _), width = x.shape, shape.counts, shape.width
    inner, joined, wide = weights.down.shape[1], weights.heads.shape[0], weights.out.shape[1]
    threads, space = layout.room(width, shape.counts[1], layout.sequences.shape[1], *_FORTH)
    sizes = [n * joined, n * wide, n * height, n * queries, n, n]
    own = n * max(height, inner), threads * space
    if keeps:
        rest, both, room = empty_lines(sum(sizes)), empty_lines(n, 2 * inner), empty_lines(sum(own))
    else:
        parts = [-(-size // LINE) * LINE for size in (sum(sizes), 2 * n * inner, sum(own))]
        rest, both, room = again(sum(parts)).split(parts)
        both = both[: 2 * n * inner].view(n, 2 * inner)
    at, seen, middle, sums, root, second = rest[: sum(sizes)].split(sizes)
    kept = Kept(root, at.view(n, joined), seen.view(n, queries, width), sums.view(queries, n), middle.view(n, height),
                second, both)
    result = empty_lines(n, height)
    given = _layer(x, cos, sin, weights, kept, layout, shape)
    given.result, given.room = _at(result, room)
    attention = given.attention
    attention.made, attention.sums, attention.room = *_at(seen, sums), given.room + own[0] * _NUMBER
    attention.threads, attention.space = threads, space
    library().forward_layer(ctypes.byref(given))
    return result, kept if keeps else None


def backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weights: Weights, kept: Kept, layout: Layout,
             shape: Shape, into: Sequence[tuple[Tensor, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of both norms' weights from that of `forward`.

    Those of the matrices are put into what is given for them, in their order, or added to what is in it.
    """
    (n, height), width, (queries, keys) = x.shape, shape.width, shape.counts
    inner, joined, wide = weights.down.shape[1], weights.heads.shape[0], weights.out.shape[1]
    first = layout.parts(keys)
    threads, space = layout.room(width, keys, first.shape[0] - 1, *_BACK)
    before = (first.shape[0] - 1) * keys * 2 * layout.longest * width
    starts = [0, n * joined, *accumulate((
        n * max(2 * inner, joined + wide), n * max(height, inner) + n * height + torch.get_num_threads() * height,
        before, threads * space))]
    room, of_x = empty_lines(starts[-1]), empty_lines(n, height)
    of_norm, of_between = x.new_empty(height), x.new_empty(height)
    given = _layer(x, cos, sin, weights, kept, layout, shape)
    given.grad, given.of_x, given.of_norm, given.of_between, given.room = _at(grad, of_x, of_norm, of_between, room)
    given.of_heads, given.of_out, given.of_inner, given.of_down = (place.data_ptr() for place, _ in into)
    given.adds = (ctypes.c_int * 4)(*(adds for _, adds in into))
    attention, room_at = given.attention, [given.room + start * _NUMBER for start in starts]
    attention.out, attention.log_sum, attention.first = _at(kept.seen, kept.sums, first)
    attention.of_query, attention.grad, _, attention.before, attention.room, _ = room_at
    attention.of_key = attention.of_query + queries * width * _NUMBER
    attention.of_value = attention.of_key + keys * width * _NUMBER
    attention.of_query_token = attention.of_key_token = joined
    attention.parts, attention.longest = first.shape[0] - 1, layout.longest
    attention.threads, attention.space = threads, space
    library().backward_layer(ctypes.byref(given))
    return of_x, of_norm, of_between


def _layer(x: Tensor, cos: Tensor, sin: Tensor, weights: Weights, kept: Kept, layout: Layout, shape: Shape) -> _Layer:
    """What both directions are given."""
    (n, height), (queries, keys), width = x.shape, shape.counts, shape.width
    joined, at = weights.heads.shape[0], kept.at.data_ptr()
    places = (at + heads * width * _NUMBER for heads in (0, queries, queries + keys))
    attention = _Pass(*places, scaling=shape.scaling, sequences=layout.sequences.shape[1], heads=queries, kv_heads=keys,
                      tokens=n, width=width)
    attention.start, attention.length, attention.common, attention.prompt, attention.prompt_length = layout.places
    attention.query_head = attention.key_head = attention.value_head = width
    attention.query_token = attention.key_token = attention.value_token = joined
    given = cos, sin, *weights, x, kept.root, kept.again, kept.at, kept.middle, kept.both
    return _Layer(
        attention, sgemm_address(), *_at(*given), n=n, H=height, I=weights.down.shape[1], Q=weights.out.shape[1],
        A=joined, D=width, eps=(ctypes.c_float * 2)(*shape.eps), threads=torch.get_num_threads())
