"""Where rollouts come from: the engine protocol, and the settings that every engine reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from selftaught.records import Request, Rollout, Sampling, Section


class RolloutConfig(Section):
    """How responses are drawn."""

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
        """Take new weights, and stamp them on what is sampled from now on."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def uniforms(request: Request, sample: int, count: int) -> np.ndarray:
    """The random numbers in [0, 1) of one rollout, a function of (seed, step, problem, sample) and of nothing else."""
    key = f"{request.seed}/{request.step}/{request.problem.id}/{sample}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
