"""Leakage measured: the responses of a student, scored under itself, its teacher's views and a reference model.

From live rollouts (`Watch`, every so many training steps) and from saved completions (`learned.py`). What the measures
are stands in `eval/leakage.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selftaught import privilege
from selftaught.assemble import Ground, Parts
from selftaught.errors import UserError
from selftaught.eval import LeakageConfig, Scored, leakage_table
from selftaught.eval.leakage import ARMS, DEMONSTRATION, REFERENCE, REFERENCE_WRONG, STUDENT, character_spans
from selftaught.eval.measures import is_right
from selftaught.evaluate import EVALUATION
from selftaught.optim import Teachers
from selftaught.privilege import PrivilegeConfig
from selftaught.records import Batch, Privilege, Prompt, Rollout, Sampling, TokenBatch, Verdict, View, Weights
from selftaught.score import Backbone, Scorer
from selftaught.score.backbone import Named
from selftaught.score.external import id_bytes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Models:
    """Whose responses they are, and the model that training began with.

    `first` is that model's own backbone; where it is None, `initial` are its weights for the student's backbone, and
    None there means that they are the student's own.
    """

    student: Backbone
    first: Backbone | None = None
    initial: Named | None = None


def config_of(ground: Ground) -> PrivilegeConfig:
    """The privilege that is asked about: the recipe's, or the answer where the recipe has none."""
    return ground.run.privilege or PrivilegeConfig(kind="answer")


def first_of(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], config: LeakageConfig
             ) -> tuple[list[Rollout], list[Verdict]]:
    """The first `config.samples` rollouts of the first `config.problems` problems, in order."""
    taken: dict[str, int] = {}
    kept = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        count = taken.get(rollout.problem.id, 0)
        if count < config.samples and (count or len(taken) < config.problems):
            taken[rollout.problem.id] = count + 1
            kept.append((rollout, verdict))
    return [rollout for rollout, _ in kept], [verdict for _, verdict in kept]


def written(rollout: Rollout) -> tuple[int, ...]:
    """The ids of the response without the token that ended it: what every view is compared on."""
    return rollout.token_ids[:-1] if rollout.finish == "stop" else rollout.token_ids


def contexts(ground: Ground, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], demonstrations: int,
             room: int | None) -> dict[str, list[Privilege | None]]:
    """What each rollout's teacher is shown, by arm; and `demonstrations` right responses, one at a time."""
    config, renderer, seed = config_of(ground), ground.renderer, ground.run.seed
    problems = list({rollout.problem.id: rollout.problem for rollout in rollouts}.values())
    found: dict[str, list[Privilege | None]] = {}
    for arm in ARMS:  # of a step of its own, so that another problem's is not the very one that is wrong
        step = EVALUATION - (arm == "other_problem")
        given = privilege.for_problems(privilege.control(config, arm), problems, ground.dataset.train, renderer,
                                       seed=seed, step=step, room=room)
        by_id = {problem.id: one for problem, one in zip(problems, given, strict=True)}
        found[arm] = [by_id[rollout.problem.id] for rollout in rollouts]
    return found | _demonstrated(ground, rollouts, verdicts, demonstrations, room)


def _demonstrated(ground: Ground, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], count: int,
                  room: int | None) -> dict[str, list[Privilege | None]]:
    """Up to `count` right responses to each problem, drawn without return, shown to all responses to it alike.

    The expectation of PCMI is over demonstrations as the policy writes them, whichever response is scored: so equal
    texts count as often as they were drawn, and a response may be shown to itself.
    """
    config = config_of(ground)
    own = config.template if config.base == "demonstration" else None
    shown = PrivilegeConfig(kind="demonstration", exclude_self=False, template=own)
    right: dict[str, list[tuple[Rollout, Verdict]]] = {}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.score is not None and verdict.status == "right" and rollout.text.strip():
            right.setdefault(rollout.problem.id, []).append((rollout, verdict))
    drawn = {problem: random.Random(f"{ground.run.seed}/demonstrations/{problem}").sample(each, min(count, len(each)))
             for problem, each in right.items()}
    found: dict[str, list[Privilege | None]] = {}
    for k in range(count):
        kth = [each[k] for each in drawn.values() if k < len(each)]  # one of each problem: it is shown itself alone
        given = privilege.build(shown, [rollout for rollout, _ in kth], [verdict for _, verdict in kth],
                                ground.dataset.train, ground.renderer, seed=ground.run.seed, step=EVALUATION, room=room)
        by_id = {rollout.problem.id: one for (rollout, _), one in zip(kth, given, strict=True)}
        found[f"{DEMONSTRATION}{k:02d}"] = [by_id.get(rollout.problem.id) for rollout in rollouts]
    return found


