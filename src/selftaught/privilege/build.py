"""One privilege per rollout: the evidence is chosen, cut to its budget, and carried by a prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from selftaught.errors import UserError
from selftaught.privilege.config import (
    PrivilegeConfig,
    control,
    demonstration_of,
    differs,
    evidence,
    has_any,
    pieces,
)
from selftaught.privilege.demonstrations import demonstrations
from selftaught.records import Privilege, Problem, Prompt, Rollout, Verdict

MARKER = " [...]"
CONTROLS = ("wrong", "other_problem", "empty")
Found = list[list[str]]  # for each part the texts that were found for it, best first; none: the part is missing
Shown = tuple[tuple[int, str], ...]  # what one prompt carries: number of the part, and text


class Renderer(Protocol):
    """What makes prompts; `data.Renderer` is one."""

    @property
    def shots(self) -> Sequence[Problem]: ...
    def prompt(self, problem: Problem) -> Prompt: ...
    def privileged(
        self, problem: Problem, block: str, shot_blocks: Sequence[str], thinking: bool | None = None
    ) -> Prompt: ...
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
    room: int | None = None,
) -> list[Privilege | None]:
    """The privilege of each rollout; None: it has none and is left out of the teacher's terms.

    `problems` is what the controls draw from; `room` the tokens that the context leaves for a prompt, a limit as
    `max_prompt_length` is. Rollouts with the same context share one Privilege object, so that
    its prompt is computed once. Randomness is keyed by (seed, step, problem.id), never by the place in the batch.
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.problem.id, []).append(index)
    parts = pieces(config)
    found: list[Found] = [[] for _ in rollouts]
    without: set[int] = set()
    for identity, members in groups.items():
        key = _key(seed, step, identity)
        shared = _own(config, rollouts[members[0]].problem, problems, key)
        for number, part in enumerate(parts):
            texts = [shared[number]] * len(members)
            if config.kind not in CONTROLS and part.kind == "demonstration":
                group = [(rollouts[index], verdicts[index]) for index in members]
                texts = demonstrations(part, group, config.count, key)
            elif config.kind not in CONTROLS and part.kind == "feedback":
                texts = [[verdicts[index].feedback or ""] for index in members]
            for index, own in zip(members, texts, strict=True):
                found[index].append(own)
        if config.kind in CONTROLS and config.of == "demonstration":
            without.update(_without_success(config, [(rollouts[i], verdicts[i]) for i in members], members, key))
    carrier = _Carrier(config, renderer, room)
    return [None if index in without else carrier.carry(rollout.problem, found[index])
            for index, rollout in enumerate(rollouts)]


def for_problems(
    config: PrivilegeConfig,
    problems: Sequence[Problem],
    pool: Sequence[Problem],
    renderer: Renderer,
    *,
    seed: int,
    step: int,
    room: int | None = None,
) -> list[Privilege | None]:
    """The privilege of each problem without rollouts, for evaluation; `pool` is what the controls draw from.

    A demonstration is the problem's own solution or answer. Feedback needs rollouts: make it `control(config, ...)`.
    """
    if config.kind not in CONTROLS and any(part.kind == "feedback" for part in pieces(config)):
        raise ValueError("feedback belongs to a rollout; for problems alone use control(config, 'right')")
    carrier = _Carrier(config, renderer, room)
    return [carrier.carry(one, _own(config, one, pool, _key(seed, step, one.id))) for one in problems]


def longest(
    config: PrivilegeConfig,
    problems: Sequence[Problem],
    pool: Sequence[Problem],
    renderer: Renderer,
    *,
    seed: int,
    written: int | None,
) -> int:
    """Tokens of the longest privileged prompt of these problems; 0 where none has a privilege.

    Evidence that rollouts will make counts `written` tokens each; with None, as evaluation asks, there is none. A
    control that draws others counts the longest that it may draw.
    """
    parts = pieces(config)
    made = [config.kind not in CONTROLS and part.kind in ("demonstration", "feedback") for part in parts]
    draws = written is not None and config.kind in ("wrong", "other_problem")
    drawn = _longest_others(config, pool, renderer) if draws else None
    if written is None or not (any(made) or drawn):
        shown_as = control(config, "right") if written is None else config
        given = for_problems(shown_as, problems, pool, renderer, seed=seed, step=0)
        return max((len(one.prompt.token_ids) for one in given if one is not None), default=0)
    carrier, size = _Carrier(config, renderer), 0
    times = config.count if config.combine == "together" else 1
    for problem in problems:
        found = drawn or _own(config, problem, pool, "")
        shown = tuple((number, text) for number, texts in enumerate(found)
                      for text in (["1"] * (times if parts[number].kind == "demonstration" else 1)
                                   if made[number] else texts) if text)  # fmt: skip
        tokens = sum(renderer.cut(text, 0)[1] for _, text in shown)
        new = sum(made[number] for number, _ in shown)
        whole = tokens - new + new * written
        if config.max_tokens is not None and whole > config.max_tokens:
            whole = config.max_tokens + renderer.cut(MARKER, 0)[1]
        size = max(size, len(carrier.prompt(problem, shown).token_ids) - tokens + whole)
    return min(size, config.max_prompt_length or size)


