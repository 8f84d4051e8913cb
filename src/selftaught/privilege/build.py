"""One privilege per rollout: the evidence is chosen, cut to its budget, and carried by a prompt."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Protocol

from selftaught.errors import UserError
from selftaught.privilege.config import PrivilegeConfig, differs, evidence
from selftaught.records import Privilege, Problem, Prompt, Rollout, Verdict

MARKER = " [...]"
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class Renderer(Protocol):
    """What makes prompts; `data.Renderer` is one."""

    @property
    def shots(self) -> Sequence[Problem]: ...
    def prompt(self, problem: Problem) -> Prompt: ...
    def privileged(self, problem: Problem, block: str, shot_blocks: Sequence[str]) -> Prompt: ...
    def cut(self, text: str, max_tokens: int) -> tuple[str, int]: ...


def build(
    config: PrivilegeConfig,
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Verdict],
    problems: Sequence[Problem],
    renderer: Renderer,
    *,
    seed: int,
    step: int,
) -> list[Privilege | None]:
    """The privilege of each rollout; None: it has none and is left out of the teacher's terms.

    `problems` is what the controls draw from. Rollouts with the same context share one Privilege object, so that
    its prompt is computed once. Randomness is keyed by (seed, step, problem.id), never by the place in the batch.
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.problem.id, []).append(index)
    texts: list[str | None] = [None] * len(rollouts)
    for identity, members in groups.items():
        if config.kind == "demonstration":
            ranked = _ranked(config, [(rollouts[i], verdicts[i]) for i in members], _key(seed, step, identity))
            for index in members:
                texts[index] = _demonstration(config, rollouts[index], ranked)
        elif config.kind == "feedback":
            for index in members:
                texts[index] = verdicts[index].feedback
        else:
            shared = _own(config, rollouts[members[0]].problem, problems, _key(seed, step, identity))
            for index in members:
                texts[index] = shared
    carrier = _Carrier(config, renderer)
    return [carrier.carry(rollout.problem, text) for rollout, text in zip(rollouts, texts, strict=True)]


def for_problems(
    config: PrivilegeConfig,
    problems: Sequence[Problem],
    pool: Sequence[Problem],
    renderer: Renderer,
    *,
    seed: int,
    step: int,
) -> list[Privilege | None]:
    """The privilege of each problem without rollouts, for evaluation; `pool` is what the controls draw from.

    A demonstration is the problem's own solution or answer. Feedback needs rollouts: make it `control(config, ...)`.
    """
    if config.kind == "feedback":
        raise ValueError("feedback belongs to a rollout; for problems alone use control(config, 'right')")
    carrier = _Carrier(config, renderer)
    return [carrier.carry(one, _own(config, one, pool, _key(seed, step, one.id))) for one in problems]


def describe(privileges: Sequence[Privilege | None]) -> dict[str, float]:
    """Metrics of one step's privileges: shares are of rollouts, tokens are counted."""
    if not privileges:
        return {}
    present = [privilege for privilege in privileges if privilege is not None]
    metrics = {
        "privilege/missing": 1.0 - len(present) / len(privileges),
        "privilege/cut": sum(privilege.cut > 0 for privilege in present) / len(privileges),
        "privilege/cut_tokens": float(sum(privilege.cut for privilege in present)),
        "privilege/contexts": float(len({privilege.prompt.token_ids for privilege in present})),
    }
    if present:
        lengths = [len(privilege.prompt.token_ids) for privilege in present]
        metrics["privilege/prompt_length"] = sum(lengths) / len(lengths)
        metrics["privilege/prompt_length_max"] = float(max(lengths))
    return metrics


def _key(seed: int, step: int, identity: str) -> str:
    return f"{seed}/{step}/{identity}"


def _own(config: PrivilegeConfig, problem: Problem, pool: Sequence[Problem], key: str) -> str | None:
    """The evidence of a kind that needs no rollouts. "" is evidence (of `empty`), None is none."""
    if config.kind == "empty":
        return ""
    if config.kind not in ("wrong", "other_problem"):
        return evidence(config, problem)
    start = random.Random(key).randrange(len(pool)) if pool else 0
    for other in (*pool[start:], *pool[:start]):
        if config.kind == "wrong" and differs(config, problem, other):
            return evidence(config, other)
        if config.kind == "other_problem" and other.id != problem.id and (text := evidence(config, other)):
            return text
    return None


