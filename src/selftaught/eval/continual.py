"""Tasks learned one after another: the accuracy of every checkpoint on every task, and what it says of transfer.

T: tasks in the order in which they were learned, C: checkpoints, P: problems of one task, D: bootstrap draws.
Checkpoint i was saved after task i was learned; R[i, j] is its accuracy on task j (arXiv 1706.08840, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from selftaught.errors import UserError
from selftaught.eval.intervals import DRAWS, Array, bootstrap_draws
from selftaught.eval.measures import per_problem

Row = Mapping[str, Any]
BASE = "before"  # the checkpoint before the first task
NAMES = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")


def transfer(accuracy_TT: Array, base_T: Array | None = None) -> dict[str, Array]:
    """The measures of `NAMES` from the accuracies (..., T, T) and those before the first task (..., T).

        average_accuracy  = 1/T sum_j R[T, j]
        backward_transfer = 1/(T-1) sum_{j<T} R[T, j] - R[j, j]              below zero: forgotten
        forward_transfer  = 1/(T-1) sum_{j>1} R[j-1, j] - b[j]               what earlier tasks gave to it
        forgetting        = 1/(T-1) sum_{j<T} max_{l<T} R[l, j] - R[T, j]    from its best: at least -backward_transfer

    The first three: arXiv 1706.08840, section 2, with the model before training in the place of a random one as b;
    forgetting: arXiv 1801.10112. Those that need two tasks, or b, are left out where there are none.
    """
    tasks = accuracy_TT.shape[-1]
    assert accuracy_TT.shape[-2] == tasks, accuracy_TT.shape
    last, own = accuracy_TT[..., -1, :], np.diagonal(accuracy_TT, axis1=-2, axis2=-1)
    found = {"average_accuracy": last.mean(-1)}
    if tasks > 1:
        found["backward_transfer"] = (last - own)[..., :-1].mean(-1)
        if base_T is not None:
            before = np.diagonal(accuracy_TT, offset=1, axis1=-2, axis2=-1)
            found["forward_transfer"] = (before - base_T[..., 1:]).mean(-1)
        found["forgetting"] = (accuracy_TT[..., :-1, :-1].max(-2) - last[..., :-1]).mean(-1)
    return found


def column(evaluations: Sequence[Sequence[Row]], k: int, threshold: float = 1.0) -> tuple[Array, int]:
    """(P, C) pass@k of one task's problems under each checkpoint, and how many problems were left out.

    Only the problems that every checkpoint answered, at least k times, so that its numbers are paired.
    """
    tables = []
    for rows in evaluations:
        of: dict[Any, list[Row]] = {}
        for row in rows:
            of.setdefault(row["problem"], []).append(row)
        judged = {p: mine for p, mine in of.items() if any(row["score"] is not None for row in mine)}
        tables.append({p: per_problem(mine, (k,), threshold)[f"pass@{k}"] for p, mine in judged.items()})
    everyone = list(dict.fromkeys(problem for table in tables for problem in table))
    shared = [p for p in everyone if all(math.isfinite(table.get(p, math.nan)) for table in tables)]
    values_PC = np.array([[table[problem] for table in tables] for problem in shared], dtype=np.float64)
    return values_PC.reshape(len(shared), len(tables)), len(everyone) - len(shared)


def summarise_sequence(columns: Mapping[str, Array], learned: int, checkpoints: Sequence[str], *, draws: int = DRAWS,
                       seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """The accuracy matrix and its measures, each {value, low, high}, from the (P, C) columns of the tasks.

    The first `learned` columns are the tasks in order; further ones were never trained on (out of distribution), and
    `change` tells for each task the last checkpoint's accuracy minus the first one's. With one checkpoint more than
    tasks learned, the first is the model before training. Intervals are percentile bootstraps over the problems of each
    task, the same draws for all checkpoints, tasks independent. The maximum in `forgetting` makes it lean upwards.
    Raises UserError where the numbers do not fit, or a task has no problem that all checkpoints answered.
    """
    if len(checkpoints) not in (learned, learned + 1) or not 0 <= learned <= len(columns):
        raise UserError(f"{len(checkpoints)} checkpoints for {learned} tasks learned: give one after each task in "
                        "order, and before them the model that no task was learned with")
    for task, values_PC in columns.items():
        if not len(values_PC):
            raise UserError(f"task {task!r}: there is no problem that every checkpoint answered often enough; "
                            "evaluate all of them on the same problems with as many samples")
    first = len(checkpoints) - learned
    point_CT = np.stack([values_PC.mean(0) for values_PC in columns.values()], -1)
    drawn_DCT = np.stack([bootstrap_draws(values_PC, draws=draws, seed=seed + place)
                          for place, values_PC in enumerate(columns.values())], -1)

    def interval(value: Any, drawn_D: Array) -> dict[str, float]:
        low, high = np.quantile(drawn_D, [(1 - level) / 2, (1 + level) / 2])
        return {"value": float(value), "low": float(low), "high": float(high)}

    found: dict[str, Any] = {
        "checkpoints": list(checkpoints), "tasks": list(columns), "learned": learned,
        "problems": {task: len(values_PC) for task, values_PC in columns.items()},
        "matrix": [[interval(point_CT[c, t], drawn_DCT[:, c, t]) for t in range(len(columns))]
                   for c in range(len(checkpoints))],
        "change": {task: interval(point_CT[-1, t] - point_CT[0, t], drawn_DCT[:, -1, t] - drawn_DCT[:, 0, t])
                   for t, task in enumerate(columns)},
    }  # fmt: skip
    if learned:
        base, base_D = (point_CT[0, :learned], drawn_DCT[:, 0, :learned]) if first else (None, None)
        drawn = transfer(drawn_DCT[:, first:, :learned], base_D)
        point = transfer(point_CT[first:, :learned], base)
        found |= {name: interval(value, drawn[name]) for name, value in point.items()}
    return found


def sequence_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `summarise_sequence` found as markdown: the matrix, one row for each checkpoint, then the measures."""
    tasks, learned = found["tasks"], found["learned"]
    heads = [f"{task} ({found['problems'][task]})" + ("" if t < learned else ", never trained on")
             for t, task in enumerate(tasks)]
    yield "| after | " + " | ".join(heads) + " |"
    yield "| --- " * (len(tasks) + 1) + "|"
    for name, cells in zip(found["checkpoints"], found["matrix"], strict=True):
        yield f"| {name} | " + " | ".join(_shown(cell, "") for cell in cells) + " |"
    yield "| last minus first | " + " | ".join(_shown(found["change"][task], "+") for task in tasks) + " |"
    yield ""
    for name in NAMES:
        if name in found:
            yield f"- {name.replace('_', ' ')}: {_shown(found[name], '' if name == NAMES[0] else '+')}"
    if learned > 1 and "forward_transfer" not in found:
        yield "- forward transfer: needs the model before the first task, as the first of the checkpoints"


def _shown(cell: Mapping[str, float], sign: str) -> str:
    return f"{cell['value']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"
