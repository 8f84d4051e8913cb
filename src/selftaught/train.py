"""The loop: sample, verify, score, credit, loss, update. It reads like the papers' algorithm box."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from selftaught.assemble import assemble, lay_ground, make_batch, privileges_of
from selftaught.batches import draw, optimiser_batches
from selftaught.before import check_before
from selftaught.errors import UserError
from selftaught.eval import rows_of
from selftaught.finish import finish
from selftaught.heap import keeping
from selftaught.leakage import Watch
from selftaught.loss import chunked_loss
from selftaught.measure import over_updates, refuse_gap, rollout_metrics, token_metrics
from selftaught.methods import batch_credit
from selftaught.privilege import describe
from selftaught.records import Batch
from selftaught.report import Health, Progress, Trackers
from selftaught.reward import from_callables
from selftaught.run import Run, load_run
from selftaught.session import Interrupts, Place, Session


@dataclass(frozen=True)
class Finished:
    """A run that has ended: its folder, results.json (empty where nothing was held out), the signal that ended it."""

    run: Run
    folder: Path
    results: Mapping[str, Any]
    interrupted: int | None = None


def train(recipe: str | Path | Mapping[str, Any] | Run | None = None, *, resume: bool = False,
          overrides: Sequence[str] = (), console: Console | None = None, **sections: Any) -> Finished:
    """Train by a recipe, by keyword sections with the recipe's names, or by a recipe with sections in their place.

        selftaught.train(model="Qwen/Qwen3-1.7B", data="mine.jsonl", reward=my_function,
                         method="rlsd", privilege="answer")

    `reward` may be a function in TRL's keyword form. Returns the finished run; its folder holds `final/`. With `resume`
    it goes on from the newest whole checkpoint; where there is no run yet, it begins one.

    Raises:
        UserError: whatever the user can mend, before a model is loaded where that is possible.
    """
    reward, functions = from_callables(sections.pop("reward", None))
    if reward is not None:
        sections["reward"] = reward
    if isinstance(recipe, Run) and not overrides and not sections:
        run = recipe  # as it is: what its recipe left unsaid must stay unsaid (an absent tracker is then no error)
    else:
        run = load_run(recipe.resolved() if isinstance(recipe, Run) else recipe or {}, overrides, sections)
    with ExitStack() as stack:
        progress = Progress(run.optim.steps, console)
        place = Place.take(run, resume, progress)
        stack.callback(place.folder.leave)
        if place.start is None:
            check_before(run)
        ground = lay_ground(run, progress.say, functions)
        if ground.rewarder is not None:
            stack.callback(ground.rewarder.close)
        parts = assemble(ground)
        stack.callback(parts.engine.close)
        place.begin(run)
        health = Health(run.report.patience, ground.method.needs, ground.privileged)
        trackers = Trackers(run.report, place.folder.path, place.folder.path.name, run=run.resolved(),
                            resume_step=place.resumed_step, warn=progress.warn)
        stack.callback(trackers.close)
        session = Session(parts, place.folder, place.checkpoints, trackers, progress, health, Watch.of(parts))
        if place.start is not None:
            session.restore(place.start)
        interrupts = stack.enter_context(Interrupts())
        with progress:
            loop(session, interrupts)
        if interrupts.caught is not None:
            progress.say(session.farewell())
            return Finished(run, place.folder.path, {}, interrupts.caught)
        return Finished(run, place.folder.path, finish(session))


def loop(session: Session, interrupts: Interrupts) -> None:
    """From the step that is next to the last one, or to a signal."""
    run = session.parts.ground.run
    if run.rollout.truncated:
        session.progress.warn("rollout.top_p, rollout.top_k: sampled from fewer tokens than are scored, so "
                              "rollout.max_logp_gap cannot be checked")
    if session.done == 0 and session.saved is None:
        session.record(session.evaluate())
    while session.done < run.optim.steps and interrupts.caught is None:
        cursor, updates = copy(session.parts.cursor), session.parts.optimizer.updates
        try:
            metrics = step(session)
        except UserError:
            if session.parts.optimizer.updates == updates:  # it changed nothing: what was done before it is kept
                session.parts = replace(session.parts, cursor=cursor)
                session.save()
            raise
        session.done += 1
        if (run.eval.every and session.done % run.eval.every == 0) or session.done == run.optim.steps:
            metrics |= session.evaluate()
        session.record(metrics)
        if session.save_is_due():
            session.save()
        try:
            session.health.verdict()
        except UserError:
            session.save()
            raise
    if interrupts.caught is not None:
        session.save()


def step(session: Session) -> dict[str, float]:
    """One rollout batch."""
    parts, ground = session.parts, session.parts.ground
    run, number = ground.run, session.done
    began = time.monotonic()

    drawn = draw(parts, number)                                                                 # y ~ pi(. | x); r
    rollouts, verdicts = drawn.batch                                                            # without dead groups
    metrics = {"time/sample": session.clock("sampling", began), "time/score": 0.0}
    leaked = session.watch.metrics(rollouts, verdicts, number) if session.watch else {}         # if eval.leakage.every

    scored = time.monotonic()
    privileges = privileges_of(ground, rollouts, verdicts, number)                              # c, or None
    batch = make_batch(rollouts, verdicts, privileges, number, parts.backbone.device,           # ragged, no padding
                       mask_truncated=run.rollout.mask_truncated)
    updates = []
    for part, logp in optimiser_batches(parts, batch):                                          # one, or several
        metrics["time/score"] += session.clock("scoring", scored)
        updates.append(update(session, part, logp))
        scored = time.monotonic()
    metrics |= over_updates(updates)

    updated = time.monotonic()
    parts.teachers.update(number, skipped=metrics["skipped"] == len(updates))
    parts.engine.sync(parts.backbone.exported(), number + 1)
    metrics["time/update"] += session.clock("updating", updated)

    metrics |= rollout_metrics(drawn.rollouts, drawn.verdicts if ground.rewarder else ()) | drawn.metrics
    metrics |= parts.teachers.distances() | (describe(privileges) if ground.privileged else {})
    metrics["step_time"] = time.monotonic() - began
    metrics["tokens_per_second"] = metrics["completions/tokens"] / metrics["step_time"]
    health, sentences = session.health.check(metrics)
    for sentence in sentences:
        session.progress.warn(f"step {number + 1}: {sentence}")
    if run.report.save_rollouts:
        rows = rows_of(drawn.rollouts, drawn.verdicts, model=run.model, seed=run.seed, step=number + 1, arm="train")
        if run.rollout.filter_groups:
            rows = [{**row, "used": used} for row, used in zip(rows, drawn.used, strict=True)]
        session.folder.log_rollouts(number + 1, rows)
    return metrics | leaked | health


def update(session: Session, batch: Batch, logp: Mapping[str, Tensor]) -> dict[str, float]:
    """One optimiser batch."""
    parts, method, scorer = session.parts, session.parts.ground.method, session.parts.scorer
    run, began = session.parts.ground.run, time.monotonic()
    credit, weight, correction = batch_credit(                                                  # constants, whole batch
        method, batch.tokens, logp, reduction=run.loss.reduction, length=run.loss.length,
        sampler_cap=run.loss.sampler_cap)
    loss, found = 0.0, []
    with parts.backbone.accumulating(parts.optimizer.gathered) as head_grad, keeping():
        for micro in scorer.split(batch):
            rows = micro.tokens
            reduced = chunked_loss(
                method.loss, scorer.hidden(batch, micro), scorer.heads(), batch.tokens.tokens[rows],
                {name: value[rows] for name, value in credit.items()}, weight[rows] * correction[rows],
                chunk=run.loss.chunk, temperature=run.rollout.temperature, head_grad=head_grad)
            reduced.loss.backward()
            loss += reduced.loss.item()
            found.append(reduced.metrics)
            del reduced  # the nodes of its graph: small blocks, between which the next pass would find no room
    metrics = {"loss": loss} | token_metrics(batch, credit, found, run.loss.sampler_cap,
                                              session.parts.ground.privileged)
    if batch.tokens.logp_old is None:
        refuse_gap(metrics, run.rollout)
    metrics |= parts.optimizer.step(session.done)                                               # clip, AdamW
    parts.optimizer.zero_grad()                                                                 # frees it for sampling
    return metrics | {"time/update": session.clock("updating", began)}