def describe(privileges: Sequence[Privilege | None]) -> dict[str, float]:
    """Metrics of one step's privileges: shares are of rollouts, tokens are counted, the rest are means.

    parts_missing: parts of a composition that a rollout with a privilege has not; teachers: its contexts.
    """
    if not privileges:
        return {}
    present = [privilege for privilege in privileges if privilege is not None]
    every = [[privilege, *privilege.others] for privilege in present]
    metrics = {
        "privilege/missing": 1.0 - len(present) / len(privileges),
        "privilege/cut": sum(any(one.cut for one in own) for own in every) / len(privileges),
        "privilege/cut_tokens": float(sum(one.cut for own in every for one in own)),
        "privilege/contexts": float(len({one.prompt.token_ids for own in every for one in own})),
    }
    if present:
        lengths = [len(one.prompt.token_ids) for own in every for one in own]
        metrics["privilege/prompt_length"] = sum(lengths) / len(lengths)
        metrics["privilege/prompt_length_max"] = float(max(lengths))
        metrics["privilege/parts_missing"] = sum(privilege.missing for privilege in present) / len(present)
        metrics["privilege/teachers"] = len(lengths) / len(present)
    return metrics


def _without_success(config: PrivilegeConfig, group: Sequence[tuple[Rollout, Verdict]], members: Sequence[int],
                     key: str) -> list[int]:
    """The members that a demonstration would leave without a teacher: a control must change what is shown, not whom."""
    part = demonstration_of(config)
    return [index for index, texts in zip(members, demonstrations(part, group, 1, key), strict=True) if not texts]


def _key(seed: int, step: int, identity: str) -> str:
    return f"{seed}/{step}/{identity}"


def _own(config: PrivilegeConfig, problem: Problem, pool: Sequence[Problem], key: str) -> Found:
    """By part, the evidence that needs no rollouts: the problem's own, or of a control that of others."""
    parts = pieces(config)
    if config.kind not in CONTROLS:
        return [[evidence(part, problem) or ""] for part in parts]
    others = list(_others(config, problem, pool, key)) if parts else []
    wanted = [config.count if part.kind == "demonstration" else 1 for part in parts]
    return [
        list(dict.fromkeys(text for other in others if (text := evidence(part, other))))[:most]
        if most > 1 else [evidence(part, other) or "" for other in others[:1]]
        for part, most in zip(parts, wanted, strict=True)
    ]  # fmt: skip


def _longest_others(config: PrivilegeConfig, pool: Sequence[Problem], renderer: Renderer) -> Found:
    """By part, the longest texts that one prompt of a control may carry, whomever it draws."""
    return [
        sorted({text for other in pool if (text := evidence(part, other))}, key=lambda text: -renderer.cut(text, 0)[1])
        [: config.count if part.kind == "demonstration" and config.combine == "together" else 1]
        for part in pieces(config)
    ]  # fmt: skip


def _others(config: PrivilegeConfig, problem: Problem, pool: Sequence[Problem], key: str) -> Iterator[Problem]:
    """The problems that a control draws: `count` of them with different evidence, or as many as there are."""
    start = random.Random(key).randrange(len(pool)) if pool else 0
    seen: set[tuple[str | None, ...]] = set()
    for other in (*pool[start:], *pool[:start]):
        fits = other.id != problem.id and has_any(config, other)
        if fits and (config.kind == "other_problem" or differs(config, problem, other)):
            shown = tuple(evidence(part, other) for part in pieces(config))
            if shown not in seen:
                yield other
            seen.add(shown)
            if len(seen) == config.count:
                return


