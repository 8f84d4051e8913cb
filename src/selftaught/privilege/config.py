"""The `privilege:` section of a recipe, its check against the data, and what each kind reads from a problem."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from selftaught.errors import UserError, nearest
from selftaught.records import Problem, Section, lookup

Base = Literal["answer", "solution", "hint", "demonstration", "parts"]
PartKind = Literal["answer", "solution", "hint", "demonstration", "feedback"]
Kind = Literal[
    "answer", "solution", "hint", "demonstration", "feedback", "parts", "other_problem", "wrong", "empty"
]  # fmt: skip
Control = Literal["right", "wrong", "other_problem", "empty"]

TEMPLATES: Mapping[str, str] = {
    "answer": "Hint: the answer is {privilege}.",
    "solution": "A correct solution: {privilege}",
    "hint": "Hint: {privilege}",
    "demonstration": "A correct solution: {privilege}",
    "feedback": "Feedback on an earlier attempt: {privilege}",
}
HINT_COLUMNS = ("privileged_context", "hint")  # TRL's name first


class Evidence(Section):
    """Where evidence is read from, and the words around it."""

    kind: str = "answer"
    column: str | None = Field(None, description="hint: the column that holds it; empty: privileged_context, or hint")
    template: str | None = Field(
        None, description="text of the block, with {privilege} where the evidence goes; empty: a default for the kind"
    )
    choose: Literal["first", "random", "shortest", "nearest"] = Field(
        "first", description="demonstration: which success; nearest: the one most like the rollout itself, by the "
        "longest common subsequence of words and signs, thinking aside"
    )  # fmt: skip
    exclude_self: bool = Field(
        True, description="demonstration: never the rollout itself; with nearest and distinct, nor its very text"
    )
    distinct: bool = Field(
        True, description="demonstration: siblings with one text are one; false: each counts as it was sampled, so "
        "that what most of them did is shown most"
    )  # fmt: skip
    strip_thinking: bool = Field(True, description="demonstration: without <think>...</think>")
    threshold: float | None = Field(
        None, description="demonstration: a sibling succeeded from this score on; empty: where its status is right"
    )

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None and "{privilege}" not in template:
            raise ValueError("must contain {privilege}, where the evidence goes")
        return template

    @property
    def base(self) -> str:
        """The kind whose evidence and template are used."""
        return self.kind

    def block(self, evidence: str) -> str:
        """The text that is inserted for `evidence`."""
        return (self.template or TEMPLATES[self.base]).replace("{privilege}", evidence)


class Part(Evidence):
    """One kind of evidence of several in a block."""

    kind: PartKind = Field(description="what the teacher is shown")


class PrivilegeConfig(Evidence):
    """What the teacher sees beside the question, and how much of it.

    One kind, or `parts`: several in one block in the order given, under one budget. `wrong` (the privilege of a problem
    with another answer), `other_problem` (the privilege of any other problem) and `empty` are controls, of a kind or of
    parts. They change the query's block alone: the shots keep their true privilege (`empty`: none), and a rollout whose
    siblings all failed goes without a teacher under a control `of: demonstration` as it does under demonstrations.
    """

    kind: Kind = Field("answer", description="what the teacher is shown; `parts` where those are given")
    of: Base = Field("answer", description="what `wrong` and `other_problem` draw: the kind that they are a control of")
    parts: tuple[Part, ...] = Field(
        (), description="several kinds, such as [{kind: answer}, {kind: hint}]; a part that a problem lacks is left out"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="tokens of evidence, without the marker; earlier parts are kept first; empty: no limit"
    )
    max_prompt_length: int | None = Field(
        None, ge=1, description="tokens of the privileged prompt; empty: what the context leaves"
    )
    on_overflow: Literal["error", "drop", "trim"] = Field(
        "trim", description="evidence over a limit: stop, go without a privilege, or cut its end and mark the cut"
    )
    count: int = Field(1, ge=1, le=64, description="demonstration: how many, or as many as there are")
    combine: Literal["average", "mixture", "together"] = Field(
        "average", description="of several demonstrations: a teacher for each, their losses averaged or their "
        "probabilities mixed; or one teacher that sees them together"
    )  # fmt: skip

    thinking: bool | None = Field(
        None, description="`enable_thinking` of the chat template in the teacher's prompt; empty: as in the student's"
    )

    @model_validator(mode="before")
    @classmethod
    def _parts_name_the_kind(cls, value: Any) -> Any:
        """`{parts: [answer, hint]}` is short for {kind: parts, parts: [{kind: answer}, {kind: hint}]}.

        A control with parts is of them: `of` may be left out, or at its default, as a resolved recipe has it.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("parts"), list | tuple) or not value["parts"]:
            return value
        parts = [{"kind": part} if isinstance(part, str) else part for part in value["parts"]]
        if value.get("kind") in ("wrong", "other_problem") and value.get("of", "answer") == "answer":
            return {**value, "of": "parts", "parts": parts}
        return {"kind": "parts", **value, "parts": parts}

    @model_validator(mode="after")
    def _consistent(self) -> PrivilegeConfig:
        if self.parts and (self.kind not in ("empty", "parts") and self.base != "parts"):
            raise ValueError(f"privilege.kind = {self.kind!r}: with parts, the kinds are theirs; leave kind out, or "
                             "let it be a control (wrong, other_problem, empty)")
        if self.base == "parts" and not self.parts:
            raise ValueError("privilege.parts: there are none; give some, such as [{kind: answer}, {kind: hint}], or "
                             "another kind")
        for name, field in Evidence.model_fields.items():
            if self.parts and name != "kind" and getattr(self, name) != field.default:
                raise ValueError(f"privilege.{name}: with parts, it belongs into the part that it is meant for")
        if self.count > 1 and self.kind != "empty" and all(part.kind != "demonstration" for part in pieces(self)):
            raise ValueError(f"privilege.count = {self.count}: only demonstrations are several; use kind: "
                             "demonstration, or count: 1")
        return self

    @property
    def base(self) -> Kind:
        """The kind whose evidence and template are used: that which a control is a control of, else the kind itself."""
        return self.of if self.kind in ("wrong", "other_problem") else self.kind

    @property
    def teachers(self) -> int:
        """How many contexts a rollout may have, each with a teacher of its own."""
        return 1 if self.combine == "together" else self.count


