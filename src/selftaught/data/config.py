"""The `data:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from selftaught.records import Section

OURS = ("prompt", "answer", "solution")


def _known(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in OURS:
            raise ValueError(f"unknown name {name!r}: the names on the left are {', '.join(OURS)}")
    return columns


class Part(Section):
    """One source of a mixture."""

    source: str = Field(description="as in `data.source`")
    weight: float = Field(1.0, gt=0, description="share of the problems, relative to the other parts")
    columns: dict[str, str] = Field(default_factory=dict, description="as in `data.columns`, for this part alone")

    _check_columns = field_validator("columns")(_known)


class DataConfig(Section):
    """What to solve, how it is split, and how a problem becomes a prompt."""

    source: str | tuple[Part, ...] = Field(
        description="a file (.jsonl .json .parquet .csv), a folder saved by `datasets`, a Hub name (`owner/name`, or "
        "`owner/name:config`), `gym:TASK?key=value&...`, `graphs:KIND?key=value&...` (concept graphs), one of these as "
        "`sciknoweval:SOURCE?domain=...&level=...` or "
        "`gpqa:SOURCE?domain=...` (their columns, options in a drawn order), or a list of {source, weight}"
    )
    split: str = Field("train", description="which split of a Hub name or of a saved DatasetDict")
    train: int | None = Field(None, ge=1, description="training problems; empty: all that remain (gym, graphs: 2000)")
    heldout: int = Field(256, ge=0, description="held-out problems, never trained on")
    shots: int = Field(0, ge=0, description="few-shot examples, from problems that are in neither split")
    template: Literal["auto", "chat", "completion"] = Field(
        "auto", description="auto: chat where the tokenizer has a chat template, else completion"
    )
    system_prompt: str | None = Field(None, description="system message; in a completion, text before the shots")
    question: str = Field("Question: {question}\n", description="completion: the part that asks")
    answer: str = Field("Answer:", description="completion: the part after which the model writes")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our name (prompt, answer, solution) -> the source's column; dots reach into dictionaries",
    )
    max_prompt_length: int | None = Field(None, ge=1, description="tokens of a student prompt; empty: no limit")
    on_overflow: Literal["error", "drop", "trim"] = Field(
        "error", description="a prompt that is too long: stop, leave the problem out, or leave few-shot examples out"
    )
    thinking: bool | None = Field(None, description="`enable_thinking` of the chat template; empty: not passed")

    _check_columns = field_validator("columns")(_known)

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str | tuple[Part, ...]) -> str | tuple[Part, ...]:
        if not source:
            raise ValueError("needs at least one source")
        return source

    @field_validator("question")
    @classmethod
    def _check_question(cls, question: str) -> str:
        if "{question}" not in question:
            raise ValueError("must contain {question}, where the problem's own text goes")
        return question

    def parts(self) -> tuple[Part, ...]:
        """The sources as a mixture; a single source is a mixture of one."""
        return (Part(source=self.source),) if isinstance(self.source, str) else self.source