class _Carrier:
    """Puts evidence into prompts; equal contexts give the same object."""

    def __init__(self, config: PrivilegeConfig, renderer: Renderer, room: int | None = None) -> None:
        self._config, self._parts, self._room = config, pieces(config), room
        self._renderer = renderer
        self._made: dict[tuple[str, tuple[Shown, ...]], Privilege | None] = {}
        self._shot_cut = 0
        self._shot_blocks = [self._shot_block(shot) for shot in renderer.shots]

    def carry(self, problem: Problem, found: Found) -> Privilege | None:
        """The privilege with this evidence; None for no evidence, or (on_overflow) none that fits."""
        contexts = self._contexts(found)
        if (problem.id, contexts) not in self._made:
            self._made[problem.id, contexts] = self._make(problem, contexts)
        return self._made[problem.id, contexts]

    def prompt(self, problem: Problem, shown: Shown) -> Prompt:
        return self._renderer.privileged(problem, self._block(shown), self._shot_blocks, self._config.thinking)

    def _contexts(self, found: Found) -> tuple[Shown, ...]:
        """What each prompt carries. Without `together`, the k-th has the k-th demonstration and all other parts."""
        found = [[text for text in texts if text.strip()] for texts in found]
        if self._config.combine == "together":
            return (tuple((number, text) for number, texts in enumerate(found) for text in texts),)
        several = max((len(texts) for texts in found), default=0)
        split = [texts if part.kind == "demonstration" else texts * several
                 for part, texts in zip(self._parts, found, strict=True)]  # fmt: skip
        return tuple(tuple((number, texts[k]) for number, texts in enumerate(split) if k < len(texts))
                     for k in range(several))  # fmt: skip

    def _make(self, problem: Problem, contexts: tuple[Shown, ...]) -> Privilege | None:
        if self._config.kind == "empty":
            plain = self._config.thinking is None
            return Privilege("empty", "", self._renderer.prompt(problem) if plain else self.prompt(problem, ()))
        distinct = all(part.distinct for part in self._parts)
        made: dict[object, Privilege] = {}
        for number, shown in enumerate(filter(None, contexts)):
            one = self._one(problem, shown)
            if one is not None:  # two that differ only in what was cut away are one
                made.setdefault(one.prompt.token_ids if distinct else number, one)
        if not made:
            return None
        first, *others = made.values()
        return replace(first, others=tuple(others))

    def _one(self, problem: Problem, whole: Shown) -> Privilege | None:
        fitted = self._within_tokens(whole, problem)
        if fitted is None:
            return None
        shown, cut = fitted
        prompt = self.prompt(problem, shown)
        limit = min((n for n in (self._config.max_prompt_length, self._room) if n is not None), default=None)
        if limit is not None and len(prompt.token_ids) > limit:
            self._refuse("max_prompt_length", limit, len(prompt.token_ids), problem)
            shortened = self._within_prompt(problem, whole, limit) if self._config.on_overflow == "trim" else None
            if shortened is None:
                return None
            shown, cut, prompt = shortened
        text = "\n".join(text for _, text in shown)
        missing = len(self._parts) - len({number for number, _ in whole})
        return Privilege(self._config.kind, text, prompt, cut + self._shot_cut, missing)

    def _block(self, shown: Shown) -> str:
        return "\n".join(self._parts[number].block(text) for number, text in shown)

    def _cut(self, whole: Shown, budget: int) -> tuple[Shown, int]:
        """The first `budget` tokens of evidence, earlier parts first, and the tokens that were cut away."""
        shown, lost = [], 0
        for number, text in whole:
            kept, cut = self._renderer.cut(text, budget)
            used = self._renderer.cut(text, 0)[1] - cut
            if not cut or used:
                shown.append((number, kept + MARKER if cut else text))
            budget, lost = budget - used, lost + cut
        return tuple(shown), lost

    def _within_tokens(self, whole: Shown, problem: Problem) -> tuple[Shown, int] | None:
        """The evidence within `max_tokens`, and the tokens that it lost."""
        limit = self._config.max_tokens
        if limit is None:
            return whole, 0
        shown, cut = self._cut(whole, limit)
        if cut:
            self._refuse("max_tokens", limit, limit + cut, problem)
        return None if cut and self._config.on_overflow == "drop" else (shown, cut)

    def _within_prompt(self, problem: Problem, whole: Shown, limit: int) -> tuple[Shown, int, Prompt] | None:
        """The longest beginning of the evidence whose prompt is within `limit`; None: not one token of it fits."""
        total = sum(self._renderer.cut(text, 0)[1] for _, text in whole)
        low, high = 0, min(total, self._config.max_tokens or total) - 1
        best: tuple[Shown, int, Prompt] | None = None
        while low < high:
            middle = (low + high + 1) // 2
            shown, cut = self._cut(whole, middle)
            prompt = self.prompt(problem, shown)
            if len(prompt.token_ids) <= limit:
                low, best = middle, (shown, cut, prompt)
            else:
                high = middle - 1
        return best

    def _refuse(self, field: str, limit: int, length: int, problem: Problem) -> None:
        if self._config.on_overflow == "error":
            remedy = "raise it, or "
            if field == "max_prompt_length" and limit == self._room:
                remedy = "the context and optim.token_budget leave no more beside a response; "
            raise UserError(
                f"privilege.{field}: problem {problem.id} needs {length} tokens, the limit is {limit}; {remedy}"
                "set privilege.on_overflow to 'trim' or 'drop'"
            )

    def _shot_block(self, shot: Problem) -> str:
        """The shot's own privilege: true under every control, so that a control changes one thing."""
        whole = tuple((n, text) for n, part in enumerate(self._parts) if (text := evidence(part, shot)))
        fitted = self._within_tokens(whole, shot)
        if fitted is None:
            return ""
        self._shot_cut += fitted[1]
        return self._block(fitted[0])
