"""The recipe's `eval` section."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from selftaught.records import Section


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
        "prompts, sampling, seed and reward are the same; the others are sampled")
    best: str | None = Field("pass@1", description="measure by which the best checkpoint is kept; null: keep none")

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
