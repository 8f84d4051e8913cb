"""Where rollouts come from: the engine protocol, and the settings that every engine reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from selftaught.records import Finish, Request, Rollout, Sampling, Section


class VllmConfig(Section):
    """vLLM as the engine: a server at `url`, or, without one, vLLM in this process.

    A server is started with `selftaught vllm-serve MODEL`, here or in an environment of its own, and told there what it
    may use; the fields after `wait` are of vLLM in this process alone.
    """

    url: str | None = Field(None, description="of a server that runs, as http://localhost:8000; null: in this process")
    folder: str | None = Field(None, description="a folder that this machine and the server's both see, through which "
                               "weights go to it; null: in this machine's shared memory")
    wait: float = Field(0, ge=0, allow_inf_nan=False, description="seconds to wait at the start for a server that does "
                        "not answer yet")
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1, description="share of the GPU's memory that vLLM takes "
                                          "(without a GPU: of the machine's)")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="precision that it samples in; null: optim.dtype")
    max_model_len: int | None = Field(None, ge=1, description="tokens of a prompt with its response at most; null: the "
                                      "model's context")
    enforce_eager: bool = Field(False, description="without compiled graphs: starts sooner, samples more slowly")

    @model_validator(mode="after")
    def _one_place(self) -> VllmConfig:
        here, there = ("gpu_memory_utilization", "dtype", "max_model_len", "enforce_eager"), ("folder", "wait")
        for name in here if self.url else there:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of vLLM in this process: give it to the server, as selftaught vllm-serve "
                                 f"MODEL --{name.replace('_', '-')}, or remove url" if self.url else
                                 f"{name} is of a server, and no url is given; give it, or remove {name}")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
                raise ValueError(f"url = {self.url!r}: give a server's address such as http://localhost:8000")
        return self


class RolloutConfig(Section):
    """How responses are drawn."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="what samples: the training weights themselves, or vLLM with a copy of them, "
        "renewed after every step")
    vllm: VllmConfig | None = Field(None, description="engine vllm: where it is, and what it may use")

    num_generations: int = Field(8, ge=1, description="rollouts per problem (the group)")
    prompts_per_step: int = Field(8, ge=1, description="problems per rollout batch")
    max_completion_length: int = Field(512, ge=1, description="tokens per response at most")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; responses are scored at it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of the sampling; 1: untruncated")
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens; null: untruncated")
    allow_truncated_support: bool = Field(
        False, description="train although top_p or top_k make the sampler's support smaller than the scorer's")
    stop: tuple[str, ...] = Field((), description="strings that end a response")
    max_logp_gap: float = Field(0.1, gt=0, description="mean difference in nats between the sampler's and the scorer's "
                                "log-probs of a batch above which a run stops: they are not the same model")
    filter_groups: Literal[False, True, "right"] = Field(
        False, description="replace dead groups by other problems', and drop those in excess of prompts_per_step; "
        "true: dead are groups whose rollouts all have one score (the whole reward's), which teach nothing; right: "
        "those that are all right or all not, by the verdicts' status (DAPO's dynamic sampling, arXiv 2503.14476 "
        "eq. 11)")
    max_resample: int = Field(3, ge=1, description="filter_groups: at most so many further draws of prompts_per_step "
                              "problems a step; then the step goes on with the live groups that there are")
    mask_truncated: bool = Field(
        False, description="rollouts cut at the length limit are not in the loss and not counted; their scores stay in "
        "the group's statistics")
    max_rows: int = Field(128, ge=1, description="responses decoded at once by the built-in engine")

    @field_validator("stop")
    @classmethod
    def _stops_somewhere(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text stands at the beginning of every response, so none would have a word; "
                             "remove it")
        return stop

    @model_validator(mode="after")
    def _vllm_is_meant(self) -> RolloutConfig:
        if self.vllm is not None and self.engine != "vllm":
            raise ValueError("vllm is given, but engine is transformers; set engine=vllm, or remove vllm")
        return self

    @property
    def truncated(self) -> bool:
        """Does the sampler draw from fewer tokens than the scorer counts?"""
        return self.top_p < 1 or self.top_k is not None

    def sampling(self) -> Sampling:
        """What is recorded in every rollout."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_completion_length, self.stop)


class Engine(Protocol):
    """A sampler of y ~ pi(. | x). `sample` is `submit` followed by `poll` until all is back, in request order."""

    def submit(self, requests: Sequence[Request], n: int, sampling: Sampling) -> None:
        """Queue n responses to each request, numbered from its `first` on."""
        ...

    def poll(self) -> list[Rollout]:
        """Rollouts that have finished since the last call; blocks while work is queued; [] when none is left."""
        ...

    def sample(self, requests: Sequence[Request], n: int, sampling: Sampling) -> list[Rollout]:
        """n responses to each request, in order."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights, by the names of a checkpoint, and stamp them on what is sampled from now on.

        They may be read as late as the next `submit`, and must not change before it.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def sampled(engine: Engine, requests: Sequence[Request], n: int, sampling: Sampling) -> list[Rollout]:
    """An engine's `sample`: `submit`, then `poll` until all is back."""
    engine.submit(requests, n, sampling)
    rollouts: list[Rollout] = []
    while batch := engine.poll():
        rollouts += batch
    return rollouts


def seed_of(request: Request, sample: int, bits: int) -> int:
    """The seed in [0, 2^bits) of one rollout, a function of (seed, step, problem, sample) and of nothing else."""
    key = f"{request.seed}/{request.step}/{request.problem.id}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little") % 2**bits


def uniforms(request: Request, sample: int, count: int) -> np.ndarray:
    """The random numbers in [0, 1) of one rollout, a function of (seed, step, problem, sample) and of nothing else."""
    return np.random.Generator(np.random.Philox(key=seed_of(request, sample, 128))).random(count)


def text_of(tokenizer: Any, token_ids: Sequence[int], finish: Finish, stop: Sequence[str] = ()) -> str:
    """A response as text: without the token that ended it, or up to the first of the strings `stop`, one of which did.

    A stop token need not be special, so it is taken away rather than skipped.
    """
    if stop:
        text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
        found = [text.find(string) for string in stop if string in text]
        if found:
            return str(text[: min(found)])
    written = token_ids[:-1] if finish == "stop" and not stop else token_ids
    return str(tokenizer.decode(list(written), skip_special_tokens=True))
