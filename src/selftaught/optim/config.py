"""What a recipe says about optimisation and checkpoints, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from selftaught.records import Section


class LoraConfig(Section):
    """Train low-rank adapters (arXiv:2106.09685) and leave the model's weights alone.

    They need a higher learning rate than the weights themselves: about 1e-4. `lora: 16` is short for {rank: 16}.
    """

    rank: int = Field(16, gt=0, description="Inner width of each pair of matrices.")
    alpha: float = Field(32, gt=0, allow_inf_nan=False, description="An adapter's part is scaled by alpha / rank.")
    dropout: float = Field(0.0, description="0: responses are sampled without dropout, and must be scored so too.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", min_length=1, description="all-linear: every linear layer but the head; or names of layers.")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0:
            raise ValueError(f"optim.lora.dropout = {dropout}: the responses were sampled without it, so the loss "
                             "would be of another distribution than theirs; leave it out")
        return dropout


class OptimConfig(Section):
    """How the weights are updated. A step is one rollout batch; every schedule counts steps.

    So all updates on one rollout batch have one learning rate, and teachers follow once after the last of them.
    """

    steps: int = Field(gt=0, description="Rollout batches of the run.")
    learning_rate: float = Field(1e-6, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up; at most `steps`.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="What the decay ends at, as a share of the peak.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Decoupled decay, of matrices only.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay rates of AdamW's two moments, in [0, 1).")
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False, description="AdamW's epsilon.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled to this l2 norm; null: never.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the weights; moments are float32.")
    master: Literal["float32", "stochastic"] = Field(
        "float32", description="What updates of bfloat16 weights are done on. float32: on copies beside them; "
        "stochastic: on the weights alone, rounded up or down at random, right on average (arXiv:2010.06192), for 4 "
        "bytes less per weight.")
    updates_per_batch: int = Field(1, gt=0, description="Passes over each rollout batch (GRPO's mu).")
    minibatches: int = Field(1, gt=0, description="Updates per pass: whole groups, in the order drawn, cut so.")
    activation_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    token_budget: int = Field(4096, gt=0, description="Tokens per micro-batch, prompts included.")
    lora: LoraConfig | None = Field(None, description="Train adapters instead of the weights; `dtype` is the weights'.")

    @field_validator("lora", mode="before")
    @classmethod
    def _rank_alone(cls, lora: Any) -> Any:
        return {"rank": lora} if isinstance(lora, int) and not isinstance(lora, bool) else lora

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(
                    f"each of betas must be at least 0 and below 1, not {beta}; the usual are 0.9 and 0.999"
                )
        return betas

    @model_validator(mode="after")
    def _something_is_rounded(self) -> OptimConfig:
        if self.master == "stochastic" and (self.dtype == "float32" or self.lora is not None):
            trained = "the adapters" if self.lora is not None else "the weights"
            raise ValueError(f"optim.master = stochastic: {trained} are trained in float32: nothing would be rounded; "
                             "leave it out" + ("" if self.lora is not None else ", or set optim.dtype=bfloat16"))
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, more than the run's {self.steps} steps: "
                "the peak would never be reached; lower warmup_steps or raise steps"
            )
        return self


class CheckpointConfig(Section):
    """When the whole state is saved, so that a run can go on, and how much of it is kept."""

    every: int = Field(10, gt=0, description="Steps between two checkpoints.")
    keep: int = Field(2, gt=0, description="How many of the newest stay on disk; the best one stays besides.")


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of step number `step`, counted from 0. A pure function, so that a resumed run needs no state.

    With W = warmup_steps, T = steps, peak p and floor m = min_lr_ratio:
        step < W:   p (step + 1) / W                     the first update moves; update W - 1 has the peak
        later:      p (m + (1 - m) f(x)),  x = min(1, (step - W) / (T - W))
        f(x) = 1 (constant, which knows no floor),  1 - x (linear),  (1 + cos pi x) / 2 (cosine)
    """
    assert step >= 0, f"steps are counted from 0, got {step}"
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    share = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
