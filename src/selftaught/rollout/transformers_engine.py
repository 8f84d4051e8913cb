"""The built-in engine: samples on the training weights themselves, each prompt computed once per group."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selftaught.records import Finish, Request, Rollout, Sampling
from selftaught.rollout.cache import DecodeCache
from selftaught.rollout.engine import sampled, text_of, uniforms
from selftaught.rollout.sampling import draw, greedy, truncate

MARGIN = 4  # tokens decoded beyond the length of a stop string: they may be cut inside a character, or be special
DROP_SHARE = 8  # finished rows leave the batch once they are an eighth of it


class Model(Protocol):
    """What the engine asks of a backbone."""

    layout: str

    @property
    def device(self) -> torch.device: ...

    def decoding(self) -> AbstractContextManager[None]: ...

    def run(self, token_ids_T: Tensor, positions_T: Tensor, segments: Any) -> Tensor: ...

    def logits(self, hidden_nH: Tensor) -> Tensor: ...

    def prefill(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]: ...

    def step(self, token_ids_BT: Tensor, past: Any) -> tuple[Tensor, Any]: ...


@dataclass
class _Row:
    request: Request
    sample: int
    uniform: np.ndarray
    tokens: list[int]
    logps: list[float]
    finish: Finish | None = None
    text: str | None = None  # known early where a stop string ended it


class TransformersEngine:
    """Samples in batches of at most `max_rows` responses, whole groups together where they fit."""

    def __init__(self, backbone: Model, tokenizer: Any, stop_ids: Iterable[int], max_rows: int = 128) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.max_rows = max_rows
        self.version = 0
        self._queue: deque[tuple[list[tuple[Request, int]], Sampling]] = deque()
        self._texts: dict[int, str] = {}

    def submit(self, requests: Sequence[Request], n: int, sampling: Sampling) -> None:
        """Queue n responses to each request."""
        pairs = [(request, request.first + i) for request in requests for i in range(n)]
        size = self.max_rows if n > self.max_rows else self.max_rows // n * n
        for start in range(0, len(pairs), size):
            self._queue.append((pairs[start : start + size], sampling))

    def poll(self) -> list[Rollout]:
        """The next batch, sampled; [] when nothing is queued."""
        if not self._queue:
            return []
        pairs, sampling = self._queue.popleft()
        rows = [_Row(request, sample, uniforms(request, sample, sampling.max_completion_length), [], [])
                for request, sample in pairs]
        with self.backbone.decoding():
            decode = self._decode_plain if self.backbone.layout == "plain" else self._decode
            decode(rows, sampling)
        return [Rollout(
            problem=row.request.problem, sample=row.sample, prompt=row.request.prompt, token_ids=tuple(row.tokens),
            logp_sampler=tuple(row.logps), text=row.text or "", finish=row.finish or "length", sampling=sampling,
            version=self.version, step=row.request.step,
        ) for row in rows]

    def sample(self, requests: Sequence[Request], n: int, sampling: Sampling) -> list[Rollout]:
        """n responses to each request, in order."""
        return sampled(self, requests, n, sampling)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The weights are the trainer's own: only the version changes."""
        self.version = version

    def close(self) -> None:
        """Nothing is held between calls."""
        self._queue.clear()

    def _decode(self, rows: list[_Row], sampling: Sampling) -> None:
        device = self.backbone.device
        prompts: dict[tuple[int, ...], int] = {}
        for row in rows:
            prompts.setdefault(row.request.prompt.token_ids, len(prompts))
        active = sorted(rows, key=lambda row: prompts[row.request.prompt.token_ids])
        group = torch.tensor([prompts[row.request.prompt.token_ids] for row in active], device=device)
        hidden, layers = self.backbone.prefill(list(prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        cache = DecodeCache(layers, lengths, group)
        logits = self.backbone.logits(hidden)[group]
        for position in range(sampling.max_completion_length):
            token = self._draw(active, logits, position, sampling)
            alive = [i for i, row in enumerate(active) if row.finish is None]
            if not alive or position + 1 == sampling.max_completion_length:
                break
            if (len(active) - len(alive)) * DROP_SHARE >= len(active):
                keep = torch.tensor(alive, device=device)
                cache.keep(keep)
                active, token = [active[i] for i in alive], token[keep]
            logits = self.backbone.logits(self.backbone.run(token, cache.positions(), cache))
            cache.advance()
        self._close_texts(rows)

    def _decode_plain(self, rows: list[_Row], sampling: Sampling) -> None:
        """For models that the segmented layout cannot serve: group by group with the model's own cache."""
        device = self.backbone.device
        groups: dict[tuple[int, ...], list[_Row]] = {}
        for row in rows:
            groups.setdefault(row.request.prompt.token_ids, []).append(row)
        for prompt, members in groups.items():
            ids = torch.tensor([prompt] * len(members), device=device)
            hidden, past = self.backbone.step(ids, None)
            for position in range(sampling.max_completion_length):
                token = self._draw(members, self.backbone.logits(hidden), position, sampling)
                if all(row.finish for row in members) or position + 1 == sampling.max_completion_length:
                    break
                hidden, past = self.backbone.step(token[:, None], past)
        self._close_texts(rows)

    def _draw(self, active: list[_Row], logits: Tensor, position: int, sampling: Sampling) -> Tensor:
        if sampling.temperature == 0:
            token, logp = greedy(logits)
        else:
            scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
            scaled = truncate(scaled, sampling.top_k, sampling.top_p)
            uniform = torch.tensor([row.uniform[position] for row in active], dtype=torch.float64, device=logits.device)
            token, logp = draw(scaled, uniform)
        for row, t, p in zip(active, token.tolist(), logp.tolist(), strict=True):
            if row.finish is None:
                row.tokens.append(t)
                row.logps.append(p)
                if t in self.stop_ids or self._stopped(row, sampling.stop):
                    row.finish = "stop"
        return token

    def _stopped(self, row: _Row, stop: tuple[str, ...]) -> bool:
        """Has the last token completed a stop string? If so the text is what stands before it."""
        if not stop:
            return False
        newest = row.tokens[-1]
        if newest not in self._texts:
            self._texts[newest] = self.tokenizer.decode([newest])
        seen = set(self._texts[newest])
        if "\ufffd" not in seen and not any(set(s) & seen for s in stop):  # U+FFFD: a part of some character
            return False
        longest = max(len(s.encode()) for s in stop)  # a token is a byte at least
        tail = self.tokenizer.decode(row.tokens[-longest - MARGIN:], skip_special_tokens=True)
        if not any(s in tail for s in stop):
            return False
        row.text = text_of(self.tokenizer, row.tokens, "stop", stop)
        return True

    def _close_texts(self, rows: list[_Row]) -> None:
        for row in rows:
            if row.text is None:
                row.text = text_of(self.tokenizer, row.tokens, row.finish or "length")
