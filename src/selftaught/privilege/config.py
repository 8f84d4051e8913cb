"""The `privilege:` section of a recipe, its check against the data, and what each kind reads from a problem."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from selftaught.errors import UserError, nearest
from selftaught.records import Problem, Section

Base = Literal["answer", "solution", "hint", "demonstration"]
Kind = Literal["answer", "solution", "hint", "demonstration", "feedback", "other_problem", "wrong", "empty"]
Control = Literal["right", "wrong", "other_problem", "empty"]

TEMPLATES: Mapping[str, str] = {
    "answer": "Hint: the answer is {privilege}.",
    "solution": "A correct solution: {privilege}",
    "hint": "Hint: {privilege}",
    "demonstration": "A correct solution: {privilege}",
    "feedback": "Feedback on an earlier attempt: {privilege}",
}
HINT_COLUMNS = ("privileged_context", "hint")  # TRL's name first


class PrivilegeConfig(Section):
    """What the teacher sees beside the question, and how much of it.

    `wrong` (the privilege of a problem with another answer), `other_problem` (the privilege of any other problem) and
    `empty` are controls. They change the query's block alone: the shots keep their true privilege (`empty`: none).
    """

    kind: Kind = Field("answer", description="what the teacher is shown")
    of: Base = Field("answer", description="what `wrong` and `other_problem` draw: the kind that they are a control of")
    column: str | None = Field(None, description="hint: the column that holds it; empty: privileged_context, or hint")
    template: str | None = Field(
        None, description="text of the block, with {privilege} where the evidence goes; empty: a default for the kind"
    )
    max_tokens: int | None = Field(None, ge=1, description="tokens of evidence, without the marker; empty: no limit")
    max_prompt_length: int | None = Field(None, ge=1, description="tokens of the privileged prompt; empty: no limit")
    on_overflow: Literal["error", "drop", "trim"] = Field(
        "trim", description="evidence over a limit: stop, go without a privilege, or cut its end and mark the cut"
    )
    choose: Literal["first", "random", "shortest"] = Field("first", description="demonstration: which success")
    exclude_self: bool = Field(True, description="demonstration: never a rollout's own text")
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
    def base(self) -> Kind:
        """The kind whose evidence and template are used: that which a control is a control of, else the kind itself."""
        return self.of if self.kind in ("wrong", "other_problem") else self.kind

    def block(self, evidence: str) -> str:
        """The text that is inserted for `evidence`."""
        return (self.template or TEMPLATES[self.base]).replace("{privilege}", evidence)


def control(config: PrivilegeConfig, kind: Control) -> PrivilegeConfig:
    """`config` as one of the controls, or "right": itself, in the form that needs no rollouts.

    A demonstration is then the problem's own solution or answer, and feedback, which only rollouts have, the answer.
    """
    without_rollouts = config.base in get_args(Base)
    base = config.base if without_rollouts else "answer"
    template = config.template if without_rollouts else None
    return config.model_copy(update={"kind": base if kind == "right" else kind, "of": base, "template": template})


def evidence(config: PrivilegeConfig, problem: Problem) -> str | None:
    """What `config` shows of the problem itself, without rollouts; None where the problem has no such thing."""
    if config.base == "answer":
        return problem.answer
    if config.base == "solution":
        return problem.solution
    if config.base == "demonstration":
        return problem.solution or problem.answer
    if config.base == "hint":
        return _hint(config, problem)
    return None


def check(config: PrivilegeConfig, problems: Sequence[Problem]) -> None:
    """Raise UserError where the data cannot give this privilege to any problem. Needs no model."""
    if config.kind in ("demonstration", "feedback", "empty"):
        return
    names = sorted({name for problem in problems for name in problem.columns})
    column = config.column
    if config.base == "hint" and column is not None and not any(_hint(config, problem) for problem in problems):
        raise UserError(f"privilege.column: no problem has anything in a column {column!r}; {nearest(column, names)}")
    given = [problem for problem in problems if evidence(config, problem)]
    field = "privilege.of" if config.kind in ("wrong", "other_problem") else "privilege.kind"
    if not given:
        remedy = {
            "answer": "name its column: `data.columns: {answer: NAME}`",
            "solution": "name its column: `data.columns: {solution: NAME}`, or use kind: answer",
            "demonstration": "name a column of solutions or answers: `data.columns: {answer: NAME}`",
            "hint": f"name it: `privilege.column: NAME` (columns: {', '.join(names)})",
        }[config.base]
        raise UserError(f"{field}: {config.base!r}, but no problem has one; {remedy}")
    if config.kind == "other_problem" and len(given) < 2:
        raise UserError("privilege.kind: 'other_problem' needs at least two problems with a privilege; give more data")
    if config.kind == "wrong" and not any(differs(config, given[0], other) for other in given):
        raise UserError("privilege.kind: 'wrong' needs different answers, and all are the same; use 'empty'")


def differs(config: PrivilegeConfig, problem: Problem, other: Problem) -> bool:
    """Whether the privilege of `other` is wrong for `problem`: another text, and another answer where both have one."""
    mine, theirs = evidence(config, problem), evidence(config, other)
    if not theirs or other.id == problem.id or _normal(mine) == _normal(theirs):
        return False
    return problem.answer is None or other.answer is None or _normal(problem.answer) != _normal(other.answer)


def _normal(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def _hint(config: PrivilegeConfig, problem: Problem) -> str | None:
    for name in HINT_COLUMNS if config.column is None else (config.column,):
        value = _reach(problem.columns, name)
        if value not in (None, "", [], {}):
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return None


def _reach(columns: Mapping[str, Any], path: str) -> Any:
    """The value of a column; dots reach into dictionaries, as in `data.columns`."""
    if path in columns:
        return columns[path]
    value: Any = columns
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