def score(ground: Ground, models: Models, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict],
          config: LeakageConfig, *, temperature: float = 1.0, room: int | None = None,
          only: Sequence[str] | None = None) -> list[Scored]:
    """Each rollout with the log-probs of its tokens under every view, at `temperature`.

    `only` names the views that are wanted beside what texts show ("student", "reference", ...); None: all.
    """
    shown = contexts(ground, rollouts, verdicts, config.demonstrations, room)
    first: Weights = "external" if models.first is not None else "initial"
    taught: Weights = "live" if config.teacher == "live" else first
    places = {name: nth for nth, name in enumerate(shown, start=1)}
    views = {f"teacher/{arm}": View(taught, "privileged", nth=places[arm]) for arm in ARMS}
    views |= {name: View(taught, "privileged", nth=places[name]) for name in shown if name.startswith(DEMONSTRATION)}
    views |= {REFERENCE: View(first, "plain"), REFERENCE_WRONG: View(first, "privileged", nth=places["wrong"])}
    there = [i for i, rollout in enumerate(rollouts) if written(rollout)]
    plain = tuple(rollouts[i].prompt.token_ids for i in there)
    seen = {"plain": plain, "privileged": plain}
    for name, nth in places.items():
        seen[f"privileged.{nth}"] = tuple(() if (one := shown[name][i]) is None else one.prompt.token_ids
                                          for i in there)
    wanted = frozenset(only if only is not None else (STUDENT, f"{STUDENT}.entropy", *views))
    logp = _by_rollout(ground, models, views, wanted, seen, [written(rollouts[i]) for i in there], temperature)
    by_place = dict(zip(there, logp, strict=True))
    table = id_bytes(ground.tokenizer)
    return [_scored(ground, table, rollout, verdict, shown["right"][i], by_place.get(i, {}))
            for i, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True))]


def _by_rollout(ground: Ground, models: Models, views: Mapping[str, View], wanted: frozenset[str],
                seen: Mapping[str, tuple[tuple[int, ...], ...]], responses: Sequence[tuple[int, ...]],
                temperature: float) -> list[dict[str, Any]]:
    """(R,) float64 arrays by name for each response; a view that has no prompt for it is left out."""
    if not responses:
        return []
    kept = {name: view for name, view in views.items() if name in wanted}
    lengths = [len(ids) for ids in responses]
    tokens = TokenBatch(
        tokens=torch.tensor([i for ids in responses for i in ids], device=models.student.device),
        sequence_ids=torch.arange(len(responses)).repeat_interleave(torch.tensor(lengths)).to(models.student.device))
    scorer = Scorer(models.student, kept, lambda name: models.initial if kept[name].weights == "initial" else None,
                    ground.run.optim.token_budget, temperature, models.first)
    found = scorer.sampled(wanted, Batch(tokens, seen, tuple(responses)))
    parts = {name: value.double().cpu().split(lengths) for name, value in found.items()}
    prompts = {name: seen[f"privileged.{view.nth}" if view.nth else "plain"] for name, view in kept.items()}
    return [{name: part[i].numpy() for name, part in parts.items() if name not in prompts or prompts[name][i]}
            for i in range(len(responses))]


def _scored(ground: Ground, table: Mapping[int, bytes], rollout: Rollout, verdict: Verdict, right: Privilege | None,
            logp: dict[str, Any]) -> Scored:
    ids = written(rollout)
    evidence = right.text if right is not None else ""
    answers = dict.fromkeys(text.strip() for text in (verdict.answer, rollout.problem.answer) if text)
    own = tuple(ground.tokenizer(evidence, add_special_tokens=False, verbose=False)["input_ids"]) if evidence else ()
    return Scored(
        problem=rollout.problem.id, sample=rollout.sample,
        right=is_right({"score": verdict.score, "status": verdict.status}, 1.0),
        prompt=str(ground.tokenizer.decode(list(rollout.prompt.token_ids))), response=rollout.text,
        privilege=evidence, answers=tuple(answers),
        spans=character_spans([table.get(i, b"") for i in ids], rollout.text),
        logp={name: value for name, value in logp.items() if not name.endswith(".entropy")},
        ids=(ids, own, rollout.prompt.token_ids), entropy=logp.get(f"{STUDENT}.entropy"))


# ------------------------------------------------------------------------------------------------ saved completions


