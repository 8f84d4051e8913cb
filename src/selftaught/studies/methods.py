"""Every method on one task from its small recipe, beside what its teacher is worth without its knowledge.

Runs are processes of the command line, some at a time, each in a folder of its own; what is finished is not run again,
and what the first run of a seed measured before training the others take over.
The self-taught methods in CONTROLLED are also run with an empty and with a wrong privilege: where those do as well, the
gain is not the teacher's. They teach the same rollouts as the right one does; what is wrong is another problem's
solution or answer, also where the right privilege is a sibling's text. SDPG's empty arm has no teacher's term at all.
The other model that opd, gkd and dopd learn from is the final one of the quickstart, run with the first seed and used
for all; a seed draws its own problems, so in other seeds it may have trained on some of the held-out ones. Only the
model at the end of a run is measured. The table is made from saved files alone.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selftaught.errors import UserError, nearest
from selftaught.eval import compare, read_rows, select
from selftaught.methods import names
from selftaught.recipe import recipe_names
from selftaught.records import Say
from selftaught.run import load_run
from selftaught.studies.process import train, workers

CONTROLLED = ("rlsd", "sdpg", "demopsd", "sdpo", "opsd")
ARMS = ("right", "empty", "wrong")
SHOWN = ("pass@1", "pass@8")
TEACHER = "quickstart"  # the recipe whose final model is the other model
ALWAYS = ("eval.every=null",)
SMOKE = ("optim.steps=2", "data.heldout=8", "checkpoint.every=1")
DID = "method/"  # metrics with this prefix say what a method did
ALSO = ("teacher/gap_abs", "masked", "privilege/missing")  # and so do these, where a teacher was shown anything


@dataclass(frozen=True)
class Arm:
    """One run of the table."""

    method: str
    privilege: str  # right, empty or wrong
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.privilege}-{self.seed}"

    @property
    def recipe(self) -> str:
        return self.method if self.method == TEACHER else f"small/{self.method}"

    @property
    def external(self) -> bool:
        """Does it learn from another model?"""
        return load_run(self.recipe).teacher is not None


def arms(methods: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """Every method as it is; then those whose teacher is tested, with an empty and with a wrong privilege."""
    own = [Arm(method, "right", seed) for seed in seeds for method in methods]
    controls = [Arm(method, kind, seed) for seed in seeds for method in methods if method in CONTROLLED
                for kind in ARMS[1:]]
    return own + controls


def changes(arm: Arm) -> list[str]:
    """What makes the recipe of `arm.method` this arm."""
    if arm.privilege == "right":
        return []
    if arm.privilege == "empty" and arm.method == "sdpg":
        return ["method.beta=0"]  # a live teacher without a privilege is the student: the same as no teacher
    config = load_run(arm.recipe).privilege
    assert config is not None
    return [f"privilege={{kind: {arm.privilege}, of: {config.base}}}"]


def default_methods() -> list[str]:
    """Every method that has a small recipe; a recipe of another name (`small/lora`) runs if it is asked for."""
    return [name for name in names() if f"small/{name}" in recipe_names()]


def run(out: Path, say: Say, *, only: Sequence[str] = (), seeds: Sequence[int] = (0,), jobs: int = 0,
        smoke: bool = False, overrides: Sequence[str] = ()) -> str:
    """Run what is not finished under `out`, then write table.md and table.json there; returns the table.

    `only` some methods. `jobs` runs at a time, each with its share of the processors; 0: as many as there are
    processors, at most 4. `overrides` are for every run; `smoke`: two steps of each. Methods with another model as
    their teacher learn from the final model of the first seed's quickstart run, which therefore comes first.

    Raises:
        UserError: a method without a small recipe, or runs that failed (the others are done and in the table).
    """
    shipped = [name.removeprefix("small/") for name in recipe_names() if name.startswith("small/")]
    extra = [*ALWAYS, *(SMOKE if smoke else ()), *overrides]
    for method in only:
        if method not in shipped:
            raise UserError(f"study methods: there is no recipe small/{method}; {nearest(method, shipped)}")
    todo = arms(only or default_methods(), seeds)
    teacher = Arm(TEACHER, "right", seeds[0])
    if any(arm.external for arm in todo):
        todo.insert(0, teacher)
    first = {arm.seed: arm for arm in reversed(todo)}
    jobs = jobs or min(4, os.cpu_count() or 1)
    work: dict[Arm, Future[str]] = {}
    with workers(jobs) as pool:
        for arm in sorted(todo, key=lambda arm: arm.external):  # last: what cannot begin without the teacher's run
            work[arm] = pool.submit(_one, arm, out, jobs, say, extra, teacher, first[arm.seed], work.get(teacher))
        failed = {arm.name: text for arm in todo if (text := work[arm].result())}
    rows = [row for arm in todo if (row := row_of(arm, out)) is not None]
    table = "\n".join(lines(rows))
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    if failed:
        reasons = "; ".join(f"{name}: {text}" for name, text in failed.items())
        raise UserError(f"study methods: {len(failed)} of {len(todo)} runs failed ({reasons}); the others are in "
                        f"{out / 'table.md'}. Give the same command again when the cause is mended")
    return table


def _one(arm: Arm, out: Path, jobs: int, say: Say, extra: Sequence[str], teacher: Arm, first: Arm,
         taught: Future[str] | None) -> str:
    """Run one arm to its end; its last words if it failed, else "".

    `first` is the first run of its seed. An arm that learns from `teacher` waits for `taught`, that arm's run.
    """
    external = []
    if arm.external and taught is not None:
        taught.result()
        external = [f"teacher={out / teacher.name / 'final'}"]
    known = first != arm and (out / first.name / "results.json").is_file()
    before = [f"eval.before={out / first.name}"] if known else []
    return train(arm.recipe, out / arm.name, [f"seed={arm.seed}", *changes(arm), *external, *before, *extra], say,
                 jobs=jobs)


# The table.


def row_of(arm: Arm, out: Path) -> dict[str, Any] | None:
    """One arm's measures: its gain over the base, and over its own empty and wrong arms; None if it is not finished."""
    folder = out / arm.name
    if not (folder / "results.json").is_file():
        return None
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "method": arm.method, "privilege": arm.privilege, "seed": arm.seed,
        "gain": {name: results["difference"][name] for name in SHOWN},
        "distinct": [results[side]["distinct_answers"]["value"] for side in ("before", "after")],
        "did": _did(folder), "over": {},
    }
    for other in ARMS[1:] if arm.privilege == "right" else ():
        theirs = out / Arm(arm.method, other, arm.seed).name / "completions.jsonl"
        if theirs.is_file() and (theirs.parent / "results.json").is_file():
            last = [select(read_rows(path)) for path in (theirs, folder / "completions.jsonl")]
            found["over"][other] = compare(last[0], last[1], (1,))["pass@1"]
    return found


