"""Keys and values while decoding: a prompt's once per group, a response's in a buffer that grows by doubling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FIRST_CAPACITY = 32


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
        self._prompt = prompts  # by layer: (groups, Hkv, P, D)
        self._response: dict[int, tuple[Tensor, Tensor]] = {}
        self._index_rows()

    def positions(self) -> Tensor:
        """The position of the token that each row is about to read: (B,)."""
        return self.lengths[self.row_group] + self.written

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        """One token of every row: query (Hq, B, D), key and value (Hkv, B, D) to (B, Hq, D)."""
        rows, kv_heads, width = query.shape[1], key.shape[0], query.shape[2]
        repeat = query.shape[0] // kv_heads
        own_k, own_v = self._append(layer, key, value)
        prompt_k, prompt_v = self._prompt[layer]
        q = (query * scaling).transpose(0, 1).reshape(rows, kv_heads, repeat, width)
        on_prompt = self._by_row(self._by_group(q) @ prompt_k.transpose(-1, -2), repeat)
        scores = torch.cat([on_prompt, q @ own_k.transpose(-1, -2)], dim=-1)  # (B, Hkv, repeat, P + written)
        scores = scores.masked_fill(self._hidden(prompt_k.shape[2], window), float("-inf"))
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        over_prompt, over_own = probs[..., : prompt_k.shape[2]], probs[..., prompt_k.shape[2]:]
        back = self._by_row(self._by_group(over_prompt) @ prompt_v, repeat)
        return (back + over_own @ own_v).reshape(rows, kv_heads * repeat, width)

    def _by_group(self, x: Tensor) -> Tensor:
        """(B, Hkv, repeat, ...) to (groups, Hkv, slots repeat, ...)."""
        slotted = x.view(*self._slots.shape, *x.shape[1:]) if self._full else x[self._slots]
        return slotted.transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor, repeat: int) -> Tensor:
        """The inverse of `_by_group`."""
        slotted = x.unflatten(2, (-1, repeat)).transpose(1, 2)
        return slotted.flatten(0, 1) if self._full else slotted[self._place]

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new_k, new_v = key.transpose(0, 1).unsqueeze(2), value.transpose(0, 1).unsqueeze(2)  # (B, Hkv, 1, D)
        if layer not in self._response:
            shape = (*new_k.shape[:2], self._capacity, new_k.shape[3])
            self._response[layer] = new_k.new_empty(shape), new_v.new_empty(shape)
        held_k, held_v = self._response[layer]
        if self.written >= held_k.shape[2]:
            grow = (0, 0, 0, held_k.shape[2])
            held_k, held_v = pad(held_k, grow), pad(held_v, grow)
            self._response[layer] = held_k, held_v
        held_k[:, :, self.written : self.written + 1] = new_k
        held_v[:, :, self.written : self.written + 1] = new_v
        return held_k[:, :, : self.written + 1], held_v[:, :, : self.written + 1]

    def _hidden(self, prompt: int, window: int | None) -> Tensor:
        """True where a row must not look, (B, 1, 1, P + written + 1): padding, and what a window has left behind."""
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
            self._masks[key] = torch.cat([beyond, far], dim=1)[:, None, None, :]
        return self._masks[key]

    def advance(self) -> None:
        """One token of every row has been read."""
        self.written += 1
        self._masks = {}

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (indices in order), and prompts that nobody reads any more."""
        kept_groups, self.row_group = torch.unique_consecutive(self.row_group[rows], return_inverse=True)
        self._response = {layer: (k[rows], v[rows]) for layer, (k, v) in self._response.items()}
        if kept_groups.shape[0] < self.lengths.shape[0]:
            self._prompt = {layer: (k[kept_groups], v[kept_groups]) for layer, (k, v) in self._prompt.items()}
            self.lengths = self.lengths[kept_groups]
        self._index_rows()

    def _index_rows(self) -> None:
        """`_slots` (groups, m): row in each slot of a group, padded with the group's first; `_place`: its inverse."""
        groups = self.lengths.shape[0]
        counts = torch.bincount(self.row_group, minlength=groups)
        self._full = bool((counts == counts[0]).all())  # then slots and rows are the same numbers: nothing to gather
        first = torch.cumsum(counts, 0) - counts
        slot = torch.arange(int(counts.max()), device=self.row_group.device)[None, :]
        self._slots = torch.where(slot < counts[:, None], first[:, None] + slot, first[:, None])
        within = torch.arange(self.row_group.shape[0], device=self.row_group.device) - first[self.row_group]
        self._place = (self.row_group, within)
        self._masks = {}
