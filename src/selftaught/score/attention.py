"""Segmented attention: a prompt once, each response against the prompt's keys and values and its own.

transformers' models hand queries, keys and values to a function chosen by name, and pass keyword arguments of
the forward call on to it. The function registered here gives them to the `segments` object of that call: this
module's for scoring, the sampler's own for decoding. There is no (T, T) mask and no generation cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

from selftaught.kernels import loops, passes
from selftaught.score.operations import fused, run
from selftaught.tensors import Packed

NAME = "selftaught"
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")  # extra arguments that change what attention computes


class Attends(Protocol):
    """What computes attention for one forward call."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        """query (Hq, T, D), key and value (Hkv, T, D), after rotary positions, to (T, Hq, D)."""
        ...


@runtime_checkable
class Decodes(Attends, Protocol):
    """The same for one token of every row, from keys and values that the loops can read where they lie."""

    written: int
    moves: int  # how often what `held` gives has moved

    def held(self) -> Mapping[int, loops.Held] | None:
        """All of them by layer, with room for one more token, if the loops can read it; until its tensors move."""
        ...


class UnsupportedAttention(Exception):
    """The model's attention computes something that the segmented layout cannot."""


def segmented_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                        scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                        segments: Attends | None = None, **extra: Any) -> tuple[Tensor, None]:
    """The attention function that transformers calls; query (1, Hq, T, D), returns (1, T, Hq, D)."""
    for name in UNSUPPORTED:
        if extra.get(name) is not None:
            raise UnsupportedAttention(f"attention with `{name}`")
    if segments is None:
        raise UnsupportedAttention("a model that does not pass keyword arguments on to its attention")
    if dropout or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("attention dropout" if dropout else "bidirectional attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = segments.attend(module.layer_idx, query[0], key[0], value[0], scale, sliding_window)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, segmented_attention)


def causal_mask(queries: int, prefix: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which of [prefix + keys] each query sees; query i stands at position prefix + i: (queries, prefix + keys)."""
    q = torch.arange(queries, device=device)[:, None] + prefix
    k = torch.arange(prefix + keys, device=device)[None, :]
    seen = k <= q
    return seen if window is None else seen & (q - k < window)


def _shares_heads(query: Tensor) -> bool:
    """Does the kernel itself read one key head for several query heads? With a mask only the CPU's does."""
    return query.device.type == "cpu"


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return sdpa(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1])


_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # what sdpa calls there
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    """Is this what `_Attended` is for: float32 on a CPU, heads of one width?"""
    return _flash is not None and _flash_backward is not None and fused(query) and value.shape[-1] == query.shape[-1]


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers that are added to the products."""
    return None if mask is None else torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)


_Piece = tuple[Tensor, Tensor, Tensor, Tensor | None]  # queries (batch, Hq, S, D), keys, values, mask; None: causal


@dataclass(frozen=True)
class _Rows:
    """A group's responses as a rectangle, padded with the first one's first token."""

    responses: int
    longest: int
    index: Tensor | None  # (responses longest,): the token at each place, among the group's; None: already so
    real: Tensor | None  # which places are no padding; None: all

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> _Rows:
        longest = max(lengths)
        if min(lengths) == longest:
            return cls(len(lengths), longest, None, None)
        sizes = torch.tensor(lengths, device=device)
        first = torch.cumsum(sizes, 0) - sizes
        offset = torch.arange(longest, device=device)[None, :]
        real = offset < sizes[:, None]
        index = torch.where(real, first[:, None] + offset, torch.zeros_like(offset))
        return cls(len(lengths), longest, index.flatten(), real.flatten().nonzero().flatten())

    def padded(self, x: Tensor) -> Tensor:
        """(heads, tokens of the group's responses, D) to (G, heads, R, D)."""
        placed = x if self.index is None else x.index_select(1, self.index)
        return placed.unflatten(1, (self.responses, self.longest)).transpose(0, 1)


class _Looped(torch.autograd.Function):
    """Attention of a packed pass by the compiled loops, which read keys and values where they lie: (T, Hq, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: passes.Layout, scaling: float) -> Tensor:
        out, sums = passes.attend_pass(query, key, value, layout, scaling)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        of_inputs = passes.attend_pass_backward(grad.contiguous(), query, key, value, out, sums, ctx.layout,
                                                ctx.scaling)
        return *of_inputs, None, None


class _Attended(torch.autograd.Function):
    """Attention of a packed pass that keeps queries, keys, values and its result alone: (T, Hq, D).

    The prompt's keys and values beside each response's own are put together again in the backward pass; the result is
    the very tensor that the next product keeps. Of a layer of 576 numbers a token that is a seventh of all it keeps.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float,
                window: int | None) -> Tensor:
        found = [_flash(q, k, v, 0.0, mask is None, attn_mask=_added(mask, q), scale=scaling)
                 for q, k, v, mask in segments.cut(query, key, value, window)]
        out = segments.joined([attended for attended, _ in found])
        ctx.segments, ctx.scaling, ctx.window = segments, scaling, window
        ctx.save_for_backward(query, key, value, out, *(log_sum for _, log_sum in found))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *log_sums = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            pieces = ctx.segments.cut(*inputs, ctx.window)
        of_pieces: list[Tensor] = []
        for (q, k, v, mask), g, o, log_sum in zip(pieces, ctx.segments.parted(grad), ctx.segments.parted(out),
                                                  log_sums, strict=True):
            of_pieces += _flash_backward(g, q, k, v, o, log_sum, 0.0, mask is None, attn_mask=_added(mask, q),
                                         scale=ctx.scaling)
        cut = [x for *parts, _ in pieces for x in parts]
        return (*torch.autograd.grad(cut, inputs, of_pieces), None, None, None)


class Segments:
    """Attention of one packed pass; index tensors are made once and used by every layer."""

    def __init__(self, packed: Packed) -> None:
        self.common = packed.common
        self.groups = packed.groups
        device = packed.token_ids.device
        self._sizes = [self.common]  # a cut of the packed tokens: the gradient of one cut is one block, of slices many
        self._rows: list[_Rows | None] = []
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}
        sequences = [(0, self.common, 0, 0, 0)] if self.common else []
        for group in packed.groups:
            at = group.start + group.prompt
            sequences += [(group.start, group.prompt, self.common, 0, 0)] if group.prompt else []
            for length in group.responses:
                sequences += [(at, length, self.common, group.start, group.prompt)] if length else []
                at += length
        self.sequences = passes.Layout.of(sequences)
        for group in packed.groups:
            written = sum(group.responses)
            self._sizes += [group.prompt, written]
            self._rows.append(_Rows.of(group.responses, device) if written else None)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        if self._by_loops(query, key, value, window):
            looped: Tensor = run(_Looped, query, key, value, self.sequences, scaling)
            return looped
        repeat = query.shape[0] // key.shape[0]
        if repeat > 1 and not _shares_heads(query):
            key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
        if torch.is_grad_enabled() and query.requires_grad and _has_flash(query, value):
            out: Tensor = _Attended.apply(query, key, value, self, scaling, window)
            return out
        return self.joined([_sdpa(*piece, scaling) for piece in self.cut(query, key, value, window)])

    def _by_loops(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
        """Do the compiled loops compute this? They know heads of whole vectors and one width, and no window."""
        inputs = query, key, value
        return self.sees_all(window) and key.shape == value.shape \
            and all(x.stride(-1) == 1 for x in inputs) and loops.usable(*inputs) and loops.attends(query.shape[-1])

    def sees_all(self, window: int | None) -> bool:
        """Does no token stand out of another's sight for the window alone?"""
        return window is None or window >= self.sequences.most

    def cut(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> list[_Piece]:
        """The common prefix, and prompt and responses of each group, each with all that it attends to."""
        (head_q, *q), (head_k, *k), (head_v, *v) = (x.split(self._sizes, dim=1) for x in (query, key, value))
        pieces = [self._causal(head_q, head_k, head_v, window)] if self.common else []
        for at, rows in zip(range(0, len(q), 2), self._rows, strict=True):
            prompt_k = torch.cat([head_k, k[at]], dim=1) if self.common else k[at]
            prompt_v = torch.cat([head_v, v[at]], dim=1) if self.common else v[at]
            pieces.append(self._causal(q[at], prompt_k, prompt_v, window))
            if rows is not None:
                pieces.append(self._responses(rows, (q[at + 1], k[at + 1], v[at + 1]), prompt_k, prompt_v, window))
        return pieces

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """What the pieces attended to, (batch, Hq, S, D) each, in the order of the tokens: (T, Hq, D)."""
        flat = [x.transpose(1, 2).flatten(0, 1) for x in pieces]
        return torch.cat([x if rows is None or rows.real is None else x.index_select(0, rows.real)
                          for x, rows in zip(flat, self._layout(), strict=True)])

    def parted(self, x: Tensor) -> list[Tensor]:
        """The pieces that `joined` makes (T, Hq, D) of, with zeros where there is padding."""
        sizes = [size for size in (self._sizes if self.common else self._sizes[1:]) if size]
        pieces = []
        for part, rows in zip(x.split(sizes), self._layout(), strict=True):
            if rows is not None and rows.real is not None:
                part = part.new_zeros(rows.responses * rows.longest, *part.shape[1:]).index_copy_(0, rows.real, part)
            pieces.append(part.unflatten(0, (1 if rows is None else rows.responses, -1)).transpose(1, 2))
        return pieces

    def _layout(self) -> list[_Rows | None]:
        """The rectangle of each piece; None: a single row."""
        own = [[None] if rows is None else [None, rows] for rows in self._rows]
        return [*([None] if self.common else []), *(rows for pair in own for rows in pair)]

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> _Piece:
        """The last queries of a causal sequence, (Hq, S, D) against (Hq, S' + S, D)."""
        size, before = q.shape[1], k.shape[1] - q.shape[1]
        mask = None
        if before or (window is not None and window < size):
            mask = self._mask(size, before, size, window, q)
        return q[None], k[None], v[None], mask

    def _responses(self, rows: _Rows, own: tuple[Tensor, Tensor, Tensor], prompt_k: Tensor, prompt_v: Tensor,
                   window: int | None) -> _Piece:
        """A group's responses, each against the prompt and itself."""
        query, key, value = (rows.padded(x) for x in own)
        heads, prompt = prompt_k.shape[:2]

        def context(shared: Tensor, written: Tensor) -> Tensor:
            return torch.cat([shared.expand(rows.responses, heads, prompt, -1), written], dim=2)

        window = None if window is None or window >= prompt + rows.longest else window
        mask = self._mask(rows.longest, prompt, rows.longest, window, query)
        return query, context(prompt_k, key), context(prompt_v, value), mask

    def _mask(self, queries: int, prefix: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        shape = (queries, prefix, keys, window)
        if shape not in self._masks:
            self._masks[shape] = causal_mask(*shape, device=like.device)
        return self._masks[shape]


class Recorded(Segments):
    """Segments that keep the keys and values of every prompt, for decoding to go on from."""

    def __init__(self, packed: Packed) -> None:
        super().__init__(packed)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        self.layers[layer] = self._by_prompt(key), self._by_prompt(value)
        return super().attend(layer, query, key, value, scaling, window)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(Hkv, T, D) to (Hkv, prompts, P, D), padded on the right."""
        longest = max(group.prompt for group in self.groups)
        return torch.stack([torch.cat([
            x[:, : self.common], pad(x[:, g.start : g.start + g.prompt], (0, 0, 0, longest - g.prompt)),
        ], dim=1) for g in self.groups], dim=1)
