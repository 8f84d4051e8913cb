"""Every field of a recipe, for reading: made of the sections themselves, so that it cannot disagree with them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from selftaught.errors import UserError, nearest
from selftaught.run import Run

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null", Any: "anything"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "of length at least"}
INTRODUCTION = """\
# The recipe

Made by `selftaught recipe --markdown > docs/recipe.md` from the sections' own classes; do not edit.

A recipe is a YAML file of these keys. `key.field=value` on the command line sets one, and `selftaught.train(...)` takes
the same names. `selftaught recipe KEY` prints a section. Beside `name`, the section `method` takes the fields and views
of the method ([methods.md](methods.md)).
"""


@dataclass(frozen=True)
class Row:
    """One field: what may be written there, what it is if nothing is, and what it means."""

    field: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Part:
    """One section: where it stands in a recipe ("" is the recipe itself), what it is, and its fields."""

    path: str
    about: str
    rows: tuple[Row, ...]


def parts() -> list[Part]:
    """All sections, each before those inside it."""
    return list(_parts(Run, ""))


def as_text(path: str | None = None) -> str:
    """The fields for a terminal: all of them, or those of one section and of what is inside it.

    Raises:
        UserError: no such section.
    """
    shown = [part for part in parts() if path is None or f"{part.path}.".startswith(f"{path}.")]
    if not shown:
        raise UserError(f"recipe {path!r}: there is no such section; {nearest(str(path), [p.path for p in parts()])}")
    lines = []
    for part in shown:
        rows = [(f"{part.path}.{row.field}".lstrip("."), row) for row in part.rows]
        lines += ["", *(f"{name} = {row.default}   ({row.type})\n    {row.meaning}" for name, row in rows)]
    return "\n".join(lines[1:])


def as_markdown() -> str:
    """All of it as a page of documentation."""
    lines = [INTRODUCTION]
    for part in parts():
        lines += [f"## `{part.path}`\n\n{part.about}\n"] if part.path else []
        lines += ["| field | what may stand there | default | what it is |", "| --- | --- | --- | --- |"]
        lines += [f"| `{row.field}` | {_cell(row.type)} | `{_cell(row.default)}` | {_cell(row.meaning)} |"
                  for row in part.rows]
        lines.append("")
    return "\n".join(lines)


def _parts(section: type[BaseModel], path: str) -> Iterator[Part]:
    fields = section.model_fields
    rows = tuple(Row(name, _type(field), _default(field), _meaning(field)) for name, field in fields.items())
    yield Part(path, " ".join(inspect.cleandoc(section.__doc__ or "").split()), rows)
    for name, field in fields.items():
        for inner in _sections(field.annotation):
            yield from _parts(inner, f"{path}.{name}".lstrip("."))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _type(field: FieldInfo) -> str:
    bounds = (f"{word} {getattr(rule, key):g}" for rule in field.metadata for key, word in BOUNDS.items()
              if getattr(rule, key, None) is not None)
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return " or ".join(str(word).lower() if isinstance(word, bool) else word for word in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is tuple:
        return f"list of {_words(arguments[0])}" if arguments[-1] is ... else f"{len(arguments)} numbers"
    if annotation in WORDS:
        return WORDS[annotation]
    return "section" if list(_sections(annotation)) else "mapping"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in value.model_fields_set}
    text = json.dumps(value, ensure_ascii=False)
    return text.strip('"') if re.fullmatch(r'"[\w./@-]+"', text) else text


def _meaning(field: FieldInfo) -> str:
    inner = next(_sections(field.annotation), None)
    return field.description or (inspect.cleandoc(inner.__doc__ or "").partition("\n\n")[0] if inner else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