def pieces(config: PrivilegeConfig) -> tuple[Part, ...]:
    """The parts of the block in order; one for a single kind, none for `empty`."""
    if config.kind == "empty" or config.parts:
        return () if config.kind == "empty" else config.parts
    return (_single(config, config.base),)


def demonstration_of(config: PrivilegeConfig) -> Part:
    """The demonstration that a control is a control of."""
    return _single(config, "demonstration")


def _single(config: PrivilegeConfig, kind: str) -> Part:
    return Part(**{name: getattr(config, name) for name in Evidence.model_fields} | {"kind": kind})


def control(config: PrivilegeConfig, kind: Control) -> PrivilegeConfig:
    """`config` as one of the controls, or "right": itself, in the form that needs no rollouts.

    A demonstration is then the problem's own solution or answer; feedback, which only rollouts have, is the answer, or
    the part is left out where others remain.
    """
    if parts := tuple(part for part in config.parts if part.kind != "feedback"):
        return config.model_copy(update={"kind": "parts" if kind == "right" else kind, "of": "parts", "parts": parts})
    without_rollouts = config.base in ("answer", "solution", "hint", "demonstration")
    base = config.base if without_rollouts else "answer"
    template = config.template if without_rollouts else None
    return config.model_copy(
        update={"kind": base if kind == "right" else kind, "of": base, "template": template, "parts": ()}
    )


def evidence(part: Part, problem: Problem) -> str | None:
    """What `part` shows of the problem itself, without rollouts; None where the problem has no such thing."""
    if part.kind == "answer":
        return problem.answer
    if part.kind == "solution":
        return problem.solution
    if part.kind == "demonstration":
        return problem.solution or problem.answer
    if part.kind == "hint":
        return _hint(part, problem)
    return None


def block(config: PrivilegeConfig, problem: Problem) -> str:
    """The block of the problem's own evidence, uncut; "" where it has none."""
    shown = [(part, evidence(part, problem)) for part in pieces(config)]
    return "\n".join(part.block(text) for part, text in shown if text)


def has_any(config: PrivilegeConfig, problem: Problem) -> bool:
    """Does the problem itself have any part of this privilege?"""
    return any(evidence(part, problem) for part in pieces(config))


def check(config: PrivilegeConfig, problems: Sequence[Problem]) -> None:
    """Raise UserError where the data cannot give this privilege, or a part of it, to any problem. Needs no model."""
    controls = config.kind in ("wrong", "other_problem")
    for number, part in enumerate(pieces(config)):
        place = f"parts.{number}.kind" if config.parts else "of" if controls else "kind"
        if part.kind != "feedback" and (controls or part.kind != "demonstration"):
            _check_part(part, f"privilege.{place}", problems)
    if not controls:
        return
    given = [problem for problem in problems if has_any(config, problem)]
    if not given:
        raise UserError(f"privilege.kind: {config.kind!r} of feedback, which only a rollout has; use 'empty'")
    if config.kind == "other_problem" and len(given) < 2:
        raise UserError("privilege.kind: 'other_problem' needs at least two problems with a privilege; give more data")
    if config.kind == "wrong" and not any(differs(config, given[0], other) for other in given):
        raise UserError("privilege.kind: 'wrong' needs different answers, and all are the same; use 'empty'")


def _check_part(part: Part, field: str, problems: Sequence[Problem]) -> None:
    if any(evidence(part, problem) for problem in problems):
        return
    names = sorted({name for problem in problems for name in problem.columns})
    if part.kind == "hint" and part.column is not None:
        raise UserError(f"{field.rpartition('.')[0]}.column: no problem has anything in a column {part.column!r}; "
                        f"{nearest(part.column, names)}")
    remedy = {
        "answer": "name its column: `data.columns: {answer: NAME}`",
        "solution": "name its column: `data.columns: {solution: NAME}`, or use kind: answer",
        "demonstration": "name a column of solutions or answers: `data.columns: {answer: NAME}`",
        "hint": f"name it: `privilege.column: NAME` (columns: {', '.join(names)})",
    }[part.kind]
    raise UserError(f"{field}: {part.kind!r}, but no problem has one; {remedy}")


def differs(config: PrivilegeConfig, problem: Problem, other: Problem) -> bool:
    """Whether the privilege of `other` is wrong for `problem`: every part another text, and another answer where both
    have one.
    """
    both = [(evidence(part, problem), evidence(part, other)) for part in pieces(config)]
    if other.id == problem.id or not any(theirs for _, theirs in both):
        return False
    if any(theirs and _normal(mine) == _normal(theirs) for mine, theirs in both):
        return False
    return problem.answer is None or other.answer is None or _normal(problem.answer) != _normal(other.answer)


def _normal(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def _hint(part: Part, problem: Problem) -> str | None:
    for name in HINT_COLUMNS if part.column is None else (part.column,):
        value = lookup(problem.columns, name)
        if value not in (None, "", [], {}):
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return None
