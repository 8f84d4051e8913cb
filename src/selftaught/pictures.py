"""The pictures of runs, from what their folders hold: files by matplotlib, and one page that needs nothing.

Of each run: completions.jsonl (pass@k and distinct answers before and after), metrics.jsonl (entropy), results.json
(its controls), and measures.json (entropy by position, gaps by control), which `selftaught eval RUN --leakage
--diversity` keeps there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selftaught.errors import UserError
from selftaught.eval import read_rows, summarise
from selftaught.eval.diversity import ladder, usual_samples
from selftaught.eval.rows import STUDENT, evaluations
from selftaught.records import Say
from selftaught.report import plots
from selftaught.report.draw import alone, save, write_page
from selftaught.report.read import RunData, read_run

DIVERSITY = "distinct_answers"
BEFORE = "before training"


@dataclass(frozen=True)
class Measured:
    """What the pictures show of one run; what its folder does not hold is empty."""

    run: RunData
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)


def write_pictures(folders: Sequence[Path], out: Path, say: Say) -> Path:
    """Draw the runs' pictures into the folder `out`; returns the page there, pictures.html.

    One PNG for each picture, or an SVG without matplotlib. Raises UserError for a folder that is no run's, or where no
    run has anything to draw.
    """
    given = [measured(Path(folder), say) for folder in folders]
    names = _names([one.run for one in given])
    runs = dict(zip(names, given, strict=True))
    if len(counts := _samples(runs)) > 1:
        say(f"not drawn: distinct answers among {', '.join(f'{n:g}' for n in sorted(counts))} responses to a problem "
            "cannot be compared")
    pictures = [picture for picture in of_runs(runs) if picture]
    if not pictures:
        raise UserError(f"report: {', '.join(map(str, folders))} hold no evaluation to draw; evaluate first, or give "
                        "others")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); choose another place") from error
    for picture in pictures:
        if not save([picture], out / f"{picture.name}.png"):
            (out / f"{picture.name}.svg").write_text(alone(picture), encoding="utf-8")
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return write_page(pictures, out / "pictures.html", title=title,
                      intro="From saved completions and logs alone. Hover over a dot for its numbers.")


def measured(folder: Path, say: Say) -> Measured:
    """The measures of one run: its first and its last evaluation of the student, over a ladder of k up to the number of
    samples that most problems have; one with fewer is left out above that.
    """
    run, found = read_run(folder), {}
    if (folder / "completions.jsonl").is_file():
        kinds = evaluations(row for row in read_rows(folder / "completions.jsonl", say) if row["arm"] == STUDENT)
        steps = sorted(kinds, key=lambda kind: -1 if kind[2] is None else kind[2])
        for side, kind in zip(("after", "before"), (steps[-1], steps[0])[: len(steps)], strict=False):
            rows = kinds[kind]
            if any(row["score"] is not None for row in rows):
                found[side] = summarise(rows, ladder(usual_samples(rows)))
    return Measured(run, found.get("before", {}), found.get("after", {}))


def of_runs(runs: Mapping[str, Measured]) -> list[plots.Picture]:
    """All pictures of the runs, some of them empty."""
    single = len(runs) == 1
    begun = [one.before for one in runs.values() if one.before]
    rungs: dict[str, Any] = {BEFORE: begun[0]} if begun and _began_alike(runs) else {}
    for name, one in runs.items():
        if one.before and BEFORE not in rungs:
            rungs[f"{name}, {BEFORE}"] = one.before
        if one.after:
            rungs["after training" if single else name] = one.after
    paths = {name: [side for side in (one.before, one.after) if side] for name, one in runs.items()}
    if len(_samples(runs)) > 1:
        paths = {}  # a count of distinct answers is a count among so many
    controls = {}
    for name, one in runs.items():
        given = one.run.results.get("controls") or {}
        if given:
            controls[name] = {label: given[arm].get("pass@1") for arm, label in _ARMS.items() if arm in given}
            controls[name] |= {"student before": one.before.get("pass@1"), "student after": one.after.get("pass@1")}
    by_control = replace(
        plots.leakage_controls(controls, "pass@1", "Accuracy by what was shown"), name="accuracy-controls",
        caption="The teacher under each privilege before training, beside the student. A teacher that is right under a "
        "wrong privilege did not need it.",
    )  # fmt: skip
    return [
        plots.pass_at_k(rungs, dashed=[name for name in rungs if name.endswith(BEFORE)]),
        plots.diversity_accuracy(paths, DIVERSITY, label="distinct answers per problem"),
        plots.over_steps({name: one.run.series("entropy") for name, one in runs.items()}, "entropy, nats",
                         name="entropy", title="Token entropy while training", y_range=(0.0, 0.0),
                         caption="Mean over the tokens of each step's rollouts. Entropy is no diversity."),
        plots.entropy_by_position({name: by_position for name, side in _learned(runs, "diversity").items()
                                   if (by_position := side.get("token_entropy_by_position"))},
                                  dashed=[BEFORE]),
        by_control,
        plots.leakage_controls({name: {label: side[gap] for gap, label in _GAPS.items() if gap in side}
                                for name, side in _learned(runs, "leakage").items()}),
    ]  # fmt: skip


_ARMS = {"teacher/right": "teacher, right privilege", "teacher/empty": "teacher, empty",
         "teacher/wrong": "teacher, wrong", "other_prompt": "other problem's prompt"}


_GAPS = {"gap/right": "right privilege", "gap/wrong": "wrong", "gap/other_problem": "other problem's",
         "gap/empty": "empty"}


def _learned(runs: Mapping[str, Measured], part: str) -> dict[str, Mapping[str, Any]]:
    """One part of what was kept: of a single run before and after training, of several after it."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, one in runs.items():
        sides = one.run.learned.get(part, {})
        if len(runs) == 1 and "before" in sides:
            found[BEFORE] = sides["before"]
        if "after" in sides:
            found["after training" if len(runs) == 1 else name] = sides["after"]
    return found


def _began_alike(runs: Mapping[str, Measured]) -> bool:
    """Is what was measured before training one and the same, so that one curve stands for all?"""
    begun = {json.dumps([one.run.run.get("model"), one.before], sort_keys=True, default=str) for one in runs.values()}
    return len(begun) == 1


def _samples(runs: Mapping[str, Measured]) -> set[float]:
    """How many responses a problem got, in every evaluation shown."""
    return {side["samples"] / side["problems"] for one in runs.values() for side in (one.before, one.after) if side}


def _names(runs: Sequence[RunData]) -> list[str]:
    """The folders' names, with a number where two are the same."""
    seen: Counter[str] = Counter()
    names = []
    for run in runs:
        seen[run.name] += 1
        names.append(run.name if seen[run.name] == 1 else f"{run.name} ({seen[run.name]})")
    return names
