"""The study: base stage, arms, test sets, tables and pictures; each part that is done is not done again.

An arm is `selftaught.train` with a shipped recipe, as a user would call it; stopped, it goes on from its checkpoint.
The small decoder's base stage is the only training that is not a recipe: the library has no supervised stage, and needs
none for models that others have pretrained.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from selftaught.data.graphs import Layout, draw, parse, source
from selftaught.errors import UserError
from selftaught.eval import read_rows
from selftaught.records import Say
from selftaught.run import load_run
from selftaught.studies.graphs.arms import ARMS, BASE, SMALL, arms
from selftaught.studies.graphs.claims import table
from selftaught.studies.graphs.measures import measure
from selftaught.studies.graphs.part import IN, Job, do
from selftaught.studies.process import follow, workers

PCMI_GRAPHS = 128


@dataclass(frozen=True)
class Plan:
    """How much of everything. The numbers are ours, but samples and problems, which are the paper's."""

    recipe: str = SMALL
    larger: tuple[int, ...] = (7, 8)  # nodes of the paths of the larger sets
    samples: int = 64
    problems: int = 128
    base: Mapping[str, Any] = field(default_factory=dict)  # what the base stage has other than its defaults
    extra: tuple[str, ...] = ()  # overrides of every arm


PAPER_LARGER = (15, 20)
# Learned in seconds.
EASY = Layout(sectors=3, chains=1, short=3, long=4, concepts=4, names=3, mark="concept", style="tokens")
SMOKE = Plan(samples=4, problems=6, larger=(5,),
             base={"layout": EASY, "width": 32, "layers": 2, "heads": 2, "steps": 150, "batch": 16, "first": 0.5},
             extra=(f"data.source={source('train', EASY)}", "optim.steps=2", "data.heldout=6", "data.train=64",
                    "eval.samples=2", "eval.k=[1,2]", "checkpoint.every=1", "optim.warmup_steps=1",
                    "rollout.num_generations=16"))  # fmt: skip


def plan_of(smoke: bool, overrides: Sequence[str]) -> Plan:
    """The plan of a command; the override `recipe=NAME` is the study's own, the others go to every arm."""
    plan = SMOKE if smoke else Plan()
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "recipe":
            plan = replace(plan, recipe=value, larger=plan.larger if value == SMALL else PAPER_LARGER)
        else:
            plan = replace(plan, extra=(*plan.extra, override))
    return plan


def run(out: Path, say: Say, *, only: Sequence[str] = (), seeds: Sequence[int] = (), jobs: int = 0,
        smoke: bool = False, overrides: Sequence[str] = ()) -> str:
    """Run what is not finished under `out`; then write table.md, measures.json, the panels and page.html there.

    `only` names arms; empty: the core's four. `seeds`; empty: 0, 1, 2, in a smoke run 0. `jobs` parts at a time, each
    a process with its share of the processors; 1 (a smoke run's default): in this process; 0: as many as there are
    processors, at most 4. Returns the tables.
    Raises UserError for an unknown arm and for parts that failed (the others are done and in the tables).
    """
    from selftaught.studies.graphs.page import write

    plan = plan_of(smoke, overrides)
    todo = arms(only, seeds or ((0,) if smoke else (0, 1, 2)))
    jobs = jobs or (1 if smoke else min(4, os.cpu_count() or 1))
    out.mkdir(parents=True, exist_ok=True)
    _same_settings(out / "settings.json", plan)
    model = _model(plan, out, say)
    parts = {BASE: _job(plan, out / BASE, model, ("privilege=null", "method=grpo"), trains=False)}
    for arm in todo:
        changes = (*ARMS[arm.name].overrides, f"seed={arm.seed}")
        parts[arm.folder] = _job(plan, out / arm.folder, model, changes, trains=True)
    with workers(jobs) as pool:
        work = {name: pool.submit(_process, job, out / f"{name}.log", jobs, say) for name, job in parts.items()
                if jobs > 1}  # fmt: skip
        done = {name: work[name].result() if name in work else _here(job, out / f"{name}.log", say)
                for name, job in parts.items()}  # fmt: skip
    failed = {name: text for name, text in done.items() if text}
    tables = write(out, *collect(out), plan)
    if failed:
        reasons = "; ".join(f"{name}: {text}" for name, text in failed.items())
        raise UserError(f"study graphs: {len(failed)} of {len(parts)} parts failed ({reasons}); the others are in "
                        f"{out / 'table.md'}. Give the same command again when the cause is mended")
    return tables


