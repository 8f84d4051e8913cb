"""Science questions under GRPO and under self-distillation from one and from three demonstrations (arXiv 2606.26091).

Arms are domain x method: the recipes science/grpo, science/sdsd (K = 1) and science/sdsd-3 (K = 3) on SciKnowEval's
level L3 with the sizes of SDPO's split (arXiv 2601.20802). Every arm is also asked GPQA Extended of its domain, which
none learned from, and so is the model that all begin from. The table is made from saved completions alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selftaught.errors import Unreachable, UserError, nearest
from selftaught.eval import read_rows, select, summarise
from selftaught.evaluate import evaluate_model
from selftaught.records import Say
from selftaught.run import load_run
from selftaught.studies.process import train, workers

METHODS = {"grpo": "science/grpo", "sdsd": "science/sdsd", "sdsd-3": "science/sdsd-3"}
# Training and held-out questions of SDPO's published splits. What is damaged or double in the source is missing.
SPLITS = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94), "physics": (720, 80)}
EPOCHS = 30
SOURCE, OUTSIDE = "hicai-zju/SciKnowEval", "Idavidrein/gpqa:gpqa_extended"
NO_GPQA = ("material",)
SHOWN = ("pass@1", "pass@16")
SMOKE = ("optim.steps=2", "data.heldout=8", "eval.every=null", "eval.samples=2", "eval.k=[1,2]", "checkpoint.every=1")


@dataclass(frozen=True)
class Arm:
    """One run of the table."""

    domain: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.method}-{self.seed}"


def arms(only: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """Every domain under every method; `only` names domains, methods or both joined by a hyphen.

    Raises UserError for a name that is none of these.
    """
    every = [Arm(domain, method, seed) for seed in seeds for domain in SPLITS for method in METHODS]
    joined = [f"{domain}-{method}" for domain in SPLITS for method in METHODS]
    for name in only:
        if name not in (*SPLITS, *METHODS, *joined):
            raise UserError(f"study science: there is no arm {name!r}; {nearest(name, (*SPLITS, *METHODS, *joined))}")
    domains, methods = ([name for name in only if name in known] for known in (SPLITS, METHODS))
    named = [name for name in only if name in joined]
    if not only:
        return every
    return [arm for arm in every if f"{arm.domain}-{arm.method}" in named or ((domains or methods) and (
        arm.domain in (domains or SPLITS) and arm.method in (methods or METHODS)))]


def changes(arm: Arm, source: str = SOURCE) -> list[str]:
    """What makes the method's recipe this arm: the domain's questions, its split and as many epochs."""
    trained, heldout = SPLITS[arm.domain]
    epoch = trained // 32
    return [f"data.source=sciknoweval:{source}?domain={arm.domain.capitalize()}&level=L3", f"data.heldout={heldout}",
            f"optim.steps={EPOCHS * epoch}", f"eval.every={epoch}", f"seed={arm.seed}"]  # fmt: skip


def run(out: Path, say: Say, *, only: Sequence[str] = (), seeds: Sequence[int] = (0, 1, 2), jobs: int = 1,
        smoke: bool = False, overrides: Sequence[str] = ()) -> str:
    """Run and evaluate what is not finished under `out`, then write table.md and table.json there; returns the table.

    `overrides` are for every run, `smoke` cuts each short. Two more keys are the study's own: `data.source` is a file
    or Hub name that holds SciKnowEval, `gpqa` one that holds GPQA Extended, or `none`. One run at a time, as one fills
    a machine, or `jobs`.

    Raises:
        UserError: an arm that is none, or runs that failed (the others are done and in the table).
    """
    extra = [*(SMOKE if smoke else ()), *overrides]
    todo = arms(only, seeds)
    given = dict(pair.split("=", 1) for pair in extra if pair.startswith(("data.source=", "gpqa=")))
    plain = [pair for pair in extra if not pair.startswith(("data.source=", "gpqa="))]
    source, outside = given.get("data.source", SOURCE), given.get("gpqa", OUTSIDE)
    with workers(max(1, jobs)) as pool:
        work = [pool.submit(train, METHODS[arm.method], out / arm.name, [*changes(arm, source), *plain], say,
                            jobs=max(1, jobs)) for arm in todo]  # fmt: skip
        failed = {arm.name: text for arm, done in zip(todo, work, strict=True) if (text := done.result())}
    if outside != "none":
        try:
            _ask_outside(todo, out, outside, plain, say)
        except Unreachable as error:
            say(f"GPQA not asked: {error}")
    rows = [row for arm in todo if (row := row_of(arm, out)) is not None]
    table = "\n".join(lines(rows))
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    if failed:
        reasons = "; ".join(f"{name}: {text}" for name, text in failed.items())
        raise UserError(f"study science: {len(failed)} of {len(todo)} runs failed ({reasons}); the others are in "
                        f"{out / 'table.md'}. Give the same command again when the cause is mended")
    return table


def _ask_outside(todo: Sequence[Arm], out: Path, source: str, extra: Sequence[str], say: Say) -> None:
    """GPQA of its domain for every finished run, and for the model that they began from; what is there stays."""
    of_training = ("optim.", "method.", "privilege", "model=", "rollout.prompts_per_step=", "rollout.num_generations=")
    ours = [pair for pair in extra if not pair.startswith(of_training)]
    for arm in todo:
        if arm.domain in NO_GPQA or not (out / arm.name / "final").is_dir():
            continue
        model = load_run(METHODS[arm.method], [*changes(arm), *extra]).model
        asked = {model: out / f"before-gpqa-{arm.domain}", str(out / arm.name): out / arm.name / "gpqa"}
        for whose, folder in asked.items():
            if (folder / "done").is_file():
                continue
            evaluate_model(whose, "science/gpqa", [f"data.source=gpqa:{source}?domain={arm.domain.capitalize()}", *ours,
                                                   f"out={folder}"], say, resume=folder.exists())
            (folder / "done").write_text("")


# The table.


def row_of(arm: Arm, out: Path) -> dict[str, Any] | None:
    """One arm's measures: at its end, at its best evaluation (the paper's choice), and outside; None if unfinished."""
    folder = out / arm.name
    if not (folder / "results.json").is_file():
        return None
    rows = read_rows(folder / "completions.jsonl", lambda line: None)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    best = (results.get("best") or {}).get("step")
    found: dict[str, Any] = {"domain": arm.domain, "method": arm.method, "seed": arm.seed, "best_step": best}
    for side, step in (("before", 0), ("last", None), ("best", best)):
        found[side] = _measures(select(rows, step=step))
    for side, place in (("outside_before", out / f"before-gpqa-{arm.domain}"), ("outside", folder / "gpqa")):
        if (place / "done").is_file():
            found[side] = _measures(read_rows(place / "completions.jsonl", lambda line: None))
    return found


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """pass@1, pass@16 (or as many samples as there are) and distinct answers."""
    most = max((row["sample"] for row in rows), default=0) + 1
    found = summarise(rows, sorted({1, min(16, most)}))
    return {SHOWN[0]: found["pass@1"], SHOWN[1]: found[f"pass@{min(16, most)}"], "k": min(16, most),
            "distinct": found["distinct_answers"], "problems": found["problems"]}  # fmt: skip


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table as markdown: means over seeds and their range; one seed with its interval over problems."""
    ks = sorted({row["last"]["k"] for row in rows}) or [16]
    wide = f"pass@{'/'.join(map(str, ks))}"
    yield (f"| domain | method | seeds | before: pass@1, {wide} | last: pass@1, {wide} | best: pass@1, {wide} | "
           f"distinct, last | GPQA before: pass@1 | GPQA: pass@1, {wide} |")
    yield "| --- " * 9 + "|"
    for domain in SPLITS:
        for method in METHODS:
            mine = [row for row in rows if (row["domain"], row["method"]) == (domain, method)]
            if mine:
                both = [_both(mine, side) for side in ("before", "last", "best")]
                outside = _shown(mine, "outside_before", SHOWN[0]), _both(mine, "outside")
                cells = [domain, method, str(len(mine)), *both, _shown(mine, "last", "distinct"), *outside]
                yield f"| {' | '.join(cells)} |"


def _both(rows: Sequence[Mapping[str, Any]], side: str) -> str:
    return ", ".join(text for name in SHOWN if (text := _shown(rows, side, name)))


def _shown(rows: Sequence[Mapping[str, Any]], side: str, name: str) -> str:
    found = [row[side][name] for row in rows if side in row and row[side][name]["value"] is not None]
    if not found:
        return ""
    if len(found) == 1:
        return f"{found[0]['value']:.3f} [{found[0]['low']:.3f}, {found[0]['high']:.3f}]"
    values = [measure["value"] for measure in found]
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
