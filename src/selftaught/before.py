"""An evaluation before training that another run has made already: its rows are taken over instead of sampled again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from selftaught.errors import UserError
from selftaught.eval import read_rows
from selftaught.records import Sampling
from selftaught.run import Run


def check_before(run: Run) -> None:
    """Raise UserError where `eval.before` names no run with completions."""
    if run.eval.before is None:
        return
    folder = Path(run.eval.before)
    for name in ("run.yaml", "completions.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"eval.before = {run.eval.before!r}: there is no {folder / name}; name the folder of a run "
                            "that was evaluated before its training, or remove the field")


def rows_before(run: Run, arm: str, model: str, asked: Sequence[tuple[str, str]], samples: int,
                sampling: Sampling) -> list[dict[str, Any]] | None:
    """The rows of step 0 in `eval.before` for these (problem id, prompt text), in order; None: not all are there.

    A row counts only where the model's name, the prompt, the sampling, the seed and the whole reward are the same:
    it is then what sampling again would give, but for roundings of another machine.
    """
    if run.eval.before is None:
        return None
    folder = Path(run.eval.before)
    theirs = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    if theirs.get("reward") != run.resolved().get("reward"):
        return None
    drawn = {**asdict(sampling), "stop": list(sampling.stop)}
    saved = {(row["problem"], row["sample"]): row for row in read_rows(folder / "completions.jsonl")
             if (row.get("step"), row.get("arm"), row.get("model")) == (0, arm, model)
             and row.get("seed") == run.seed and row.get("sampling") == drawn}
    found = [saved.get((problem, sample)) for problem, _ in asked for sample in range(samples)]
    prompts = [prompt for _, prompt in asked for _ in range(samples)]
    if any(row is None or row["prompt"] != prompt for row, prompt in zip(found, prompts, strict=True)):
        return None
    return [dict(row) for row in found if row is not None]