def rollouts_of(ground: Ground, rows: Sequence[Row], warn: Any) -> tuple[list[Rollout], list[Verdict]]:
    """Saved rows as rollouts again: the saved text in the tokenizer's own tokens, after the recipe's own prompt.

    A text does not say how it was cut into tokens when it was sampled, nor which token ended it: the stop token is
    left out, and how many responses come to another number of tokens is said. Raises UserError where the saved prompts
    are not those that the recipe makes now.
    """
    problems = {problem.id: problem for problem in (*ground.dataset.train, *ground.dataset.heldout)}
    known = [row for row in rows if row["problem"] in problems and row.get("response") is not None]
    if not known:
        raise UserError("leakage: none of the saved completions is of a problem that the recipe's data hold; give the "
                        "recipe and data that they were sampled with")
    rollouts, verdicts, recut = [], [], 0
    prompts: dict[str, Prompt] = {}
    for row in known:
        problem = problems[row["problem"]]
        prompt = prompts.setdefault(problem.id, ground.renderer.prompt(problem))
        ids = tuple(ground.tokenizer(row["response"], add_special_tokens=False, verbose=False)["input_ids"])
        stopped = row.get("finish") == "stop"
        recut += row.get("tokens") is not None and row["tokens"] != len(ids) + stopped
        sampling = Sampling(temperature=float((row.get("sampling") or {}).get("temperature", 1.0)))
        rollouts.append(Rollout(problem, row["sample"], prompt, ids, (), row["response"], "length", sampling, 0,
                                row.get("step") or 0))
        verdicts.append(Verdict(row["score"], row.get("status") or ("right" if (row["score"] or 0) >= 1 else "wrong"),
                                answer=row.get("answer"), strategy=row.get("strategy")))
    other = sum(isinstance(row.get("prompt"), str)
                and row["prompt"] != ground.tokenizer.decode(list(prompts[row["problem"]].token_ids)) for row in known)
    if other:
        raise UserError(f"leakage: {other} of {len(known)} completions were sampled from another prompt than this "
                        "recipe makes; leave data and seed as they were")
    if len(known) < len(rows):
        warn(f"{len(rows) - len(known)} of {len(rows)} completions left out: their problems are not in the data")
    if recut:
        warn(f"{recut} of {len(known)} responses come to another number of tokens than was sampled; every view scores "
             "the same ones")
    return rollouts, verdicts


def temperature_of(rollouts: Sequence[Rollout]) -> float:
    """The temperature that they were sampled at; greedy ones are scored at 1. Raises UserError for several."""
    found = {rollout.sampling.temperature or 1.0 for rollout in rollouts}
    if len(found) > 1:
        raise UserError(f"leakage: completions of several temperatures at once ({', '.join(map(str, sorted(found)))}); "
                        "choose one evaluation")
    return found.pop() if found else 1.0


# ---------------------------------------------------------------------------------------------------- while training


class Watch:
    """The leakage of a run's own rollouts, every `eval.leakage.every` steps, before they update anything.

    It holds the weights that the run began with, so make it before a checkpoint is restored. It draws no random number
    and changes nothing: a watched run is the same run.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._config = parts, parts.ground.run.eval.leakage
        held = next((name for name, view in parts.ground.method.views.items() if view.weights == "initial"), None)
        if held is not None:
            self._initial = parts.teachers.weights(held)
        else:
            self._initial = Teachers({REFERENCE: View("initial")}, parts.backbone.model).weights(REFERENCE)

    @classmethod
    def of(cls, parts: Parts) -> Watch | None:
        """None where the recipe does not ask for it."""
        return None if parts.ground.run.eval.leakage.every is None else cls(parts)

    def metrics(self, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], step: int) -> dict[str, float]:
        """leakage/NAME: means over problems; {} where step number `step` (from 0) is not one of those asked for."""
        assert self._config.every is not None
        if (step + 1) % self._config.every:
            return {}
        began = time.monotonic()
        ground = self._parts.ground
        chosen, judged = first_of(rollouts, verdicts, self._config)
        scored = score(ground, Models(self._parts.backbone, initial=self._initial), chosen, judged, self._config,
                       temperature=ground.run.rollout.temperature, room=ground.room)
        return leakage_metrics(scored, self._config) | {"time/leakage": time.monotonic() - began}


def leakage_metrics(scored: Sequence[Scored], config: LeakageConfig) -> dict[str, float]:
    """leakage/NAME: each measure's mean over the problems that have it; without those that none has."""
    _, names, values_PM = leakage_table(scored, config)
    columns = {name: [v for v in values_PM[:, m].tolist() if v == v] for m, name in enumerate(names)}
    return {f"leakage/{name}": sum(values) / len(values) for name, values in columns.items() if values}