def _ranked(config: PrivilegeConfig, group: Sequence[tuple[Rollout, Verdict]], key: str) -> list[tuple[int, str]]:
    """(sample, text) of the rollouts of one problem that succeeded and have something to show, best choice first.

    One ranking serves the whole group, so that all its failures share one demonstration and hence one prompt.
    """
    successes = sorted(
        (rollout for rollout, verdict in group if _succeeded(config, verdict)), key=lambda rollout: rollout.sample
    )
    if config.choose == "random":
        random.Random(key).shuffle(successes)
    elif config.choose == "shortest":
        successes.sort(key=lambda rollout: (len(rollout.token_ids), rollout.sample))
    shown = [
        (rollout.sample, _without_thinking(rollout.text) if config.strip_thinking else rollout.text.strip())
        for rollout in successes
    ]
    return [(sample, text) for sample, text in shown if text]


def _succeeded(config: PrivilegeConfig, verdict: Verdict) -> bool:
    """By its status, unless a threshold is set: a wrong answer can have a high weighted sum, a right one a low."""
    if verdict.score is None:
        return False
    return verdict.status == "right" if config.threshold is None else verdict.score >= config.threshold


def _demonstration(config: PrivilegeConfig, rollout: Rollout, ranked: Sequence[tuple[int, str]]) -> str | None:
    return next((text for sample, text in ranked if not (config.exclude_self and sample == rollout.sample)), None)


def _without_thinking(text: str) -> str:
    """`text` after its thinking: a block that the prompt opened and one that was never closed go too."""
    visible = THINKING.sub("", text)
    visible = visible.rpartition("</think>")[2]
    return visible.partition("<think>")[0].strip()


class _Carrier:
    """Puts evidence into prompts; equal contexts give the same object."""

    def __init__(self, config: PrivilegeConfig, renderer: Renderer) -> None:
        self._config = config
        self._renderer = renderer
        self._made: dict[tuple[str, str], Privilege | None] = {}
        self._shot_cut = 0
        self._shot_blocks = [self._shot_block(shot) for shot in renderer.shots]

    def carry(self, problem: Problem, text: str | None) -> Privilege | None:
        """The privilege with this evidence; None for no evidence, or (on_overflow) none that fits."""
        if text is None or (not text.strip() and self._config.kind != "empty"):
            return None
        if (problem.id, text) not in self._made:
            self._made[problem.id, text] = self._make(problem, text)
        return self._made[problem.id, text]

    def _make(self, problem: Problem, text: str) -> Privilege | None:
        kind = self._config.kind
        if kind == "empty":
            return Privilege(kind, "", self._renderer.prompt(problem))
        fitted = self._within_tokens(text, problem)
        if fitted is None:
            return None
        shown, cut = fitted
        prompt = self._prompt(problem, shown)
        limit = self._config.max_prompt_length
        if limit is not None and len(prompt.token_ids) > limit:
            self._refuse("max_prompt_length", limit, len(prompt.token_ids), problem)
            shortened = self._within_prompt(problem, text, limit) if self._config.on_overflow == "trim" else None
            if shortened is None:
                return None
            shown, cut, prompt = shortened
        return Privilege(kind, shown, prompt, cut + self._shot_cut)

    def _prompt(self, problem: Problem, text: str) -> Prompt:
        return self._renderer.privileged(problem, self._config.block(text), self._shot_blocks)

    def _within_tokens(self, text: str, problem: Problem) -> tuple[str, int] | None:
        """`text` within `max_tokens`, and the tokens that it lost."""
        limit = self._config.max_tokens
        kept, cut = (text, 0) if limit is None else self._renderer.cut(text, limit)
        if not cut:
            return text, 0
        assert limit is not None
        self._refuse("max_tokens", limit, limit + cut, problem)
        return None if self._config.on_overflow == "drop" else (kept + MARKER, cut)

    def _within_prompt(self, problem: Problem, text: str, limit: int) -> tuple[str, int, Prompt] | None:
        """The longest beginning of the evidence whose prompt is within `limit`; None: not one token of it fits."""
        total = self._renderer.cut(text, 0)[1]
        low, high = 0, min(total, self._config.max_tokens or total) - 1
        best: tuple[str, int, Prompt] | None = None
        while low < high:
            middle = (low + high + 1) // 2
            kept, cut = self._renderer.cut(text, middle)
            prompt = self._prompt(problem, kept + MARKER)
            if len(prompt.token_ids) <= limit:
                low, best = middle, (kept + MARKER, cut, prompt)
            else:
                high = middle - 1
        return best

    def _refuse(self, field: str, limit: int, length: int, problem: Problem) -> None:
        if self._config.on_overflow == "error":
            raise UserError(
                f"privilege.{field}: problem {problem.id} needs {length} tokens, the limit is {limit}; raise it, or "
                "set privilege.on_overflow to 'trim' or 'drop'"
            )

    def _shot_block(self, shot: Problem) -> str:
        """The shot's own privilege: true under every control, so that a control changes one thing."""
        text = evidence(self._config, shot)
        fitted = self._within_tokens(text, shot) if text else None
        if fitted is None:
            return ""
        self._shot_cut += fitted[1]
        return self._config.block(fitted[0])