def _did(folder: Path) -> dict[str, float]:
    """The means over all steps of what the method measured of itself."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values: dict[str, list[float]] = {}
    for name, value in (pair for step in steps for pair in step.items() if pair[0].startswith(DID) or pair[0] in ALSO):
        values.setdefault(name.removeprefix(DID), []).append(value)
    return {name: statistics.fmean(each) for name, each in values.items()}


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The table as markdown."""
    yield ("| method | privilege | seed | pass@1: after, gain over the base | pass@8: after, gain | distinct of 8 | "
           "pass@1 over empty | pass@1 over wrong | what it did |")
    yield "| --- " * 9 + "|"
    for row in rows:
        gains = [f"{row['gain'][name]['after']:.3f}, {_interval(row['gain'][name])}" for name in SHOWN]
        over = [_interval(row["over"][kind]) if kind in row["over"] else "" for kind in ARMS[1:]]
        did = ", ".join(f"{name} {value:.3g}" for name, value in row["did"].items())
        before, after = row["distinct"]
        yield (f"| {row['method']} | {row['privilege']} | {row['seed']} | {gains[0]} | {gains[1]} | {before:.1f} to "
               f"{after:.1f} | {over[0]} | {over[1]} | {did} |")


def _interval(measure: Mapping[str, Any]) -> str:
    return f"{measure['value']:+.3f} [{measure['low']:+.3f}, {measure['high']:+.3f}]"
