"""An evaluation before training that another run has made already: its rows are taken over instead of sampled again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from selftaught.errors import UserError
from selftaught.eval import read_rows
from selftaught.eval.rows import sampling_as_saved
from selftaught.records import Problem, Sampling
from selftaught.run import Run

# Of the two recipes; what else matters is compared row by row.
SAME = ("reward", "teacher", "optim.dtype", "rollout.engine", "rollout.vllm.dtype")


def check_before(run: Run) -> None:
    """Raise UserError where `eval.before` names no run with completions."""
    if run.eval.before is not None:
        _recipe(run)
        read_rows(Path(run.eval.before) / "completions.jsonl", lambda line: None)


def _recipe(run: Run) -> dict[str, Any]:
    """The resolved recipe of the run that `eval.before` names."""
    folder = Path(str(run.eval.before))
    for name in ("run.yaml", "completions.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"eval.before = {run.eval.before!r}: there is no {folder / name}; name the folder of a run "
                            "that was evaluated before its training, or remove the field")
    try:
        recipe = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    if not isinstance(recipe, dict):
        raise UserError(f"eval.before = {run.eval.before!r}: {folder / 'run.yaml'} is damaged; name another run, or "
                        "remove the field")
    return recipe


def rows_before(run: Run, arm: str, model: str, asked: Sequence[tuple[Problem, str]], samples: int,
                sampling: Sampling) -> list[dict[str, Any]] | None:
    """The rows of step 0 in `eval.before` for these problems and prompts, in order; None: not all are there.

    They count where the recipes have the same reward, teacher, precision and engine, and a row where the model's name,
    prompt, reference answer, sampling and seed are the same. That the weights under these names and a reward's own code
    are still what they were is for whoever names the run to know.
    """
    if run.eval.before is None:
        return None
    theirs, ours = _recipe(run), run.resolved()
    if any(_at(theirs, key) != _at(ours, key) for key in SAME):
        return None
    drawn = sampling_as_saved(sampling)
    wanted = (0, arm, model, run.seed, drawn)
    saved = {(row["problem"], row["sample"]): row
             for row in read_rows(Path(run.eval.before) / "completions.jsonl", lambda line: None)
             if (row["step"], row["arm"], row["model"], row["seed"], row["sampling"]) == wanted}
    found = []
    for problem, prompt in asked:
        for sample in range(samples):
            row = saved.get((problem.id, sample))
            if row is None or (row["prompt"], row["reference"]) != (prompt, problem.answer):
                return None
            found.append(dict(row))
    return found


def _at(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe
