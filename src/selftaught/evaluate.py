"""Evaluation inside and outside a run: sample held-out problems, verify, save every completion, then measure."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any, Literal

from selftaught import data, privilege
from selftaught.assemble import External, Ground, Say, context_of, lay_ground, load_engine, sample_and_verify
from selftaught.before import rows_before
from selftaught.engines import PLACE
from selftaught.errors import UserError
from selftaught.eval import append_rows, compare, read_rows, rows_of, select, summarise
from selftaught.eval.rows import STUDENT, mend_tail, sampling_as_saved
from selftaught.recipe import label
from selftaught.records import Problem, Prompt, Request, Rollout, Sampling
from selftaught.report import RunFolder, refuse_other, versions
from selftaught.reward import Pending
from selftaught.rollout import Engine
from selftaught.run import Run, load_run
from selftaught.score.external import digest

EVALUATION = -1  # the step that keys an evaluation's randomness: every one draws with the same random numbers
CONTROL_SAMPLES = 2
# What a resumed evaluation may set anew: nothing that touches its completions.
MAY_CHANGE = ("out", "report", "checkpoint", "eval.k", "eval.best", "eval.every", *PLACE)
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
        shown = list(zip(problems, texts, strict=True))
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


def evaluate_model(model: str, recipe: str | None, overrides: Sequence[str], say: Say, *,
                   resume: bool = False) -> dict[str, Any]:
    """Sample, verify and measure a run's final model, a model folder or a Hub name on a recipe's held-out problems.

    Without a recipe, a run is measured by its own; problems that it trained on are left out. Completions go to a new
    folder: RUN/evals/RECIPE of a run, else evals/MODEL-RECIPE beside the recipe's `out`; or the `out` that an override
    names. With `resume`, an evaluation that was killed goes on, and samples only what is missing.
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
    stem = label(recipe)
    out = folder / "evals" / stem if of_run else Path(run.out).parent / "evals" / f"{folder.name}-{stem}"
    if any(o.startswith("out=") for o in overrides):
        out = Path(run.out)
    elif not resume:
        out = _unused(out)
    place = _begun(out, run, say) if resume else out
    # Who taught it need not be there any more, and what it was shown is not asked for.
    ground = lay_ground(run.model_copy(update={"teacher": None, "privilege": None}), say, trains=False)
    try:
        if not ground.dataset.heldout:
            raise UserError("data.heldout = 0: there is nothing to evaluate on; set it above 0")
        if of_run:
            ground = _unseen(ground, folder, say)
        target = RunFolder(place, resume=resume, warn=say)
        try:
            rows = _complete(ground, target, run, say)
        finally:
            target.leave()
    finally:
        if ground.rewarder is not None:
            ground.rewarder.close()
    say(f"completions: {target.completions}")
    return summarise(rows, run.eval.k)


def _complete(ground: Ground, folder: RunFolder, run: Run, say: Say) -> list[dict[str, Any]]:
    """Every completion of an evaluation, in order: those that are in the folder, and those missing, sampled now.

    They are saved batch by batch, so that a killed evaluation loses two batches at most.
    """
    problems, samples = heldout(ground), run.eval.samples
    asked = [Request(problem, ground.renderer.prompt(problem), EVALUATION, run.seed) for problem in problems]
    plan = {(problem.id, sample): None for problem in problems for sample in range(samples)}
    there = _saved(ground, folder.completions, asked, plan, say)
    if there:
        rest = f"sampling the other {len(plan) - len(there)}" if len(there) < len(plan) else "none is missing"
        say(f"{len(there)} of {len(plan)} completions are there; {rest}")
    backbone, engine = load_engine(ground)
    with closing(engine):
        _begin(folder, run, digest(backbone.model))
        for rows in _missing(ground, engine, asked, there):
            try:
                append_rows(folder.completions, rows)
            except OSError as error:
                raise UserError(f"{folder.completions} cannot be written ({error.strerror}); free some space and give "
                                "the same command with --resume") from error
            there |= {(row["problem"], row["sample"]): row for row in rows}
    return [there[key] for key in plan]


