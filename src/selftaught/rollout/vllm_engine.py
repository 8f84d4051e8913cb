"""vLLM as the engine: token ids go in, sampled ids with their log-probs come out, weights follow after each step.

vLLM holds a copy of the weights, so three things are made sure of here. Its log-probs are those of the distribution
that it draws from (its `processed_logprobs`: after temperature and truncation). Each response names the weights that
wrote it, and other weights than the last ones sent are refused. And it begins with random weights, made zero before the
first are sent, so that any which it cannot take over show in the first comparison with the trainer.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from selftaught.errors import UserError
from selftaught.records import Finish, Request, Rollout, Sampling
from selftaught.rollout.engine import sampled, seed_of, text_of

NEWEST = "vLLM 0.32 or newer"  # what is asked of it: token ids over HTTP, reloading in place, the version of weights
NEVER = -100.0  # added to a logit: the most that vLLM takes, and e^-100 is no probability


@dataclass(frozen=True)
class Facts:
    """What a vLLM says of itself; `vocabulary` and `width` are None where it does not."""

    where: str
    version: str
    model: str
    dtype: str
    max_model_len: int
    vocabulary: int | None = None
    width: int | None = None

    def __str__(self) -> str:
        return f"vLLM {self.version} {self.where}: {self.model}, {self.dtype}, context {self.max_model_len}"


@dataclass(frozen=True)
class Ask:
    """One response to be drawn: the prompt's ids, and `SamplingParams` of vLLM by their names."""

    prompt: tuple[int, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One response: its ids with their log-probs, why it ended, by a stop string or not, and whose weights wrote it."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish: str | None
    stop_string: bool
    stamps: frozenset[str]


class Client(Protocol):
    """A vLLM, wherever it is. All raise UserError where it does not answer or refuses."""

    facts: Facts

    def start(self, ask: Ask) -> Callable[[], Answer]:
        """Begin with a response; what is returned waits for it."""
        ...

    def clear(self) -> None:
        """Make all weights zero."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], stamp: str) -> None:
        """Take these weights, by a checkpoint's names; forget the keys and values of others; stamp what comes after."""
        ...

    def close(self) -> None:
        """Give up what is under way, and free what is held; once more is no error."""
        ...


@dataclass
class VllmEngine:
    """Samples by a vLLM. Every response is a request of its own, with its own seed; the prompt is computed once.

    `stop_ids` end a response; `shut` are ids that are never drawn, because the scorer does not count them.
    """

    client: Client
    tokenizer: Any
    stop_ids: frozenset[int]
    shut: Sequence[int] = ()
    version: int = 0
    _run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _stamp: str = ""
    _new: tuple[Iterable[tuple[str, Tensor]], int] | None = None
    _queue: deque[tuple[list[tuple[Request, int, Callable[[], Answer]]], Sampling]] = field(default_factory=deque)

    def submit(self, requests: Sequence[Request], n: int, sampling: Sampling) -> None:
        """Begin with n responses to each request, under the newest weights."""
        refuse_long(self.client.facts, max((len(r.prompt.token_ids) for r in requests), default=0),
                    sampling.max_completion_length)
        with self._whole():
            self._send()
            for request in requests:
                group = [(request, sample, self.client.start(Ask(request.prompt.token_ids, self._params(
                    sampling, seed_of(request, sample, 63))))) for sample in range(request.first, request.first + n)]
                self._queue.append((group, sampling))

    def poll(self) -> list[Rollout]:
        """The next request's responses, once all are there; [] when nothing is queued."""
        if not self._queue:
            return []
        group, sampling = self._queue.popleft()
        with self._whole():
            return [self._rollout(request, sample, wait(), sampling) for request, sample, wait in group]

    def sample(self, requests: Sequence[Request], n: int, sampling: Sampling) -> list[Rollout]:
        """n responses to each request, in order."""
        return sampled(self, requests, n, sampling)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights. They are sent when the next response is asked for, so that nothing is sent in vain."""
        self._new = weights, version

    def close(self) -> None:
        """Give up what is under way, and free what vLLM holds."""
        self._queue.clear()
        self.client.close()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What breaks off here, by an error or Ctrl-C, gives up all that is under way: nobody would wait for it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _send(self) -> None:
        if self._new is None:
            return
        (weights, version), self._new = self._new, None
        first, self._stamp = not self._stamp, f"{self._run}/{version}"
        if first:
            self.client.clear()
        self.client.load(weights, self._stamp)
        self.version = version

    def _params(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        params = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0,
                  "max_tokens": sampling.max_completion_length, "seed": seed, "logprobs": 0, "ignore_eos": True,
                  "stop_token_ids": sorted(self.stop_ids), "detokenize": bool(sampling.stop)}
        if sampling.stop:
            params["stop"] = list(sampling.stop)
        if self.shut:
            params["logit_bias"] = dict.fromkeys(self.shut, NEVER)
        return params

    def _rollout(self, request: Request, sample: int, answer: Answer, sampling: Sampling) -> Rollout:
        where = self.client.facts.where
        if answer.stamps != {self._stamp}:
            raise UserError(f"rollout.vllm: vLLM {where} sampled with weights that are not this run's last "
                            f"({', '.join(sorted(answer.stamps)) or 'unknown'} in the place of {self._stamp}): does "
                            "another run use it? Give each its own")
        if answer.finish not in ("stop", "length") or len(answer.token_ids) != len(answer.logps) or not answer.logps:
            raise UserError(f"rollout.vllm: vLLM {where} gave up a response ({answer.finish}, {len(answer.token_ids)} "
                            f"tokens, {len(answer.logps)} log-probs); look at what it logged")
        finish: Finish = "stop" if answer.finish == "stop" else "length"
        return Rollout(
            problem=request.problem, sample=sample, prompt=request.prompt, token_ids=answer.token_ids,
            logp_sampler=answer.logps, text=text_of(self.tokenizer, answer.token_ids, finish,
                                                    sampling.stop if answer.stop_string else ()),
            finish=finish, sampling=sampling, version=self.version, step=request.step)


def refuse_long(facts: Facts, longest: int, written: int) -> None:
    """Raise UserError where a prompt of `longest` tokens and `written` more are over what vLLM takes."""
    if longest + written > facts.max_model_len:
        raise UserError(f"max_completion_length = {written}: with the longest prompt of {longest} tokens that is "
                        f"{longest + written}, and vLLM {facts.where} takes {facts.max_model_len}; raise its limit "
                        "(rollout.vllm.max_model_len, or --max-model-len of `selftaught vllm-serve`), lower the "
                        "length, or set data.max_prompt_length with data.on_overflow=drop")


def answer_of(token_ids: Iterable[int], logps: Iterable[float], finish: str | None, stop_reason: Any,
              stamps: Iterable[str]) -> Answer:
    """An answer from vLLM's own fields; its `stop_reason` is a text where a stop string ended the response."""
    return Answer(tuple(token_ids), tuple(logps), finish, isinstance(stop_reason, str), frozenset(stamps))
