"""Keys and values while decoding: a prompt's once per group, a response's in a buffer that grows by doubling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from selftaught.tensors import is_wide, upcast

FIRST_CAPACITY = 32


def _held(key: Tensor) -> Tensor:
    """Keys as they are kept: on a CPU in float32 at least, since its products are as narrow as their factors."""
    return key if key.is_cuda or key.dtype == torch.float64 else key.float()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Their product in float32 at least: a score of 10 that is rounded to bfloat16 moves its weight by up to 2%."""
    if is_wide(query, key):
        return torch.bmm(query, key, out_dtype=torch.float32)
    return torch.bmm(upcast(query), upcast(key))


class DecodeCache:
    """Attention while all rows are decoded in step, from the prompts' keys and values on.

    Rows are the responses still running, sorted by group. `row_group` (B,) is the group of each row. All rows
    have written the same number of tokens.
    """

    def __init__(self, prompts: dict[int, tuple[Tensor, Tensor]], prompt_lengths: Tensor, row_group: Tensor,
                 most: int) -> None:
        """`most`: tokens that a row reads at most, so that a short run never pays for the first capacity."""
        self.lengths = prompt_lengths
        self.row_group = row_group
        self.written = 0
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._capacity = min(FIRST_CAPACITY, most)
        # By layer (Hkv, groups, P, D), heads first, as queries come: rows of whole groups are its slots without a copy.
        self._prompt = {layer: (_held(key), value) for layer, (key, value) in prompts.items()}
        self._response: dict[int, tuple[Tensor, Tensor]] = {}  # (Hkv, B, capacity, D)
        self._index_rows()

    def positions(self) -> Tensor:
        """The position of the token that each row is about to read: (B,)."""
        return self.lengths[self.row_group] + self.written

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        """One token of every row: query (Hq, B, D), key and value (Hkv, B, D) to (B, Hq, D)."""
        (kv_heads, rows, width), repeat = key.shape, query.shape[0] // key.shape[0]
        own_k, own_v = self._append(layer, key, value)  # (Hkv B, written + 1, D)
        prompt_k, prompt_v = self._flat[layer]
        prompt = prompt_k.shape[1]
        q = query.new_empty(kv_heads, rows, repeat, width)
        torch.mul(query.view(kv_heads, repeat, rows, width).transpose(1, 2), scaling, out=q)
        on_prompt = self._by_row(_scores(self._by_group(q), prompt_k.transpose(1, 2)), repeat)
        own = _scores(q.flatten(0, 1), own_k.transpose(1, 2))
        scores = torch.cat([on_prompt, own], dim=-1)  # (Hkv B, repeat, P + written + 1)
        hidden = self._hidden(prompt, window)
        if hidden is not None:
            scores.view(kv_heads, rows, repeat, -1).masked_fill_(hidden, float("-inf"))
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        over_prompt = probs.view(kv_heads, rows, repeat, -1)[..., :prompt]
        back = self._by_row(torch.bmm(self._by_group(over_prompt), prompt_v), repeat)
        out = torch.baddbmm(back, probs[..., prompt:], own_v).view(kv_heads, rows, repeat, width)
        return out.transpose(0, 1).reshape(rows, kv_heads * repeat, width)

    def _by_group(self, x: Tensor) -> Tensor:
        """(Hkv, B, repeat, ...) to (Hkv groups, slots repeat, ...)."""
        slotted = x if self._full else x[:, self._slots.flatten()]
        return slotted.flatten(0, 1).view(-1, self._slots.shape[1] * x.shape[2], x.shape[3])

    def _by_row(self, x: Tensor, repeat: int) -> Tensor:
        """The inverse of `_by_group`, with heads and rows together: (Hkv B, repeat, ...)."""
        groups, slots = self._slots.shape
        slotted = x.view(-1, groups, slots, repeat, x.shape[2])
        return (slotted if self._full else slotted[:, *self._place]).flatten(0, -3)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._response:
            shape = (*key.shape[:2], self._capacity, key.shape[2])
            self._response[layer] = _held(key[:0, :0]).new_empty(shape), value.new_empty(shape)
        held_k, held_v = self._response[layer]
        if self.written >= held_k.shape[2]:
            grow = (0, 0, 0, held_k.shape[2])
            held_k, held_v = pad(held_k, grow), pad(held_v, grow)
            self._response[layer] = held_k, held_v
        held_k.select(2, self.written).copy_(key)
        held_v.select(2, self.written).copy_(value)
        return held_k.flatten(0, 1)[:, : self.written + 1], held_v.flatten(0, 1)[:, : self.written + 1]

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
        """`_slots` (groups, m): row in each slot of a group, padded with the group's first; `_place`: its inverse.

        And `_flat`: the prompts' keys and values as (Hkv groups, P, D).
        """
        self._flat = {layer: (k.flatten(0, 1), v.flatten(0, 1)) for layer, (k, v) in self._prompt.items()}
        self._whole = bool((self.lengths == next(iter(self._prompt.values()))[0].shape[2]).all())  # no prompt is padded
        groups = self.lengths.shape[0]
        counts = torch.bincount(self.row_group, minlength=groups)
        self._full = bool((counts == counts[0]).all())  # then slots and rows are the same numbers: nothing to gather
        first = torch.cumsum(counts, 0) - counts
        slot = torch.arange(int(counts.max()), device=self.row_group.device)[None, :]
        self._slots = torch.where(slot < counts[:, None], first[:, None] + slot, first[:, None])
        within = torch.arange(self.row_group.shape[0], device=self.row_group.device) - first[self.row_group]
        self._place = (self.row_group, within)
        self._masks = {}