def _same_settings(path: Path, plan: Plan) -> None:
    """Note what the parts of this folder are made with. Raises UserError where they were made with something else."""
    recipe = load_run(plan.recipe, plan.extra).resolved()
    asked = json.loads(json.dumps({"plan": asdict(plan), "recipe": recipe}, default=str))
    if not path.is_file():
        path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        return
    made = json.loads(path.read_text(encoding="utf-8"))
    other = [f"{part}.{name}" for part in asked for name in asked[part] if asked[part][name] != made[part].get(name)]
    if other:
        raise UserError(f"study graphs: {path.parent} holds parts that were made with another {', '.join(other)}; give "
                        "the same settings, or another --out")


def _job(plan: Plan, folder: Path, model: str, overrides: Sequence[str], *, trains: bool) -> Job:
    return Job(str(folder), model, plan.recipe, (*overrides, *plan.extra), trains, plan.larger, plan.samples,
               plan.problems)  # fmt: skip


def _model(plan: Plan, out: Path, say: Say) -> str:
    """The model that every arm begins with: the recipe's own, or the small decoder, trained once."""
    if plan.recipe != SMALL:
        return load_run(plan.recipe, plan.extra).model
    from selftaught.score.hub import load_model, load_tokenizer
    from selftaught.studies.graphs.base import BaseConfig, train_base
    from selftaught.studies.graphs.pcmi import predictions

    folder, report = out / BASE / "model", out / BASE / "base.json"
    if not report.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        done = train_base(BaseConfig(**plan.base), folder, say)
        import torch

        _, layout = parse(str(load_run(SMALL, plan.extra).data.source))
        rng = random.Random("pcmi")
        asked = [draw("train", layout, rng) for _ in range(PCMI_GRAPHS)]
        done["pcmi"] = predictions(load_model(str(folder), torch.float32, "cpu"), load_tokenizer(str(folder)), asked)
        report.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    return str(folder)


def _here(job: Job, log: Path, say: Say) -> str:
    """Do a part in this process; what is wrong with it, or ""."""
    say(f"{log.stem}: started")
    with log.open("a", encoding="utf-8") as file:
        try:
            do(job, Console(file=file, width=120))
        except UserError as error:
            return str(error)
    say(f"{log.stem}: done")
    return ""


def _process(job: Job, log: Path, jobs: int, say: Say) -> str:
    """Do a part in a process of its own; its last words if it failed, else ""."""
    say(f"{log.stem}: started")
    code = follow([sys.executable, "-m", "selftaught.studies.graphs.part", job.text()], log, jobs,
                  {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"})
    say(f"{log.stem}: {'done' if code == 0 else f'failed, see {log}'}")
    return "" if code == 0 else _last_words(log)


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no output"


# What was found.


def collect(out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """By arm, seed and set: the measures of what was sampled, and their tables by problem; the base has one seed.

    All that the folder holds, of this command and of earlier ones.
    """
    found: dict[str, dict[str, Any]] = {}
    tables: dict[str, dict[str, Any]] = {}
    trained = [(name, folder) for name in ARMS for folder in _trained(out, name)]
    for name, folder in [(BASE, out / BASE), *trained]:
        seed = folder.name.rpartition("-")[2] if name != BASE else "0"
        sets = {path.stem: read_rows(path) for path in sorted((folder / "tests").glob("*.jsonl"))}
        if IN in sets:
            found.setdefault(name, {})[seed] = {each: measure(rows) for each, rows in sets.items()}
            tables.setdefault(name, {})[seed] = {each: table(rows) for each, rows in sets.items()}
    (out / "measures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found, tables


def _trained(out: Path, name: str) -> list[Path]:
    """The folders of an arm, in the order of their seeds."""
    found = [path for path in out.glob(f"{name}-*") if path.is_dir() and path.name.removeprefix(f"{name}-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
