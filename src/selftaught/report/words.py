"""Results in words and rows: one wording for the report, the model card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARMS = {
    "other_prompt": "shown another problem's prompt",
    "teacher/plain": "the teacher itself",
    "teacher/right": "teacher, right privilege",
    "teacher/wrong": "teacher, wrong privilege",
    "teacher/empty": "teacher, empty privilege",
}
LABELS = {
    "distinct_answers": "distinct answers per problem",
    "length": "tokens per response",
    "length_p10": "tokens, tenth percentile",
    "length_p50": "tokens, median",
    "length_p90": "tokens, ninetieth percentile",
    "truncated": "share cut at the length limit",
}


@dataclass(frozen=True)
class MeasureRow:
    """One line of the before-and-after table; texts ready to print, "" where unknown."""

    label: str
    before: str
    after: str
    difference: str


LEVEL = 0.05  # of the sign test


def headline(results: Mapping[str, Any]) -> str | None:
    """The measure that the result is told in: pass@1, or the pass@k of the smallest k; None without one."""
    measured = {**(results.get("before") or {}), **(results.get("after") or {})}
    names = [name for name in measured if name.startswith("pass@")]
    return min(names, key=lambda name: int(name.removeprefix("pass@")), default=None)


def result_sentence(results: Mapping[str, Any]) -> str:
    """The result, plainly: what held-out accuracy was, is, and whether the difference is more than noise."""
    name = headline(results)
    before, after, difference = (results.get(part) or {} for part in ("before", "after", "difference"))
    if name is None:
        return "This run has no result yet: it was not evaluated before and after."
    if name not in after or name not in before or name not in difference:
        part, said = ("After", after) if name in after else ("Before", before)
        return f"{part} training, held-out {name} is {interval(said[name])} on {said.get('problems', '?')} problems."
    change = difference[name]
    verb = "did not change measurably"
    if change["value"] is not None and (change["low"] > 0 or change["high"] < 0):
        verb = "rose" if change["value"] > 0 else "fell"
        if change["p"] is not None and change["p"] >= LEVEL:  # a bootstrap over few problems is too sure of itself
            verb = f"may have {'risen' if change['value'] > 0 else 'fallen'}"
    problems = difference.get("problems", after.get("problems", "?"))
    sentence = (
        f"Held-out {name} {verb}: {number(before[name]['value'])} before, {number(after[name]['value'])} after, "
        f"a paired difference of {signed(change)} on {problems} problems (exact sign test {p_value(change['p'])})."
    )
    constant = best_constant(results)
    if constant.get("value") is None or after[name]["value"] is None:
        return sentence
    above = after[name]["value"] - constant["value"]
    where = f"{number(abs(above))} {'above' if above > 0 else 'below'}" if above else "no more than"
    said = f"the best constant answer ({constant['answer']!r}, {number(constant['value'])})"
    return f"{sentence} That is {where} {said}."


def measure_rows(results: Mapping[str, Any]) -> list[MeasureRow]:
    """The before-and-after table, without what says the same twice: maj@1, pass^1, and mean@k of scores 0 or 1."""
    before, after, difference = (results.get(part) or {} for part in ("before", "after", "difference"))
    names = [n for n in dict.fromkeys([*before, *after]) if _is_measure(before.get(n) or after.get(n))]
    order = {"pass@": 0, "pass^": 1, "maj@": 2, "mean@": 3}
    names = [n for n in names if n not in ("maj@1", "pass^1", "mean@1") and not _repeats_pass_at_1(n, before, after)]
    names.sort(key=lambda n: order.get(n.rstrip("0123456789"), 4))
    rows = []
    for name in names:
        change = difference.get(name)
        rows.append(
            MeasureRow(
                LABELS.get(name, name),
                interval(before.get(name)),
                interval(after.get(name)),
                signed(change) if change else "",
            )
        )
    statuses = dict.fromkeys([*(before.get("status") or {}), *(after.get("status") or {})])
    for status in statuses:
        rows.append(MeasureRow(f"responses {status}", _share(before, status), _share(after, status), ""))
    return rows


def result_table(results: Mapping[str, Any]) -> list[str]:
    """The measures before and after and the controls, as lines for a terminal; [] without any."""
    rows = [(row.label, row.before, row.after, row.difference) for row in measure_rows(results)]
    rows = [row for row in rows if row[1] or row[2]]
    if not rows:
        return []
    rows = [("held-out", "before", "after", "paired difference"), *rows]
    controls = [(f"{headline(results)} of controls", ""), *control_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = [[f"{cell:{width}}" for cell, width in zip(row, (*widths, 0), strict=True)] for row in rows]
    lines = ["  ".join(row) for row in padded]
    if len(controls) > 1:
        widest = max(widths[0], *(len(label) for label, _ in controls))
        lines += ["", *(f"{label:{widest}}  {value}" for label, value in controls)]
    return [line.rstrip() for line in lines]


def control_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what was shown to whom, its accuracy) of every control."""
    name = headline(results)
    controls: Mapping[str, Any] = results.get("controls") or {}
    return [(ARMS.get(arm, arm), interval(said.get(name))) for arm, said in controls.items() if name in said]


def best_constant(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """{value, answer}; the results' own entry, else the one measured after or before."""
    found = results.get("best_constant")
    if found is None:
        found = next(
            (r["best_constant"] for p in ("after", "before") if (r := results.get(p)) and "best_constant" in r), None
        )
    if found is None or isinstance(found, int | float):
        return {"value": found, "answer": None}
    return found


def number(value: float | None) -> str:
    """Three decimals, one from 10 on; "" where there is no value."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(measure: Mapping[str, Any] | None) -> str:
    """ "0.596 [0.561, 0.632]"."""
    if not measure or measure.get("value") is None:
        return ""
    return f"{number(measure['value'])} [{number(measure['low'])}, {number(measure['high'])}]"


def signed(change: Mapping[str, Any]) -> str:
    """ "+0.450 [+0.401, +0.498]"."""
    if change.get("value") is None:
        return ""
    value, low, high = (_with_sign(change[end]) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def named(section: Any) -> str:
    """The name in a recipe's section: itself, its `name`, `source` or `kind`, or several joined."""
    if isinstance(section, Mapping):
        return next((str(section[k]) for k in ("name", "source", "path", "kind") if section.get(k) is not None), "")
    if isinstance(section, Sequence) and not isinstance(section, str):
        return ", ".join(filter(None, map(named, section)))
    return "" if section is None else str(section)


def total_seconds(results: Mapping[str, Any]) -> float | None:
    """Wall time of the run: `seconds.total`, else the sum of its parts."""
    seconds = results.get("seconds")
    if not isinstance(seconds, Mapping) or not seconds:
        return None
    return float(seconds.get("total", math.fsum(v for v in seconds.values() if isinstance(v, int | float))))


def _with_sign(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value))


def _is_measure(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value and "low" in value


def _repeats_pass_at_1(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Is this a mean@k that equals pass@1 wherever both are known?"""
    pairs = [
        (said[name]["value"], said["pass@1"]["value"]) for said in (before, after) if {name, "pass@1"} <= said.keys()
    ]
    same = [mean is None or once is None or abs(mean - once) < 1e-9 for mean, once in pairs]
    return name.startswith("mean@") and bool(pairs) and all(same)


def _share(said: Mapping[str, Any], status: str) -> str:
    counts = said.get("status") or {}
    total = sum(counts.values())
    return f"{counts.get(status, 0)} ({counts.get(status, 0) / total:.1%})" if total else ""
