"""A sequence of checkpoints on a sequence of tasks: every cell evaluated once, measured from its saved completions.

cells/I-CHECKPOINT/TASK/completions.jsonl     the answers of one checkpoint to one task's held-out problems
cells/I-CHECKPOINT/TASK.json                  on what they were made; written when they are all there
matrix.json  matrix.md  task-sequence.png     the accuracy matrix, forgetting and transfer; .svg without matplotlib
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selftaught.errors import UserError
from selftaught.eval import read_rows, select
from selftaught.eval.continual import column, sequence_lines, summarise_sequence
from selftaught.evaluate import evaluate_model
from selftaught.recipe import label
from selftaught.records import Say
from selftaught.report.draw import alone, save
from selftaught.report.plots import task_sequence
from selftaught.run import load_run

Evaluate = Callable[..., Any]  # (model, recipe, overrides with `out`, say, resume=)


@dataclass(frozen=True)
class Cell:
    """One checkpoint on one task."""

    model: str
    recipe: str
    folder: Path

    @property
    def mark(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")


def run(models: Sequence[str], tasks: Sequence[str], out: Path, say: Say, *, untrained: Sequence[str] = (), k: int = 1,
        overrides: Sequence[str] = (), evaluate: Evaluate = evaluate_model) -> str:
    """Evaluate what is missing under `out`, then write the matrix and its picture there; returns matrix.md.

    `models` are runs, model folders or Hub names: one after each of the `tasks` (recipes) in the order of learning, and
    before them, for forward transfer, the model that none was learned with. `untrained` are tasks of which no
    checkpoint learned. `overrides` hold for all. A task's problems are those that its recipe holds out.

    Raises:
        UserError: numbers that do not fit, recipes of one name, or a saved cell of another model, recipe or override.
    """
    recipes = _names([*tasks, *untrained])
    if not recipes:
        raise UserError("continual: no task is given; name recipes with --task, in the order of learning")
    if len(models) not in (len(tasks), len(tasks) + 1):
        raise UserError(f"continual: {len(models)} models for {len(tasks)} tasks; give one after each task, in order, "
                        "and before them the one that no task was learned with")
    shown = _labels(models, tasks)
    grid = [[Cell(model, recipe, out / "cells" / f"{number}-{_safe(Path(model).name)}" / name)
             for name, recipe in recipes.items()] for number, model in enumerate(models)]
    missing = [cell for row in grid for cell in row if not _done(cell, overrides)]
    for number, cell in enumerate(missing, start=1):
        say(f"cell {number} of {len(missing)} missing: {cell.model} on {cell.recipe}")
        evaluate(cell.model, cell.recipe, [*overrides, f"out={cell.folder}"], say, resume=cell.folder.exists())
        cell.mark.write_text(json.dumps(_settings(cell, overrides), indent=1) + "\n", encoding="utf-8")
    columns = {}
    for place, name in enumerate(recipes):
        rows = [select(read_rows(row[place].folder / "completions.jsonl", say)) for row in grid]
        columns[name], left_out = column(rows, k)
        if left_out:
            say(f"{name}: {left_out} problems left out, which not every checkpoint answered {k} times or more")
    found = {"measure": f"pass@{k}", **summarise_sequence(columns, len(tasks), shown)}
    text = "\n".join(sequence_lines(found))
    (out / "matrix.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "matrix.md").write_text(text + "\n", encoding="utf-8")
    picture = task_sequence(found)
    if not save([picture], out / f"{picture.name}.png"):
        (out / f"{picture.name}.svg").write_text(alone(picture), encoding="utf-8")
    return text


def _names(recipes: Sequence[str]) -> dict[str, str]:
    """The recipes by what they are called, which names a task."""
    found: dict[str, str] = {}
    for recipe in recipes:
        name = _safe(label(recipe))
        if name in found:
            raise UserError(f"continual: the recipes {found[name]!r} and {recipe!r} have one name; rename one of them")
        found[name] = recipe
    return found


def _labels(models: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """What the rows of the matrix are called: the task last learned, and the model."""
    after = ["before", *(label(task) for task in tasks)][-len(models) :]
    return [f"{task}: {Path(model).name}" for task, model in zip(after, models, strict=True)]


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _settings(cell: Cell, overrides: Sequence[str]) -> dict[str, Any]:
    """What a saved cell must have been made with to stand: the recipe, and the weights by their sizes and times."""
    recipe = load_run(cell.recipe, overrides, {"model": cell.model}).resolved()
    folder = Path(cell.model)
    files = sorted((folder / "final" if (folder / "run.yaml").is_file() else folder).glob("*.safetensors"))
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {"recipe": {key: value for key, value in recipe.items() if key != "out"}, "weights": weights}


def _done(cell: Cell, overrides: Sequence[str]) -> bool:
    """Is the cell there? Raises UserError where it was made with something else than is asked for now."""
    if not cell.mark.is_file() or not (cell.folder / "completions.jsonl").is_file():
        return False
    try:
        saved = json.loads(cell.mark.read_text(encoding="utf-8"))
    except ValueError:
        return False
    asked = json.loads(json.dumps(_settings(cell, overrides)))
    if saved != asked:
        was, now = dict(_leaves(saved)), dict(_leaves(asked))
        key = next(key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key))
        raise UserError(f"continual: {cell.folder} was made with {key} = {was.get(key)!r}, and now it is "
                        f"{now.get(key)!r}; delete {cell.mark} to evaluate that cell again, or choose another --out")
    return True


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
