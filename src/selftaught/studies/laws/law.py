"""What a law is here: a statement, and numbers that were each computed in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selftaught.report.page import Figure, Part, Table

COLUMNS = ("", "closed form", "found", "by", "difference", "")


@dataclass(frozen=True)
class Check:
    """One quantity from a closed form and as `by` found it; they agree where they differ by at most `tolerance`.

    `known`: the same numbers as an earlier calculation by other code printed them, to whose digits both must round.
    `control`: a statement that is false here and must be seen to be; it holds where the two differ by MORE than
    `tolerance`.
    """

    what: str
    closed: tuple[float, ...]
    found: tuple[float, ...]
    by: str
    tolerance: float
    known: tuple[str, ...] = ()
    control: bool = False

    @property
    def difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.closed, self.found, strict=True))

    @property
    def holds(self) -> bool:
        as_known = all(rounded(x, text) == text for side in (self.closed, self.found)
                         for x, text in zip(side, self.known, strict=True)) if self.known else True
        return as_known and (self.difference > self.tolerance if self.control else self.difference <= self.tolerance)

    @property
    def verdict(self) -> str:
        if not self.holds:
            return "FAILS"
        if self.control:
            return "differs, as it must"
        if not self.known:
            return "agrees"
        return f"agrees, also with the known {', '.join(self.known) if len(self.known) <= 3 else len(self.known)}"

    def row(self) -> tuple[str, ...]:
        return self.what, shown(self.closed), shown(self.found), self.by, f"{self.difference:.1g}", self.verdict

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "closed": self.closed, "found": self.found, "by": self.by,
                "difference": self.difference, "tolerance": self.tolerance, "known": self.known,
                "control": self.control, "holds": self.holds}


def check(what: str, closed: Any, found: Any, by: str, tolerance: float, *, known: Sequence[str] = (),
          control: bool = False) -> Check:
    """A `Check` of two tensors, numbers or lists of numbers of one shape."""
    a, b = numbers(closed), numbers(found)
    assert len(a) == len(b), f"{what}: {len(a)} and {len(b)} numbers"
    return Check(what, a, b, by, tolerance, tuple(known), control)


@dataclass(frozen=True)
class Law:
    """A statement with its source, what was computed, and what follows. `data`: further numbers, for results.json."""

    name: str
    title: str
    says: Sequence[str]
    checks: Sequence[Check]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    data: dict[str, Any] = field(default_factory=dict)

    def table(self) -> Table:
        return Table("Each number in two ways.", COLUMNS, [check.row() for check in self.checks])

    def part(self) -> Part:
        return Part(self.title, self.says, [self.table(), *self.tables], self.figures)

    def lines(self) -> list[str]:
        """For a terminal."""
        out = ["", self.title, *self.table().lines()]
        for table in self.tables:
            out += ["", table.caption, *table.lines()]
        return out

    def as_json(self) -> dict[str, Any]:
        tables = [{"caption": t.caption, "columns": list(t.columns), "rows": [list(r) for r in t.rows]}
                  for t in self.tables]
        curves = {f.name: {line.label: [list(p) for p in line.points] for line in f.lines} for f in self.figures}
        return {"title": self.title, "checks": [check.as_json() for check in self.checks], "tables": tables,
                "figures": curves, **self.data}


def numbers(values: Any) -> tuple[float, ...]:
    """As plain floats, one after another."""
    return tuple(torch.as_tensor(values, dtype=torch.float64).detach().flatten().tolist())


def rounded(value: float, text: str) -> str:
    """`value` with as many decimals as `text` has, and without the leading 0 where that has none."""
    shown = f"{value:.{len(text.partition('.')[2])}f}"
    return shown.removeprefix("0") if text.startswith(".") else shown


def shown(values: Sequence[float]) -> str:
    """Up to four numbers, or how many there are and between which two."""
    if len(values) <= 4:
        return ", ".join(f"{value:.5g}" for value in values)
    return f"{len(values)} numbers, {min(values):.3g} to {max(values):.3g}"


def points(xs: Sequence[float] | Tensor, ys: Sequence[float] | Tensor) -> list[tuple[float, float]]:
    return list(zip(numbers(xs), numbers(ys), strict=True))
