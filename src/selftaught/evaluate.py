"""Evaluation inside and outside a run: sample held-out problems, verify, save every completion, then measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from selftaught import data, privilege
from selftaught.assemble import External, Ground, Say, context_of, lay_ground, load_engine, sample_and_verify
from selftaught.before import rows_before
from selftaught.errors import UserError
from selftaught.eval import append_rows, compare, read_rows, rows_of, select, summarise
from selftaught.records import Problem, Prompt, Request, Sampling
from selftaught.report import RunFolder
from selftaught.rollout import Engine
from selftaught.run import load_run

EVALUATION = -1  # the step that keys an evaluation's randomness: every one draws with the same random numbers
CONTROL_SAMPLES = 2
TEACHER_ARMS: tuple[Literal["right", "wrong", "empty"], ...] = ("right", "wrong", "empty")


def heldout(ground: Ground) -> tuple[Problem, ...]:
    """The problems that are evaluated."""
    return ground.dataset.heldout[: ground.run.eval.problems]


def sampling_of(ground: Ground) -> Sampling:
    """How an evaluation samples."""
    config, rollout = ground.run.eval, ground.run.rollout
    return Sampling(config.temperature, config.top_p, config.top_k,
                    config.max_completion_length or rollout.max_completion_length, rollout.stop)


def sample_rows(ground: Ground, engine: Engine, problems: Sequence[Problem], prompts: Sequence[Prompt], *, step: int,
                arm: str, samples: int, model: str | None = None) -> list[dict[str, Any]]:
    """One evaluation: `samples` responses to each prompt, scored against the problem beside it, as rows.

    `model` is whose engine it is; None: the student.
    """
    run = ground.run
    texts = [ground.tokenizer.decode(list(prompt.token_ids)) for prompt in prompts]
    if step == 0:
        shown = [(problem.id, text) for problem, text in zip(problems, texts, strict=True)]
        before = rows_before(run, arm, model or run.model, shown, samples, sampling_of(ground))
        if before is not None:
            return before
    asked = [Request(problem, prompt, EVALUATION, run.seed) for problem, prompt in zip(problems, prompts, strict=True)]
    rollouts, verdicts = sample_and_verify(ground, engine, asked, samples, sampling_of(ground))
    return rows_of(rollouts, verdicts, model=model or run.model, seed=run.seed, step=step, arm=arm,
                   prompts=[text for text in texts for _ in range(samples)])


def evaluate(ground: Ground, engine: Engine, folder: RunFolder, step: int) -> dict[str, Any]:
    """The student on the held-out problems at `step`: rows appended to completions.jsonl, and their summary."""
    problems = heldout(ground)
    prompts = [ground.renderer.prompt(problem) for problem in problems]
    rows = sample_rows(ground, engine, problems, prompts, step=step, arm="student", samples=ground.run.eval.samples)
    save(folder, rows)
    return summarise(rows, ground.run.eval.k)


def evaluate_controls(ground: Ground, engine: Engine, folder: RunFolder, step: int,
                      external: External | None = None) -> None:
    """Rows of the controls: another problem's prompt, and the teacher's own accuracy before training.

    The teacher is asked under the right, a wrong and an empty privilege: the method's external one, or else the
    weights that the engine holds. An external one that sees no privilege is asked the student's prompts. A problem
    without that privilege is left out of the arm, and a single problem has no other one's prompt.
    """
    problems = heldout(ground)
    samples = min(CONTROL_SAMPLES, ground.run.eval.samples)
    arms: dict[str, list[tuple[Problem, Prompt]]] = {}
    if len(problems) > 1:
        others = (*problems[1:], *problems[:1])
        arms["other_prompt"] = [(p, ground.renderer.prompt(other)) for p, other in zip(problems, others, strict=True)]
    config, view = ground.run.privilege, ground.method.views.get("teacher")
    asks = external if view is not None and view.weights == "external" else None
    if asks is not None and view is not None and view.context == "plain":
        config = None
        if step == 0:
            arms["teacher/plain"] = [(problem, ground.renderer.prompt(problem)) for problem in problems]
    if config is not None and step == 0:
        limit = context_of(asks.name if asks else ground.run.model)
        room = None if limit is None else limit - sampling_of(ground).max_completion_length
        for kind in TEACHER_ARMS:
            given = privilege.for_problems(privilege.control(config, kind), problems, ground.dataset.train,
                                           ground.renderer, seed=ground.run.seed, step=EVALUATION, room=room)
            arms[f"teacher/{kind}"] = [(p, c.prompt) for p, c in zip(problems, given, strict=True) if c is not None]
    for arm, asked in arms.items():
        whose = asks if arm.startswith("teacher/") else None
        if asked:
            save(folder, sample_rows(ground, whose.engine if whose else engine, [p for p, _ in asked],
                                     [prompt for _, prompt in asked], step=step, arm=arm, samples=samples,
                                     model=whose.name if whose else None))


def save(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    with folder.surviving("completions.jsonl"):
        append_rows(folder.completions, rows)


def flat(summary: Mapping[str, Any]) -> dict[str, float]:
    """A summary as metrics: eval/NAME, eval/NAME_low, eval/NAME_high."""
    metrics: dict[str, float] = {}
    for name, measure in summary.items():
        if isinstance(measure, Mapping) and measure.get("value") is not None:
            metrics[f"eval/{name}"] = measure["value"]
            for side in ("low", "high"):
                if measure.get(side) is not None:
                    metrics[f"eval/{name}_{side}"] = measure[side]
    return metrics


def results(ground: Ground, folder: RunFolder, steps: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """results.json, computed from the saved completions alone."""
    rows = read_rows(folder.completions)
    ks = ground.run.eval.k
    before, after = select(rows, step=0), select(rows, step=steps)
    found: dict[str, Any] = {
        "before": summarise(before, ks), "after": summarise(after, ks), "difference": compare(before, after, ks),
        "best_constant": summarise(after, ks)["best_constant"], "controls": {}, "seconds": dict(seconds),
    }
    for arm in ("other_prompt", "teacher/plain", *(f"teacher/{kind}" for kind in TEACHER_ARMS)):
        chosen = select(rows, arm=arm)
        if chosen:
            found["controls"][arm] = summarise(chosen, [1])
    with suppress(KeyError, TypeError):
        found["above_constant"] = found["after"]["pass@1"]["value"] - found["best_constant"]["value"]
    return found


def measure_file(path: Path, ks: Sequence[int] | None, warn: Say) -> dict[str, Any]:
    """The measures of a saved completions file alone: the student's latest step in it.

    Without `ks`, those of one sample and of all samples.
    """
    saved = read_rows(path, warn)
    arms = {row["arm"] for row in saved}
    rows = select(saved, arm=arms.pop()) if len(arms) == 1 else select(saved)
    if ks is None:
        ks = sorted({1, max(Counter(row["problem"] for row in rows).values(), default=1)})
    return summarise(rows, ks)


def evaluate_model(model: str, recipe: str | None, overrides: Sequence[str], say: Say) -> dict[str, Any]:
    """Sample, verify and measure a run's final model, a model folder or a Hub name on a recipe's held-out problems.

    Without a recipe, a run is measured by its own; problems that it trained on are left out. Completions go to a new
    folder: RUN/evals/RECIPE of a run, else evals/MODEL-RECIPE beside the recipe's `out`; or the `out` that an override
    names.
    """
    folder, name = Path(model), model
    of_run = (folder / "run.yaml").is_file()
    if of_run:
        name = str(folder / "final")
        if not Path(name).is_dir():
            raise UserError(f"eval: the run in {folder} has no final/ yet; let it finish first, with --resume")
        recipe = recipe or str(folder / "run.yaml")
    if recipe is None:
        raise UserError(f"eval: {model} is no run's folder, so say on what: `selftaught eval {model} RECIPE`")
    run = load_run(recipe, overrides, {"model": name})
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"lora": None})})  # nothing is trained here
    stem = Path(recipe).stem
    out = folder / "evals" / stem if of_run else Path(run.out).parent / "evals" / f"{folder.name}-{stem}"
    target = RunFolder(run.out if any(o.startswith("out=") for o in overrides) else _unused(out))
    # Who taught it need not be there any more.
    ground = lay_ground(run.model_copy(update={"teacher": None}), say, trains=False)
    try:
        if not ground.dataset.heldout:
            raise UserError("data.heldout = 0: there is nothing to evaluate on; set it above 0")
        if of_run:
            ground = _unseen(ground, folder, say)
        _, engine = load_engine(ground)
        summary = evaluate(ground, engine, target, 0)
        engine.close()
    finally:
        if ground.rewarder is not None:
            ground.rewarder.close()
    say(f"completions: {target.completions}")
    return summary


def _unseen(ground: Ground, folder: Path, say: Say) -> Ground:
    """`ground` without the held-out problems that the run in `folder` trained on, where it splits in another way.

    Raises UserError if none is left.
    """
    trained = load_run(str(folder / "run.yaml"))
    if (trained.data, trained.seed) == (ground.run.data, ground.run.seed):
        return ground  # one split is disjoint in itself
    try:
        seen = {problem.id for problem in data.load(trained.data, seed=trained.seed, say=lambda line: None).train}
    except UserError as error:
        say(f"the run's own training problems cannot be read, so some of these may be among them: {error}")
        return ground
    asked = ground.dataset.heldout
    kept = tuple(problem for problem in asked if problem.id not in seen)
    if not kept:
        raise UserError(f"eval: the run in {folder} trained on every one of the {len(asked)} held-out problems; "
                        "evaluate on other data, or leave data and seed as the run has them")
    if len(kept) < len(asked):
        say(f"{len(asked) - len(kept)} of {len(asked)} held-out problems left out: the run trained on them")
    return replace(ground, dataset=replace(ground.dataset, heldout=kept))


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is not there: no evaluation overwrites another."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(each for each in numbered if not each.exists())
