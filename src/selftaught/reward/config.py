"""The `reward` section of a recipe."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from selftaught.errors import UserError, nearest
from selftaught.records import Section
from selftaught.reward.verifiers import VERIFIERS

BUILT_IN = (*VERIFIERS, "length")
_RULES = ("whole", "last_line", "last_number", "boxed", "regex", "after:TEXT")
_TAKES = {
    "exact": {"extract", "pattern", "ignore_case"},
    "numeric": {"extract", "pattern", "tolerance"},
    "choice": {"extract", "pattern"},
    "regex": {"pattern", "ignore_case"},
    "math": {"extract", "pattern"},
    "gym": {"extract", "pattern"},
    "format": {"pattern"},
    "length": {"max_length", "buffer"},
}
_FUNCTION_TAKES = {"batch", "options"}


class RewardPart(Section):
    """One term of the reward, such as `{name: numeric, extract: last_number, weight: 0.9}`."""

    name: str = Field(
        description=f"A built-in verifier ({', '.join(BUILT_IN)}), `file.py:function` or `package.module:function`."
    )
    weight: float = Field(1.0, description="Factor of this part's score in the sum.", allow_inf_nan=False)
    extract: str | None = Field(
        None, description=f"Where the answer stands: {', '.join(_RULES)}; each verifier has its own default."
    )
    pattern: str | None = Field(None, description="Regular expression of `regex`, `format` and `extract: regex`.")
    tolerance: float = Field(0.0, ge=0.0, description="numeric: absolute or relative error allowed, 0 is exact.")
    ignore_case: bool = Field(False, description="exact, regex: compare without regard to case.")
    max_length: int | None = Field(
        None, ge=1, description="length: tokens at which the penalty is whole; by default max_completion_length."
    )
    buffer: int | None = Field(
        None, ge=1, description="length: tokens before max_length over which it grows; by default a fifth of it."
    )
    batch: bool = Field(False, description="A function: one call for all completions, so that a hang costs them all.")
    options: dict[str, Any] = Field({}, description="A function: further keyword arguments.")

    @property
    def is_function(self) -> bool:
        return self.name not in BUILT_IN

    @model_validator(mode="after")
    def _consistent(self) -> RewardPart:
        if self.is_function and not all(self.name.rpartition(":")[::2]):
            raise UserError(
                f"{self.name!r} is neither a verifier ({nearest(self.name, BUILT_IN)}) nor `file.py:function`"
            )
        takes = {"name", "weight"} | _TAKES.get(self.name, _FUNCTION_TAKES)
        for field, info in type(self).model_fields.items():
            if field not in takes and getattr(self, field) != info.default:
                raise UserError(f"`{self.name}` does not take `{field}`; it takes {', '.join(sorted(takes))}")
        rule = self.extract
        if rule is not None and rule not in _RULES[:-1] and not (rule.startswith("after:") and rule != "after:"):
            raise UserError(f"extract: {rule!r} is no rule ({nearest(rule, _RULES)})")
        needs_pattern = self.name in ("regex", "format") or rule == "regex"
        if needs_pattern and not self.pattern:
            raise UserError(f"`{self.name}` needs `pattern`, a regular expression")
        if self.pattern and not needs_pattern:
            raise UserError(f"`{self.name}` uses `pattern` only with `extract: regex`")
        if None not in (self.max_length, self.buffer) and self.buffer > self.max_length:  # type: ignore[operator]
            raise UserError(f"buffer: {self.buffer} is over max_length: {self.max_length}")
        return self

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class RewardConfig(Section):
    """How rollouts are scored: a weighted sum of parts, of which the first is the main one.

    Short forms: `reward: gym`, `reward: rewards.py:score`, `reward: {name: numeric, tolerance: 0.01}` and
    `reward: [{name: math, weight: 0.9}, {name: format, pattern: "^<think>.*</think>", weight: 0.1}]`. In the third,
    fields of this section may stand beside those of the part.

    A function gets every column of the data by its own name, and as `answer` and `solution` what the run found to be
    them, the same as the built-in verifiers compare with; a column of such a name that says something else (GSM8K's
    whole working) is `raw_answer` or `raw_solution`. A number that it returns is right from 1.0 on.
    """

    parts: tuple[RewardPart, ...] = Field(min_length=1, description="The terms; the first one gives status and answer.")
    timeout: float = Field(10.0, gt=0.0, allow_inf_nan=False, description="Seconds per completion and part.")
    memory_mb: int | None = Field(
        1024, ge=1, description="Address space that a worker may take beyond its start; null: no limit."
    )
    workers: int = Field(2, ge=1, description="Worker processes, each verifying one completion at a time.")
    shuffle: bool = Field(False, description="A control: deal each step's scores out anew; nothing may be learned.")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"parts": ({"name": value},)}
        if isinstance(value, (list, tuple)):
            return {"parts": tuple({"name": part} if isinstance(part, str) else part for part in value)}
        if isinstance(value, Mapping) and "name" in value and "parts" not in value:
            ours = {key: item for key, item in value.items() if key in cls.model_fields}
            return {"parts": ({key: item for key, item in value.items() if key not in ours},), **ours}
        return value

    @classmethod
    def parse(cls, value: Any) -> RewardConfig:
        """A config out of any of the forms that a recipe may use. Raises pydantic's ValidationError."""
        return cls.model_validate(value)


def from_callables(value: Any) -> tuple[Any, dict[str, Callable[..., Any]]]:
    """Split what a Python caller may pass as `reward` into its recipe form and the functions that it names.

    A function at the top level of an importable module becomes "module:function" and is imported in the
    workers. Any other (of a script or a notebook, a lambda, a closure, a bound method) is kept in the mapping
    for `Rewarder(config, functions)`, under a name that no file can resolve.
    """
    functions: dict[str, Callable[..., Any]] = {}

    def named(part: Any) -> Any:
        if not callable(part):
            return part
        home, name = getattr(part, "__module__", None), getattr(part, "__qualname__", type(part).__name__)
        module = sys.modules.get(home or "")
        if home != "__main__" and inspect.isfunction(part) and getattr(module, name, None) is part:
            return f"{home}:{name}"
        key, number = f"{home}:{name}", 1
        while functions.get(key, part) is not part:
            number += 1
            key = f"{home}:{name}#{number}"
        functions[key] = part
        return key

    if isinstance(value, Sequence) and not isinstance(value, str):
        return [
            {**part, "name": named(part["name"])} if isinstance(part, Mapping) and "name" in part else named(part)
            for part in value
        ], functions
    return named(value), functions