def _missing(ground: Ground, engine: Engine, asked: Sequence[Request],
             there: Mapping[tuple[str, int], Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows that are not `there`, batch by batch; one batch is verified while the next is sampled.

    A batch of which some are there is sampled whole: the last bits of a log-prob depend on who else is in the batch,
    and each response must get those that it would have got. Only what is missing of it is verified.
    """
    run, rewarder, sampling = ground.run, ground.rewarder, sampling_of(ground)
    assert rewarder is not None, "a recipe with held-out problems has a reward"
    under_way: deque[tuple[list[Rollout], Pending]] = deque()

    def rows() -> list[dict[str, Any]]:
        rollouts, pending = under_way.popleft()
        texts = [ground.tokenizer.decode(list(rollout.prompt.token_ids)) for rollout in rollouts]
        return rows_of(rollouts, pending.result(), model=run.model, seed=run.seed, step=0, prompts=texts)

    for requests, n in batches(asked, run.eval.samples, run.rollout.max_rows):
        keys = {(request.problem.id, request.first + i) for request in requests for i in range(n)}
        if keys <= there.keys():
            continue
        rollouts = [rollout for rollout in engine.sample(requests, n, sampling)
                    if (rollout.problem.id, rollout.sample) not in there]
        under_way.append((rollouts, rewarder.submit(rollouts)))
        if len(under_way) > 1:
            yield rows()
    while under_way:
        yield rows()


def batches(asked: Sequence[Request], samples: int, most: int) -> Iterator[tuple[list[Request], int]]:
    """What to ask an engine that decodes `most` responses at once: requests, and how many responses to each.

    Whole problems where their samples fit, as the engine itself would cut them; else one problem's, in parts.
    """
    if samples <= most:
        size = most // samples
        for start in range(0, len(asked), size):
            yield list(asked[start : start + size]), samples
        return
    for request in asked:
        for first in range(0, samples, most):
            yield [replace(request, first=first)], min(most, samples - first)


def _saved(ground: Ground, path: Path, asked: Sequence[Request], plan: Mapping[tuple[str, int], Any],
           say: Say) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows that an earlier, killed evaluation saved; a torn last one is cut away.

    Raises UserError where they are not what this evaluation would have made.
    """
    if mend_tail(path):
        say(f"the last line of {path} is truncated: cut away, to be sampled again")
    if not path.exists() or path.stat().st_size == 0:
        return {}
    run, sampling = ground.run, sampling_as_saved(sampling_of(ground))
    prompts = {request.problem.id: ground.tokenizer.decode(list(request.prompt.token_ids)) for request in asked}
    references = {request.problem.id: request.problem.answer for request in asked}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read_rows(path, say):
        key = (row["problem"], row["sample"])
        if key not in plan:
            raise UserError(f"resume: {path} holds sample {row['sample']} of problem {row['problem']}, which this "
                            "evaluation does not ask for: the data has changed; begin anew in another out")
        expected = {"model": run.model, "arm": STUDENT, "step": 0, "seed": run.seed, "sampling": sampling,
                    "prompt": prompts[row["problem"]], "reference": references[row["problem"]]}
        for field, value in expected.items():
            if row[field] != value:
                raise UserError(f"resume: {path} was sampled with {field} = {row[field]!r} (problem {row['problem']}), "
                                f"not {value!r}; begin anew in another out")
        found[key] = row
    return found


def _begin(folder: RunFolder, run: Run, weights: str) -> None:
    """Write what an evaluation starts with: eval.yaml and versions.json, with the digest of the model's weights.

    Raises UserError where another recipe or other weights have begun in this folder.
    """
    kept = folder.path / "versions.json"
    begun = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if begun.get("weights", weights) != weights:
        raise UserError(f"resume: the weights of {run.model} are not those that {folder.path} was begun with; put them "
                        "back, or begin anew in another out")
    folder.write_run(run.resolved(), may_change=MAY_CHANGE, name="eval.yaml")
    folder.write_versions({**versions(), "weights": weights})


def _begun(out: Path, run: Run, say: Say) -> Path:
    """The newest of `out`, out-2, out-3, ... that this evaluation has begun; `out` where there is none.

    Raises UserError where all that are there were begun by another recipe or model.
    """
    there = list(takewhile(Path.exists, _numbered(out)))
    refused = None
    for path in reversed(there):
        if not (path / "eval.yaml").is_file():
            if any(path.iterdir()):
                refused = refused or UserError(f"resume: {path} holds no eval.yaml, so it is not an evaluation that "
                                               "can go on; begin anew in another out")
            continue
        try:
            refuse_other(path / "eval.yaml", run.resolved(), MAY_CHANGE)
            return path
        except UserError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    say(f"nothing to resume in {out}: the evaluation begins")
    return out


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
    return next(each for each in _numbered(path) if not each.exists())


def _numbered(path: Path) -> Iterator[Path]:
    """path, path-2, path-3, ..."""
    return chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
