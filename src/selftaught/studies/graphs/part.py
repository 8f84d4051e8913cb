"""One part of the study: a run of the recipe, and its model on every test set, each completion saved.

`python -m selftaught.studies.graphs.part JOB`, with a Job as JSON, does it in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from selftaught import data
from selftaught.assemble import lay_ground, load_engine
from selftaught.eval import append_rows
from selftaught.evaluate import sample_rows
from selftaught.run import load_run
from selftaught.studies.graphs.arms import sources_of_sets
from selftaught.train import train

IN = "in"  # the recipe's own held-out problems
TEST_SEED = 0  # of the other sets, so that every arm and seed meets the same graphs


@dataclass(frozen=True)
class Job:
    """What a part is told."""

    folder: str  # where it writes
    model: str  # what it begins with
    recipe: str
    overrides: tuple[str, ...]  # that make the recipe this arm
    trains: bool  # False: the model is tested as it is
    larger: tuple[int, ...]  # nodes of the paths of the larger sets
    samples: int
    problems: int

    def text(self) -> str:
        return json.dumps(asdict(self))


def do(job: Job, console: Console) -> None:
    """Train what is not trained, test what is not tested. Raises UserError; KeyboardInterrupt where it was stopped."""
    folder, model = Path(job.folder), job.model
    if job.trains:
        model = str(folder / "final")
        if not ((folder / "results.json").is_file() and Path(model).is_dir()):
            resume = any((folder / "checkpoints").glob("step-*"))
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)  # stopped before a checkpoint: nothing in it is needed
            run = load_run(job.recipe, [*job.overrides, f"model={job.model}", f"out={folder}"])
            if train(run, resume=resume, console=console).interrupted is not None:
                raise KeyboardInterrupt
    sample_sets(job, model)


def sample_sets(job: Job, model: str) -> None:
    """Sample `samples` completions to `problems` problems of each set into tests/SET.jsonl.

    A set has its name once it is whole: one that was stopped is sampled anew.
    """
    out = Path(job.folder) / "tests"
    run = load_run(job.recipe, [*job.overrides, "optim.lora=null"], {"model": model})
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"prompts_per_step": 1})})
    sources = {IN: str(run.data.source), **sources_of_sets(str(run.data.source), job.larger)}
    missing = [name for name in sources if not (out / f"{name}.jsonl").is_file()]
    if not missing:
        return
    ground = lay_ground(run, lambda line: None, trains=False)
    try:
        _, engine = load_engine(ground)
        for name in missing:
            asked = ground.dataset.heldout
            if name != IN:
                config = run.data.model_copy(update={"source": sources[name], "train": 1, "heldout": job.problems})
                asked = data.load(config, seed=TEST_SEED, say=lambda line: None).heldout
            asked = asked[: job.problems]
            step = run.optim.steps if job.trains else 0
            prompts = [ground.renderer.prompt(problem) for problem in asked]
            rows = sample_rows(ground, engine, asked, prompts, step=step, arm="student", samples=job.samples,
                               model=model)
            slots = {problem.id: problem.columns["slots"] for problem in asked}
            out.mkdir(parents=True, exist_ok=True)
            part = out / f"{name}.part"
            part.unlink(missing_ok=True)
            append_rows(part, [{**row, "slots": slots[row["problem"]],
                                "prompt": row["prompt"] if row["sample"] == 0 else None} for row in rows])
            os.replace(part, out / f"{name}.jsonl")
        engine.close()
    finally:
        if ground.rewarder is not None:
            ground.rewarder.close()


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    do(Job(**{**told, "overrides": tuple(told["overrides"]), "larger": tuple(told["larger"])}), Console())
