"""Multiple-choice science questions as published: `sciknoweval:SOURCE?key=value&...` and `gpqa:SOURCE?...`.

SOURCE is a file, a saved folder or a Hub name, read as any other. Rows are filtered by the keys and become problems
whose options stand in an order drawn for each problem. What is wrong with single rows is counted and said; a source
that lacks a column is refused with its name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from selftaught.data.columns import digest
from selftaught.data.files import Row, read
from selftaught.errors import UserError, nearest
from selftaught.records import Problem, lookup

LETTERS = "ABCDEFGHIJ"  # as many as the verifier `choice` knows
# SciKnowEval's multiple-choice types; the others (true_or_false, open-ended-qa, filling, ...) have no options.
CHOICES = ("mcq-4-choices", "mcq-2-choices")
WRONG = tuple(f"Incorrect Answer {number}" for number in (1, 2, 3))
_ABOVE = re.compile(
    r"\bthe\s+above\b|\b(?:all|none|any|both|neither|each)\s+(?:of\s+)?(?:above|these|those|them|the\s+options)\b", re.I
)
_NAMED = re.compile(
    r"\b(?:options?|choices?|answers?)\s+\(?[A-J]\b"
    r"|(?<![\w'])\(?[A-J]\)?\s*(?:,\s*|\s+(?:and|or|nor)\s+|\s*&\s*)\(?[A-J]\)?(?![\w'-])"
)


class Options(NamedTuple):
    """One row's question, its options in the file's order, and which of them is right."""

    question: str
    texts: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Format:
    """A published data set: its columns, and the keys that choose among its rows (key -> its columns, any of them)."""

    columns: tuple[str, ...]
    mapping: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]
    options: Callable[[Row], Options]
    split: str  # the Hub's only one
    ordered: bool  # do the options of a row stand in an order that means something?
    defaults: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Damaged(Exception):
    """A row that is no question; the message says why, to be read after "row 7"."""


def _sciknoweval(row: Row) -> Options:
    """SciKnowEval: `choices` is {text: [...], label: [...]}, or a list of {text, label}, also as JSON text."""
    choices = row.values.get("choices")
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except ValueError:
            raise Damaged("has choices that are not JSON") from None
    if isinstance(choices, list) and all(isinstance(one, Mapping) for one in choices):
        choices = {name: [one.get(name) for one in choices] for name in ("text", "label")}
    if not isinstance(choices, Mapping) or not choices.get("text") or not choices.get("label"):
        raise Damaged("has no choices of text and label")
    texts = tuple(_clean(text) for text in choices["text"])
    labels = [_clean(label).upper() for label in choices["label"]]
    if len(texts) != len(labels):
        raise Damaged(f"has {len(texts)} options under {len(labels)} labels")
    key = _clean(row.values.get("answerKey")).upper()
    if labels.count(key) != 1:
        raise Damaged(f"has the answerKey {key!r} among the labels {', '.join(labels)}")
    return Options(_clean(row.values.get("question")), texts, labels.index(key))


def _gpqa(row: Row) -> Options:
    """GPQA: the right answer and three wrong ones in columns of their own."""
    texts = tuple(_clean(row.values.get(name)) for name in ("Correct Answer", *WRONG))
    return Options(_clean(row.values.get("Question")), texts, 0)


FORMATS: Mapping[str, Format] = {
    # arXiv 2406.09098; hicai-zju/SciKnowEval. Its column `answer` is empty for multiple choice.
    "sciknoweval": Format(
        ("question", "choices", "answerKey"), {"prompt": "question", "answer": "answerKey"},
        {"domain": ("domain",), "level": ("details.level", "level"), "type": ("type",),
         "task": ("details.task", "task"), "subtask": ("details.subtask", "subtask")},
        _sciknoweval, "test", True, {"type": CHOICES},
    ),
    # arXiv 2311.12022; Idavidrein/gpqa with gpqa_extended, gpqa_main or gpqa_diamond.
    "gpqa": Format(
        ("Question", "Correct Answer", *WRONG),
        {"prompt": "Question", "answer": "Correct Answer", "solution": "Explanation"},
        {"domain": ("High-level domain",), "subdomain": ("Subdomain",)}, _gpqa, "train", False,
    ),
}  # fmt: skip


def is_science(source: str) -> bool:
    """Does `source` name one of the formats of this file?"""
    return source.partition(":")[0] in FORMATS and ":" in source


def load(source: str, split: str, given: bool, *, seed: int, say: Callable[[str], None]) -> list[Problem]:
    """The problems of `source`, duplicates among them, with their options in an order drawn by (seed, problem).

    The id is of the question and the set of its options, so that it is the same under every seed. `split` is read where
    it was `given`, else the only one that the Hub has. Raises UserError for an unknown key, a column that is missing, a
    value that no row has, and where no row is left.
    """
    form, name, place, shuffle, chosen = parse(source)
    there = Path(place).expanduser().exists()
    rows = read(place, split if given or there else form.split, given)
    _check_columns(source, form, rows, chosen)
    kept = _filter(source, form, rows, chosen)
    problems: list[Problem] = []
    damaged: list[str] = []
    unmoved = 0
    for row in kept:
        try:
            problem, moved = _problem(row, form, seed, shuffle)
        except Damaged as fault:
            damaged.append(f"{row.where} {fault}")
        else:
            problems.append(problem)
            unmoved += not moved
    if not problems:
        raise UserError(f"data.source: no row of {source} is a whole question: {'; '.join(damaged[:3])}")
    said = ", ".join(f"{key} {' or '.join(values)}" for key, values in chosen.items())
    line = f"data: {source}: {len(problems)} of {len(rows)} rows of {name}" + (f" ({said})" if said else "")
    if damaged:
        shown = "; ".join(damaged[:3]) + ("; ..." if len(damaged) > 3 else "")
        line += f"; {len(damaged)} left out: {shown}"
    if shuffle and unmoved:
        line += f"; {unmoved} keep the order of their options, which point at one another"
    say(line)
    return problems


def parse(source: str) -> tuple[Format, str, str, bool, dict[str, tuple[str, ...]]]:
    """The format, its name, where its rows are, whether options are shuffled, and the values asked for by key."""
    name, _, rest = source.partition(":")
    form = FORMATS[name]
    place, _, query = rest.partition("?")
    if not place:
        raise UserError(f"data.source: {source!r} says what the rows look like, but not where they are; write "
                        f"{name}:FILE or {name}:HUB_NAME, for example {name}:mine.jsonl?domain=Physics")
    shuffle, chosen = True, dict(form.defaults)
    for pair in filter(None, query.split("&")):
        key, _, value = (unquote(piece) for piece in pair.partition("="))
        if key not in (*form.keys, "shuffle"):
            raise UserError(f"data.source: {name} has no key {key!r} to choose by; "
                            f"{nearest(key, (*form.keys, 'shuffle'))}")
        if not value:
            raise UserError(f"data.source: {pair!r} in {source} has no value; write key=value")
        if key != "shuffle":
            chosen[key] = tuple(value.split(","))
        elif value not in ("true", "false") or (value == "false" and not form.ordered):
            why = "" if form.ordered else f", and {name} always lists the right one first, so it must be true"
            raise UserError(f"data.source: shuffle={value} in {source}: it is true or false{why}")
        else:
            shuffle = value == "true"
    return form, name, place, shuffle, chosen


def _check_columns(source: str, form: Format, rows: Sequence[Row], chosen: Iterable[str]) -> None:
    wanted = [(name,) for name in form.columns] + [form.keys[key] for key in chosen]
    missing = [" or ".join(names) for names in wanted if not any(_value(row, names) for row in rows)]
    if missing:
        names = sorted({name for row in rows for name in row.values})
        raise UserError(f"data.source: {source} has no column {', '.join(map(repr, missing))} (columns: "
                        f"{', '.join(names)}); give the data set as published, or leave the prefix out")


def _filter(source: str, form: Format, rows: Sequence[Row], chosen: Mapping[str, Sequence[str]]) -> list[Row]:
    """The rows that have one of the values of every key. Raises UserError for a value that no row has."""
    for key, values in chosen.items():
        there = Counter(_value(row, form.keys[key]) for row in rows)
        known = {_plain(name) for name in there}
        unknown = [value for value in values if _plain(value) not in known]
        if unknown and (values != form.defaults.get(key) or len(unknown) == len(values)):
            shown = ", ".join(f"{name} ({count} rows)" for name, count in sorted(there.items()) if name)
            raise UserError(f"data.source: no row of {source} has the {key} {unknown[0]!r}; there are {shown}")
    wanted = {key: {_plain(value) for value in values} for key, values in chosen.items()}
    kept = [row for row in rows if all(_plain(_value(row, form.keys[key])) in one for key, one in wanted.items())]
    if not kept:
        raise UserError(f"data.source: no row of {source} has all of what is asked for; ask for less")
    return kept


def _problem(row: Row, form: Format, seed: int, shuffle: bool) -> tuple[Problem, bool]:
    """The row as a problem, and whether its options were put into a drawn order."""
    question, texts, right = form.options(row)
    if not question:
        raise Damaged("has no question")
    if not all(texts) or not 2 <= len(texts) <= len(LETTERS):
        raise Damaged(f"has {len(texts)} options, {sum(not text for text in texts)} of them empty")
    if texts.count(texts[right]) > 1:
        raise Damaged(f"has its right option {texts[right]!r} twice")
    identity = digest("\n".join((question, *sorted(texts))))
    places = _order(identity, texts, seed, form.ordered) if shuffle else None
    shown = tuple(range(len(texts))) if places is None else places
    listed = "\n".join(f"{letter}: {texts[place]}" for letter, place in zip(LETTERS, shown, strict=False))
    solution = _clean(row.values.get(form.mapping["solution"])) if "solution" in form.mapping else ""
    problem = Problem(id=identity, prompt=f"{question}\n\n{listed}", answer=LETTERS[shown.index(right)],
                      solution=solution or None, columns=dict(row.values))
    return problem, places is not None


def _order(identity: str, texts: Sequence[str], seed: int, ordered: bool) -> tuple[int, ...] | None:
    """Which option stands where: uniform over orders, keyed by the seed, the problem and the option's own text.

    "None of the above" stays last. None where an option names others by letter, or means those above it and is not the
    last: any other order would change what it says. Where the file's order means nothing, no letter in it does.
    """
    above = [place for place, text in enumerate(texts) if _ABOVE.search(text)]
    if ordered and (any(_NAMED.search(text) for text in texts) or above not in ([], [len(texts) - 1])):
        return None

    def key(place: int) -> tuple[bool, bytes, int]:
        drawn = hashlib.sha256(f"{seed}/{identity}/{texts[place]}".encode()).digest()
        return place in above, drawn, place

    return tuple(sorted(range(len(texts)), key=key))


def _value(row: Row, names: Sequence[str]) -> str:
    """The row's text under the first of the columns that it fills."""
    found = (lookup(row.values, name) for name in names)
    value = next((value for value in found if value not in (None, "", [], {})), "")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _plain(value: str) -> str:
    """A value as it is compared: `Materials`, `material` and `Material` are one domain."""
    return value.strip().casefold().removesuffix("s")


def _clean(value: Any) -> str:
    return "" if value is None else str(value).strip()
