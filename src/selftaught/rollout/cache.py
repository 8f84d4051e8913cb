"""Keys and values while decoding: a prompt's once per group, a response's in a buffer that grows by doubling."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from selftaught.kernels import loops
from selftaught.tensors import is_wide, scripted

CAPACITY = loops.BLOCK  # tokens that there is room for at first


def _held(key: Tensor) -> Tensor:
    """Keys as they are kept: on a CPU in float32 at least, since its products are as narrow as their factors."""
    return key if key.is_cuda or key.dtype == torch.float64 else key.float()


def _upright(key: Tensor) -> Tensor:
    """Keys (.., P, D) as (.., D, P), with room up to a whole block: scores of neighbouring keys are one vector."""
    return pad(_held(key).mT, (0, -key.shape[-2] % loops.BLOCK)).contiguous()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Their product in float32 at least: a score of 10 that is rounded to bfloat16 moves its weight by up to 2%."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (on a line of its own its compiler leaves out what follows)
        if is_wide(query, key):
            return torch.bmm(query, key, out_dtype=torch.float32)
    return torch.bmm(query, key) if query.dtype == torch.float64 else torch.bmm(query.float(), key.float())


def _by_group(x: Tensor, groups: int, slots: Tensor | None) -> Tensor:
    """(Hkv, B, repeat, ...) to (Hkv groups, slots repeat, ...)."""
    slotted = x if slots is None else x[:, slots]
    return slotted.reshape(x.shape[0] * groups, -1, x.shape[3])


def _by_row(x: Tensor, groups: int, repeat: int, place: Tensor | None) -> Tensor:
    """The inverse of `_by_group`, with heads and rows together: (Hkv B, repeat, ...)."""
    slotted = x.view(x.shape[0] // groups, -1, repeat, x.shape[2])
    return (slotted if place is None else slotted[:, place]).flatten(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, prompt_k: Tensor, prompt_v: Tensor, held_k: Tensor,
            held_v: Tensor, written: int, groups: int, slots: Tensor | None, place: Tensor | None,
            hidden: Tensor | None, scaling: float) -> Tensor:
    """`DecodeCache.attend`, once there is room for the token."""
    kv_heads, rows, width = key.shape
    repeat, prompt = query.shape[0] // kv_heads, prompt_v.shape[1]
    held_k.select(3, written).copy_(key)
    held_v.select(2, written).copy_(value)
    own_k, own_v = held_k.flatten(0, 1)[:, :, : written + 1], held_v.flatten(0, 1)[:, : written + 1]
    q = query.view(kv_heads, repeat, rows, width).transpose(1, 2).contiguous() * scaling
    on_prompt = _by_row(_scores(_by_group(q, groups, slots), prompt_k[:, :, :prompt]), groups, repeat, place)
    own = _scores(q.flatten(0, 1), own_k)
    scores = torch.cat([on_prompt, own], dim=-1)  # (Hkv B, repeat, P + written + 1)
    if hidden is not None:
        scores.view(kv_heads, rows, repeat, -1).masked_fill_(hidden, -math.inf)
    probs = torch.softmax(scores, dim=-1).to(query.dtype)
    over_prompt = probs.view(kv_heads, rows, repeat, -1)[:, :, :, :prompt]
    back = _by_row(torch.bmm(_by_group(over_prompt, groups, slots), prompt_v), groups, repeat, place)
    out = torch.baddbmm(back, probs[:, :, prompt:], own_v).view(kv_heads, rows, repeat, value.shape[2])
    return out.transpose(0, 1).reshape(rows, kv_heads * repeat, value.shape[2])


class DecodeCache:
    """Attention while all rows are decoded in step, from the prompts' keys and values on.

    Rows are the responses still running, sorted by group. `row_group` (B,) is the group of each row. All rows
    have written the same number of tokens.
    """

    def __init__(self, prompts: dict[int, tuple[Tensor, Tensor]], prompt_lengths: Tensor, row_group: Tensor) -> None:
        """Keys and values of the prompts by layer, (Hkv, prompts, P, D), padded on the right."""
        self.lengths = prompt_lengths
        self.row_group = row_group
        self.written = 0
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        # By layer keys (Hkv, groups, D, blocks of P) and values (Hkv, groups, P, D): heads first, as queries come, so
        # that rows of whole groups are its slots without a copy.
        self._prompt = {layer: (_upright(key), value.contiguous()) for layer, (key, value) in prompts.items()}
        self._response: dict[int, tuple[Tensor, Tensor]] = {}  # (Hkv, B, D, capacity), (Hkv, B, capacity, D)
        self._held: dict[int, loops.Held] | None = None
        self.moves = 0
        self._index_rows()

    def positions(self) -> Tensor:
        """The position of the token that each row is about to read: (B,)."""
        return self.lengths[self.row_group] + self.written

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        """One token of every row: query (Hq, B, D), key and value (Hkv, B, D) to (B, Hq, D)."""
        held = self._room(layer)
        if key.shape == value.shape and loops.usable(query, key, value) and loops.attends(query.shape[-1]):
            return loops.attend(query, key, value, *self._prompt[layer], *held, self.row_group, self.lengths,
                                self.written, window, scaling)
        prompt_k, prompt_v = self._flat[layer]
        hidden = self._hidden(prompt_v.shape[1], window)
        attend = scripted(_attend) if query.is_cpu else _attend
        return attend(query, key, value, prompt_k, prompt_v, *held, self.written, self.lengths.shape[0], self._slots,
                      self._place, hidden, scaling)

    def held(self) -> Mapping[int, loops.Held] | None:
        """All of it by layer, with room for one more token; None where that is nothing for the loops."""
        if self._held is None or self.written >= next(iter(self._held.values())).held_k.shape[3]:
            self._held, self.moves = None, self.moves + 1  # not held while it moves, so that each goes as it is copied
            group, lengths = self.row_group.long(), self.lengths.long()
            held = {layer: loops.Held(*prompt, *self._room(layer), group, lengths)
                    for layer, prompt in self._prompt.items()}
            suits = all(each.prompt_k.shape[2] == each.prompt_v.shape[3] and loops.attends(each.prompt_v.shape[3])
                        and loops.usable(*each[:4]) for each in held.values())
            self._held = held if suits else None
        return self._held

    def _room(self, layer: int) -> tuple[Tensor, Tensor]:
        """The responses' keys and values, with room for one more token."""
        if layer not in self._response:
            (keys, values), rows = self._prompt[layer], self.row_group.shape[0]
            self._response[layer] = (keys.new_empty(keys.shape[0], rows, keys.shape[2], CAPACITY),
                                     values.new_empty(values.shape[0], rows, CAPACITY, values.shape[3]))
        held_k, held_v = self._response[layer]
        capacity = held_v.shape[2]
        if self.written >= capacity:
            self._response[layer] = pad(held_k, (0, capacity)), pad(held_v, (0, 0, 0, capacity))
            self._held = None
        return self._response[layer]

    def _hidden(self, prompt: int, window: int | None) -> Tensor | None:
        """True where a row must not look, (B, 1, P + written + 1): padding, or left by a window; None: nowhere."""
        if window is None and self._whole:
            return None
        key = (prompt, window)
        if key not in self._masks:
            device = self.lengths.device
            lengths = self.lengths[self.row_group][:, None]
            at = torch.arange(prompt, device=device)[None, :]
            own = torch.arange(self.written + 1, device=device)[None, :]
            beyond = at >= lengths
            far = torch.zeros(lengths.shape[0], self.written + 1, dtype=torch.bool, device=device)
            if window is not None:
                beyond = beyond | (lengths + self.written - at >= window)
                far = (self.written - own >= window).expand_as(far)
            self._masks[key] = torch.cat([beyond, far], dim=1)[:, None, :]
        return self._masks[key]

    def advance(self) -> None:
        """One token of every row has been read."""
        self.written += 1
        self._masks = {}

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (indices in order), and prompts that nobody reads any more."""
        kept_groups, self.row_group = torch.unique_consecutive(self.row_group[rows], return_inverse=True)
        self._response = {layer: (k[:, rows], v[:, rows]) for layer, (k, v) in self._response.items()}
        if kept_groups.shape[0] < self.lengths.shape[0]:
            self._prompt = {layer: (k[:, kept_groups], v[:, kept_groups]) for layer, (k, v) in self._prompt.items()}
            self.lengths = self.lengths[kept_groups]
        self._index_rows()

    def _index_rows(self) -> None:
        """`_slots` (groups m,): row in each slot of a group, padded with the group's first; `_place` (B,): its inverse.

        None where slots and rows are the same numbers. And `_flat`: the prompts' with heads and groups together.
        """
        self._held = None
        self._flat = {layer: (k.flatten(0, 1), v.flatten(0, 1)) for layer, (k, v) in self._prompt.items()}
        self._whole = bool((self.lengths == next(iter(self._prompt.values()))[1].shape[2]).all())  # no prompt is padded
        self._masks = {}
        counts = torch.bincount(self.row_group, minlength=self.lengths.shape[0])
        most = int(counts.max())
        self._slots: Tensor | None = None
        self._place: Tensor | None = None
        if not bool((counts == most).all()):
            first = torch.cumsum(counts, 0) - counts
            slot = torch.arange(most, device=self.row_group.device)[None, :]
            self._slots = torch.where(slot < counts[:, None], first[:, None] + slot, first[:, None]).flatten()
            within = torch.arange(self.row_group.shape[0], device=self.row_group.device) - first[self.row_group]
            self._place = self.row_group * most + within
