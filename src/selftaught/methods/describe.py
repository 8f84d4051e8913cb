"""What a method is, for reading: all of it from the method's own file, so that it cannot disagree with the code.

The docstring gives a line on what it is, the equations, and paragraphs that begin with one of `LABELS`; the comment
`#:` beside each field says what the field is; who teaches and what must exist follow from `views` and `needs`.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from selftaught.methods.base import build, method_class, method_fields, names
from selftaught.records import View, privileged_views

LABELS = ("Sees", "Divergence", "Deviations", "Equals", "Criticism")
OWN_PAST = {"live": "the model itself, live", "initial": "the model itself as it began",
            "ema": "the model's own average", "snapshot": "the model's own snapshot", "external": "another model"}
# A group is two or more rollouts of one problem; a privilege exists where a rollout has something to be shown.
MUST_EXIST = {
    "reward": "a reward", "group": "groups", "privilege": "a privilege",
    "answer": "answers", "solution": "solutions", "feedback": "a reward that gives feedback",
}
COLUMNS = ("method", "what teaches", "what it sees", "divergence", "what must exist", "arXiv")
INTRODUCTION = """\
# Methods

Made by `selftaught methods --markdown > docs/methods.md` from the methods' own files; do not edit.

S is the student, y its sampled token, T the teacher, A a group-relative advantage, rho the ratio to the policy that
drew y, sg stop-gradient. Defaults are the papers', or the authors' code's where the paper has none (cispo's cap: TRL's
advice; demopsd's beta: one of four). "Equals" lines are tests. `selftaught methods NAME` prints one entry.
"""


@dataclass(frozen=True)
class Field:
    """A field of a method: its default as Python writes it, and what it is (empty where nobody said)."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Description:
    """One method. `body` is the docstring without its labelled paragraphs, `notes` are those by label."""

    name: str
    source: str
    body: str
    notes: Mapping[str, str]
    fields: tuple[Field, ...]
    views: Mapping[str, View]
    needs: tuple[str, ...]

    @property
    def teaches(self) -> str:
        """Who says which way to go."""
        verifier = ["the verifier"] if "reward" in self.needs else []
        teachers = [OWN_PAST[view.weights] for name, view in self.views.items() if name != "reference"]
        return ", and ".join(dict.fromkeys(verifier + teachers)) or "nobody"

    @property
    def sees(self) -> str:
        if "Sees" in self.notes or not self.views:
            return self.notes.get("Sees", "the rollout")
        return "a privilege" if privileged_views(self.views) else "the student's own prompt"

    @property
    def must_exist(self) -> str:
        external = ["another model"] if any(view.weights == "external" for view in self.views.values()) else []
        return ", ".join([*(MUST_EXIST.get(need, need) for need in self.needs), *external]) or "nothing"

    def row(self) -> tuple[str, ...]:
        """Its cells under `COLUMNS`."""
        divergence = self.notes.get("Divergence", "?")
        return self.name, self.teaches, self.sees, divergence, self.must_exist, self.source.removeprefix("arXiv ")


def describe(name: str) -> Description:
    """The method of that name, of `file.py:Class`, `module:Class` or an entry point.

    Raises:
        UserError: no such method.
    """
    cls: Any = method_class(name)
    body, notes = _parts(inspect.cleandoc(cls.__doc__ or ""))
    meanings = _meanings(cls)
    fields = tuple(Field(field, "required" if default is MISSING else repr(default), meanings.get(field, ""))
                   for field, default in method_fields(cls).items())
    arxiv = getattr(cls, "arxiv", None)
    needs = tuple(sorted(cls.needs, key=list(MUST_EXIST).index)) if cls.needs <= MUST_EXIST.keys() else tuple(cls.needs)
    return Description(name, f"arXiv {arxiv}" if arxiv else "no paper named", body, notes, fields, build(name).views,
                       needs)


def as_text(description: Description) -> str:
    """One method for a terminal."""
    d = description
    lines = [f"{d.name}, {d.source}", "", d.body, ""]
    lines += [f"{label:<13}{text}" for label, text in _facts(d)]
    if d.fields:
        width = max(len(f"{field.name} = {field.default}") for field in d.fields)
        lines += ["", "Fields, with their defaults:"]
        lines += [f"  {f'{field.name} = {field.default}':<{width}}  {field.meaning}".rstrip() for field in d.fields]
    lines += [f"  view {name}: {_view(view)}" for name, view in d.views.items()]
    for label in LABELS[2:]:
        if label in d.notes:
            lines += ["", textwrap.fill(f"{label}: {d.notes[label]}", 110)]
    return "\n".join(lines)


def as_markdown() -> str:
    """All methods that ship, as a page of documentation."""
    described = [describe(name) for name in names()]
    rows = [COLUMNS, ("---",) * len(COLUMNS), *((f"[`{d.name}`](#{d.name})", *d.row()[1:]) for d in described)]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    return "\n".join([INTRODUCTION, table, *map(_section, described)]) + "\n"


def _section(d: Description) -> str:
    summary, _, rest = d.body.partition("\n")
    lines = ["", f"## {d.name}", "", summary, "", _fenced(rest.strip("\n")), ""]
    lines += [f"- {label} {text}" for label, text in (*_facts(d), ("source:", d.source))]
    if d.fields:
        lines += ["", "| field | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{field.name}` | `{field.default}` | {_cell(field.meaning)} |" for field in d.fields]
    if d.views:
        lines += ["", "| view | what it is |", "| --- | --- |"]
        lines += [f"| `{name}` | {_view(view)} |" for name, view in d.views.items()]
    for label in LABELS[2:]:
        if label in d.notes:
            lines += ["", f"**{label}.** {_cell(d.notes[label])}"]
    return "\n".join(lines)


def _facts(d: Description) -> tuple[tuple[str, str], ...]:
    return (("teaches:", d.teaches), ("sees:", d.sees), ("divergence:", d.notes.get("Divergence", "?")),
            ("needs:", d.must_exist))


def _fenced(text: str) -> str:
    """Equations as code, prose as prose: a block is told by its indentation."""
    out = []
    for block in re.split(r"\n\s*\n", text):
        code = block.startswith("    ")
        out.append(f"```text\n{textwrap.dedent(block)}\n```" if code else block)
    return "\n\n".join(out)


def _view(view: View) -> str:
    often = {"ema": f", rate {view.rate}", "snapshot": f", every {view.every} steps"}.get(view.weights, "")
    return f"{view.weights} weights{often}; {view.context} prompt"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _parts(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring without its labelled paragraphs, and those by label, each on one line."""
    body: list[str] = []
    notes: dict[str, list[str]] = {}
    into = body
    for line in doc.splitlines():
        label, colon, text = line.partition(": ")
        if colon and label in LABELS:
            into = notes.setdefault(label, [])
            line = text
        into.append(line)
    return "\n".join(body).strip("\n"), {label: " ".join(" ".join(text).split()) for label, text in notes.items()}


def _meanings(cls: type) -> dict[str, str]:
    """What the comment `#:` beside each field says; nothing where the source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno is not None:
            comment = lines[node.end_lineno - 1][node.end_col_offset or 0 :].strip()
            if comment.startswith("#:"):
                found[node.target.id] = comment.removeprefix("#:").strip()
    return found
