"""Pre-flight: what a recipe will do, looked at before the long run. Each line says ok or what to change."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from selftaught import privilege
from selftaught.assemble import Ground, Parts, assemble, device_of, make_batch, requests, sample_and_verify
from selftaught.errors import UserError
from selftaught.forecast import GB, available_memory, forecast
from selftaught.loss import chunked_loss
from selftaught.methods import batch_credit
from selftaught.records import Rollout, Verdict, View
from selftaught.report import duration, refuse_taken, versions
from selftaught.rollout.vllm_engine import VllmEngine
from selftaught.score import Scorer

NULL_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}  # nats: the same weights and the same prompt must agree
SAMPLER_TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
TRIAL_PROBLEMS = 2


@dataclass(frozen=True)
class Line:
    """One finding: fine, or what to change."""

    ok: bool
    text: str


def examine(ground: Ground, say: Callable[[str], None], *, resume: bool = False) -> list[Line]:
    """Everything that can be known before the first step; loads the model and samples one small batch."""
    lines = [*environment(ground), *folder(ground, resume), *lengths(ground), *rewards(ground)]
    say(seam(ground))
    parts = assemble(ground)
    with closing(parts.engine):
        if isinstance(parts.engine, VllmEngine):
            lines.append(Line(True, f"rollouts by {parts.engine.client.facts}"))
        return [*lines, *trial(ground, parts), null_teacher(ground, parts)]


def environment(ground: Ground) -> list[Line]:
    """Versions, device, and the memory forecast against what there is."""
    found = versions()
    told = forecast(ground)
    free = available_memory(ground)
    fits = free is None or told.total < free
    have = "" if free is None else f"; {free / GB:.1f} GB are free"
    device = device_of(ground.run)
    loops = {"none": ", without compiled loops: a C compiler (gcc, clang) makes steps faster", "compiled": ""}
    remedy = "" if fits else ": lower optim.token_budget, use optim.activation_checkpointing=true or bfloat16"
    return [
        Line(True, f"python {found['python']}, torch {found['torch']}, transformers {found['transformers']}, "
                   f"device {device}, {found['torch_threads']} threads"
                   + (loops[str(found["cpu_loops"])] if device == "cpu" else "")),
        *(Line(True, text) for text in told.lines()[:2]),
        Line(fits, told.lines()[2] + have + remedy),
    ]


def folder(ground: Ground, resume: bool) -> list[Line]:
    """Whether a run may begin, or go on, where it is to live; nothing to say where it may."""
    try:
        refuse_taken(Path(ground.run.out), resume=resume)
    except UserError as error:
        return [Line(False, str(error))]
    return []


def lengths(ground: Ground) -> list[Line]:
    """Prompts against the limit."""
    limit = ground.run.data.max_prompt_length
    sizes = [len(ground.renderer.prompt(problem).token_ids) for problem in ground.dataset.train]
    text = f"prompts: {min(sizes)} to {max(sizes)} tokens, mean {sum(sizes) / len(sizes):.0f}"
    counts = ground.renderer.counts()
    trimmed = counts["prompts_trimmed"] / max(1, len(sizes))
    dropped = [note for note in ground.dataset.notes if "dropped" in note or "left out" in note]
    if limit is None:
        return [Line(True, f"{text}; no limit set")]
    return [Line(trimmed < 0.05, f"{text}; limit {limit}, {trimmed:.1%} lost few-shot examples to it"
                 + ("" if trimmed < 0.05 else ": raise data.max_prompt_length")), *(Line(True, n) for n in dropped)]


def rewards(ground: Ground) -> list[Line]:
    """A dry call on a right, a wrong and an empty answer: the right one must score more than the others."""
    if ground.rewarder is None:
        return []
    problem = ground.dataset.train[0]
    if problem.answer is None:
        return [Line(True, "reward: the data has no answers to try it on")]
    other = next((p for p in ground.dataset.train if p.answer not in (None, problem.answer)), None)
    worked = bool(ground.dataset.shots)  # few-shot examples show their working, and so does a right response
    tried = {"right": problem.solution if worked and problem.solution else problem.answer}
    if other is not None and other.answer is not None:
        tried["wrong"] = other.solution if worked and other.solution else other.answer
    tried["empty"] = ""
    verdicts = dict(zip(tried, ground.rewarder([_made(ground, text) for text in tried.values()]), strict=True))
    best = verdicts["right"].score
    out = []
    for name, verdict in verdicts.items():
        change = ""
        if verdict.status in ("error", "timeout"):
            change = f": the reward fails on it ({verdict.feedback}); mend it"
        elif verdict.score is None:
            change = ": the reward has no opinion (None) of it, so it teaches nothing; let it return a number"
        elif name != "right" and best is not None and verdict.score >= best:
            change = ", no less than a right one: look at `reward`, unless it does not judge answers"
        score = "no score" if verdict.score is None else f"score {verdict.score:g}"
        a = "an" if name == "empty" else "a"
        out.append(Line(not change, f"reward of {a} {name} answer {tried[name]!r}: {score}, {verdict.status}{change}"))
    return out


def _made(ground: Ground, text: str) -> Rollout:
    problem = ground.dataset.train[0]
    ids = tuple(ground.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Rollout(problem, 0, ground.renderer.prompt(problem), ids, (0.0,) * len(ids), text, "stop",
                   ground.run.rollout.sampling(), 0, 0)


def seam(ground: Ground) -> str:
    """The teacher's prompt with what the student does not see marked; without a privilege, the student's prompt."""
    problem, config = ground.dataset.train[0], ground.run.privilege
    if config is None or not ground.privileged:
        return "the student's prompt:\n" + ground.tokenizer.decode(list(ground.renderer.prompt(problem).token_ids))
    shown = privilege.control(config, "right")
    blocks = [privilege.block(shown, one) for one in (*ground.dataset.shots, problem)]
    return ("the student's prompt, and between [[+ and +]] what only the teacher sees:\n"
            + ground.renderer.seam(problem, blocks[-1], blocks[:-1], shown.thinking))


def trial(ground: Ground, parts: Parts) -> list[Line]:
    """A small batch through sampler, scorer and update: the gap between the two, and how long a step will take."""
    run = ground.run
    problems = ground.dataset.train[:TRIAL_PROBLEMS]
    began = time.monotonic()
    rollouts, verdicts = sample_and_verify(ground, parts.engine, requests(ground, problems, 0),
                                           run.rollout.num_generations, parts.sampling)
    sampled = time.monotonic() - began
    batch = make_batch(rollouts, verdicts, [None] * len(rollouts), 0, parts.backbone.device)
    began = time.monotonic()
    logp = parts.scorer.sampled(ground.method.scores | {"student"}, batch)
    assert batch.tokens.logp_sampler is not None
    gap = (logp["student"] - batch.tokens.logp_sampler).abs()
    unmasked = replace(batch.tokens, privileged=None)
    credit, weight, _ = batch_credit(ground.method, unmasked, logp, reduction=run.loss.reduction,
                                     length=run.loss.length, sampler_cap=None)
    for micro in parts.scorer.split(batch):
        rows = micro.tokens
        chunked_loss(ground.method.loss, parts.scorer.hidden(batch, micro), parts.scorer.heads(),
                     batch.tokens.tokens[rows], {n: v[rows] for n, v in credit.items()}, weight[rows]).loss.backward()
    parts.optimizer.zero_grad()
    updated = time.monotonic() - began
    scale = run.rollout.prompts_per_step / len(problems)
    evaluations = 2 + (run.optim.steps // run.eval.every - 1 if run.eval.every else 0)
    share = len(ground.dataset.heldout) * run.eval.samples / len(rollouts)
    total = run.optim.steps * scale * (sampled + updated) + evaluations * share * sampled
    cut = sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts)
    sampled_in = parts.engine.client.facts.dtype if isinstance(parts.engine, VllmEngine) else run.optim.dtype
    bound = max(SAMPLER_TOLERANCE[run.optim.dtype], SAMPLER_TOLERANCE[sampled_in])
    close = run.rollout.truncated or gap.max().item() <= bound  # truncated, the two differ by what was cut away
    return [
        Line(True, f"time: a step about {duration(scale * (sampled + updated))} (sampling {sampled * scale:.1f} s, "
                   f"scoring and update {updated * scale:.1f} s); the run about {duration(total)}"),
        Line(cut < 0.5, f"responses: {cut:.0%} reached the limit of {run.rollout.max_completion_length} tokens"
             + ("" if cut < 0.5 else ": raise rollout.max_completion_length or give rollout.stop strings")),
        Line(close, f"sampler against scorer: log-probs differ by {gap.mean().item():.1e} nats on average, "
                    f"{gap.max().item():.1e} at most" + ("" if close else f", above {bound}: do not train like this")),
    ]


def null_teacher(ground: Ground, parts: Parts) -> Line:
    """The same weights with an empty privilege must be the student itself."""
    if ground.run.privilege is None:
        return Line(True, "null teacher: the recipe has no privilege")
    problems = ground.dataset.train[:TRIAL_PROBLEMS]
    nothing = privilege.control(ground.run.privilege, "empty").model_copy(update={"thinking": None})
    empty = privilege.for_problems(nothing, problems, ground.dataset.train, ground.renderer, seed=ground.run.seed,
                                   step=0)
    rollouts = parts.engine.sample(requests(ground, problems, 0), 2, parts.sampling)
    batch = make_batch(rollouts, [Verdict(None)] * len(rollouts), [c for c in empty for _ in range(2)], 0,
                       parts.backbone.device)
    scorer = Scorer(parts.backbone, {"teacher": View("live", "privileged")}, lambda name: None,
                    ground.run.optim.token_budget)
    with torch.no_grad():
        logp = scorer.sampled(frozenset({"teacher", "student"}), batch)
    gap = (logp["teacher"] - logp["student"]).abs().max().item()
    ok = gap <= NULL_TOLERANCE[ground.run.optim.dtype]
    return Line(ok, f"null teacher: an empty privilege moves log-probs by {gap:.1e} nats at most"
                + ("" if ok else ": student and teacher see different prompts; look at the seam above"))
