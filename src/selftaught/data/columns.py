"""From a source's rows to problems: which column is the prompt, which the answer, and what makes two problems equal."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selftaught.data.files import Row
from selftaught.errors import UserError, nearest
from selftaught.records import Message, Problem, lookup

# In order of preference; the names that TRL, verl, gsm8k and others use.
CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question", "query", "input", "instruction", "messages"),
    "answer": ("answer", "ground_truth", "reward_model.ground_truth", "target", "label", "final_answer"),
    "solution": ("solution", "reference", "rationale", "explanation", "reference_solution"),
}
GSM8K_ANSWER = re.compile(r"####[ \t]*(?P<answer>\S.*?)\s*$")


def digest(content: str) -> str:
    """The id of a problem with this canonical content: 32 hexadecimal digits."""
    normal = " ".join(unicodedata.normalize("NFC", content).split())
    return hashlib.sha256(normal.encode()).hexdigest()[:32]


def to_problems(source: str, rows: Sequence[Row], asked: Mapping[str, str]) -> tuple[list[Problem], dict[str, str]]:
    """The problems of `rows`, and the mapping from our names to the source's columns that was used.

    Raises UserError for a column that is not there and for a row without a prompt.
    """
    mapping = infer(source, rows, asked)
    problems = [_problem(row, mapping, lambda field, message: _fail(source, field, message)) for row in rows]
    return problems, mapping


def infer(source: str, rows: Sequence[Row], asked: Mapping[str, str]) -> dict[str, str]:
    """Our names -> the source's columns: `asked` first, then the first candidate that any row fills."""
    names = sorted({name for row in rows for name in row.values})
    mapping = {}
    for ours, candidates in CANDIDATES.items():
        if ours in asked:
            if not _filled(rows, asked[ours]):
                raise UserError(
                    f"data.columns.{ours}: {source} has no (or only an empty) column {asked[ours]!r}; "
                    f"{nearest(asked[ours], names)}"
                )
            mapping[ours] = asked[ours]
        else:
            found = next((name for name in candidates if _filled(rows, name)), None)
            if found is not None:
                mapping[ours] = found
    if "prompt" not in mapping:
        raise UserError(
            f"data.columns: no prompt column in {source} (columns: {', '.join(names)}); "
            "say which one it is: `columns: {prompt: NAME}`"
        )
    if "answer" not in mapping and "solution" in mapping:
        mapping["answer"] = mapping["solution"]  # as in TRL, whose `solution` holds what the reward compares to
    return mapping


def _filled(rows: Sequence[Row], path: str) -> bool:
    return any(lookup(row.values, path) not in (None, "", []) for row in rows)


def _fail(source: str, field: str, message: str) -> UserError:
    return UserError(f"data.{field}: {source}, {message}")


def _problem(row: Row, mapping: Mapping[str, str], fail: Callable[[str, str], UserError]) -> Problem:
    raw = lookup(row.values, mapping["prompt"])
    column = mapping["prompt"]
    answer = _string(lookup(row.values, mapping["answer"])) if "answer" in mapping else None
    solution = _string(lookup(row.values, mapping["solution"])) if "solution" in mapping else None
    prompt: str | tuple[Message, ...]
    if isinstance(raw, list):
        prompt, last = _messages(raw, row, column, fail)
        answer = last if answer is None else answer
        content = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    elif raw is None or not str(raw).strip():
        raise fail("columns.prompt", f"{row.where}: the prompt (column {column!r}) is empty; fill it or delete the row")
    else:
        prompt = content = str(raw)
    try:
        identity = digest(content)
    except UnicodeEncodeError as error:
        raise fail("source", f"{row.where}: the prompt is not valid Unicode ({error.reason}); mend that row") from error
    if answer is not None and (final := GSM8K_ANSWER.search(answer)):
        solution, answer = solution or answer, final["answer"]
    return Problem(id=identity, prompt=prompt, answer=answer, solution=solution, columns=dict(row.values))


def _messages(
    raw: list[Any], row: Row, column: str, fail: Callable[[str, str], UserError]
) -> tuple[tuple[Message, ...], str | None]:
    """Chat messages without a trailing assistant message, and that message's text: it is the answer."""
    messages: list[dict[str, str]] = []
    for item in raw:
        if not (isinstance(item, Mapping) and isinstance(item.get("role"), str)):
            raise fail("columns.prompt", f"{row.where}: column {column!r} is a list, but not one of chat messages")
        messages.append({"role": item["role"], "content": _content(item.get("content"), row, fail)})
    last = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise fail("columns.prompt", f"{row.where}: no user message with text in column {column!r}")
    return tuple(messages), last


def _content(content: Any, row: Row, fail: Callable[[str, str], UserError]) -> str:
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise fail("columns.prompt", f"{row.where}: a chat message's content must be text, got {kind}")
    return content


def _string(value: Any) -> str | None:
    """A column's value as text: None for an empty one, JSON for lists and dictionaries."""
    if value is None or value == "":
        return None
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
