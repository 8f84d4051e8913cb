"""The recipe's `eval` section."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from selftaught.records import Section


class LeakageConfig(Section):
    """What is looked for in a student that learned from a teacher who knows more, and on how much.

    During training, with `every`, it is measured on the first rollouts of a step, under the model's own weights with
    the privilege (the gap) and under a copy of the weights that the run began with (the evidence), which costs their
    memory.
    """

    every: int | None = Field(None, ge=1, description="measure every so many training steps (leakage/* metrics); null: "
                              "not while training")
    problems: int = Field(32, ge=1, description="problems that are measured, the first so many")
    samples: int = Field(4, ge=1, description="responses to each, the first so many")
    demonstrations: int = Field(
        0, ge=0, le=64, description="right responses to a problem, drawn at random with their repeats, that are shown "
        "one at a time to all its responses, for the pointwise conditional mutual information; 0: none, and at least 2 "
        "for a spread")
    teacher: Literal["live", "initial"] = Field(
        "live", description="weights that see the privilege: the measured model's own, or those the run began with")
    evidence: float = Field(20.0, gt=1, description="likelihood ratio from which a wording counts as leaning on a "
                            "privilege, under the model that training began with")
    mentions: tuple[str, ...] | None = Field(
        None, description="regular expressions of what mentions an unseen reference; those that match the prompt are "
        "not asked; null: the English list in eval/lexicon.py")
    style_words: tuple[str, ...] | None = Field(
        None, description="words that are style, as blanks and punctuation are; null: the English list in "
        "eval/lexicon.py")

    @field_validator("mentions")
    @classmethod
    def _are_expressions(cls, mentions: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in mentions or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"eval.leakage.mentions = {pattern!r}: no regular expression ({error}); "
                                 "mend it") from error
        return mentions


class EvalConfig(Section):
    """When and how held-out problems are answered and measured.

    pass@k, pass^k and maj@k (one, all and most of k responses) count those of status "right", as the first part of the
    reward gives it (a function that returns a number: from 1.0 on); mean@k is the mean of the whole weighted score.
    """

    every: int | None = Field(None, ge=1, description="evaluate every so many steps; null: only before and after")
    samples: int = Field(8, ge=1, description="responses drawn for each problem (n of pass@k)")
    k: tuple[int, ...] = Field((1, 8), description="the k of pass@k, pass^k, maj@k and mean@k; none above `samples`")
    problems: int | None = Field(None, ge=1, description="held-out problems to use, the first so many; null: all")
    temperature: float = Field(1.0, ge=0.0, description="sampling temperature; 0: the likeliest token (greedy)")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus of the sampling; 1: untruncated")
    top_k: int | None = Field(None, ge=1, description="sample among the k likeliest tokens; null: untruncated")
    max_completion_length: int | None = Field(None, ge=1, description="tokens of a response; null: the rollout's own")
    controls: bool = Field(True, description="also measure another problem's prompt and the teacher's own accuracy")
    before: str | None = Field(
        None, description="a run's folder whose rows of the evaluation before training are taken over where model, "
        "teacher, precision, prompts, answers, sampling, seed and reward are the same by name; others are sampled")
    best: str | None = Field("pass@1", description="measure by which the best checkpoint is kept; null: keep none")
    leakage: LeakageConfig = LeakageConfig()

    @field_validator("k", mode="before")
    @classmethod
    def _one_k_is_a_ladder_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"eval.k = {list(self.k)}: every k must be at least 1")
        if max(self.k) > self.samples:
            raise ValueError(
                f"eval.k = {list(self.k)} asks for pass@{max(self.k)}, but eval.samples = {self.samples}: "
                f"raise eval.samples to {max(self.k)} or lower k"
            )
        known = [f"{name}{k}" for name in ("pass@", "pass^", "maj@", "mean@") for k in self.k]
        if self.best is not None and self.best not in known:
            raise ValueError(f"eval.best = {self.best!r} is not measured; choose one of {', '.join(known)}, or null")
        return self
