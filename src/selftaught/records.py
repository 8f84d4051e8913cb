"""Frozen records that flow through the stages. No behaviour lives here, but how a recipe names a column.

A record is made by one stage and read by later ones; stages know records and never one another.
Token ids are plain tuples of int until `score` packs them, so that a record can be saved and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

if TYPE_CHECKING:  # a verifier's worker imports `Verdict` from here, and must not wait for torch
    from torch import Tensor

Message = Mapping[str, str]
Say = Callable[[str], None]  # tells the user one line
Weights = Literal["live", "initial", "ema", "snapshot", "external"]
Context = Literal["plain", "privileged"]
Status = Literal["right", "wrong", "unparsed", "timeout", "error"]
Finish = Literal["stop", "length"]


NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """Base of every section of a recipe: typed, frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in NUMBERS:
            raise ValueError(f"{str(value).lower()} is not a number")
        return value


@dataclass(frozen=True)
class Prompt:
    """What the model is conditioned on. `media` and `positions` are the backbone's alone to read."""

    token_ids: tuple[int, ...]
    media: Any = None
    positions: Any = None


@dataclass(frozen=True)
class Problem:
    """One thing to solve. `id` is a digest of the canonical content: equal problems have equal ids.

    `prompt` is text (a question) or chat messages; `columns` holds every column of the source, by the
    source's own names, for the reward and the privilege.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    solution: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def lookup(columns: Mapping[str, Any], path: str) -> Any:
    """The value of column `path`; dots reach into dictionaries. None where there is none."""
    if path in columns:
        return columns[path]
    value: Any = columns
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


@dataclass(frozen=True)
class Sampling:
    """How responses were drawn. The defaults sample from the model's own distribution, untruncated.

    Temperature 0 takes the likeliest token (greedy); its log-probs are those under temperature 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_completion_length: int = 512
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt to sample from. (seed, step, problem.id, sample) keys the randomness of every rollout.

    `first` is the number of the first sample: n responses to it are samples first .. first + n - 1.
    """

    problem: Problem
    prompt: Prompt
    step: int
    seed: int
    first: int = 0


@dataclass(frozen=True)
class Rollout:
    """One response y ~ pi(. | x), never re-tokenised.

    `token_ids` includes the stop token where `finish` is "stop"; `text` is the response without it.
    `logp_sampler` is the sampler's own log-prob of each token, in nats, at the sampling's temperature.
    `loss_mask` is False on tokens that the model did not write (None: it wrote them all).
    `version` is that of the weights that wrote it.
    """

    problem: Problem
    sample: int
    prompt: Prompt
    token_ids: tuple[int, ...]
    logp_sampler: tuple[float, ...]
    text: str
    finish: Finish
    sampling: Sampling
    version: int
    step: int
    loss_mask: tuple[bool, ...] | None = None
    segments: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one rollout. `score` None: no opinion, left out of the group's statistics."""

    score: float | None
    status: Status = "wrong"
    feedback: str | None = None
    answer: str | None = None
    strategy: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Privilege:
    """c, what the student may not see, and the prompt that carries it.

    `cut` counts evidence tokens cut away, `missing` the parts that a composition has and this problem has not.
    `others` are further ones for the same rollout, each seen by a teacher of its own.
    """

    kind: str
    text: str
    prompt: Prompt
    cut: int = 0
    missing: int = 0
    others: tuple[Privilege, ...] = ()


@dataclass(frozen=True)
class View:
    """Weights x context under which the same response tokens are scored.

    `every` is the refresh interval of a snapshot in steps; `rate` is the step of an exponential moving
    average, teacher <- (1 - rate) teacher + rate student. `nth` says which of a rollout's privileges is seen; the
    trainer sets it where there are several.
    """

    weights: Weights
    context: Context = "plain"
    every: int | None = None
    rate: float | None = None
    nth: int = 0


def privileged_views(views: Mapping[str, View]) -> list[str]:
    """The names of the views that see a privilege."""
    return [name for name, view in views.items() if view.context == "privileged"]


@dataclass(frozen=True)
class TokenBatch:
    """N response tokens of B rollouts, ragged and concatenated: all that an objective needs beside logits.

    tokens_N, sequence_ids_N: int64; sequence_ids are 0..B-1. reward_B: float, NaN means no opinion.
    group_B: int64, rollouts of one problem share it. logp_old_N: the trainer's own log-probs before the
    update, None means on-policy. privileged_B: bool, None means all. privileges_B: int64, how many privileges, each
    with a teacher of its own; None means one where there is any. terminal_N: bool, None means none.
    mask_N: bool, False is neither in the loss nor counted. logp_sampler_N: the sampler's own log-probs.
    step: training steps done so far: every schedule counts them.
    """

    tokens: Tensor
    sequence_ids: Tensor
    reward: Tensor | None = None
    group: Tensor | None = None
    logp_old: Tensor | None = None
    privileged: Tensor | None = None
    privileges: Tensor | None = None
    terminal: Tensor | None = None
    mask: Tensor | None = None
    logp_sampler: Tensor | None = None
    step: int = 0


@dataclass(frozen=True)
class Batch:
    """One optimiser batch: what objectives see, and the token ids that every view is scored on.

    `contexts` holds for "plain" and "privileged" the prompt of each rollout (the plain one where a rollout has no
    privilege), and for "privileged.1" and so on that of a second and further privilege, () where there is none;
    `responses` the response ids of each rollout, in the order of `tokens`.
    """

    tokens: TokenBatch
    contexts: Mapping[str, tuple[tuple[int, ...], ...]]
    responses: tuple[tuple[int, ...], ...]


# Per-token constants (N,): always `counted`; `logp_old`, `advantage`, ... by method.
Credit: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True)
class TokenLoss:
    """Per-token objective of one chunk, unreduced: loss (n,), and metrics (n,) by name."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
