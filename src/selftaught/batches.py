"""The rollout batch of a step, dead groups drawn anew, and the optimiser batches that it is cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from selftaught.assemble import Parts, requests, sample_and_verify, shuffled
from selftaught.errors import UserError
from selftaught.measure import live_groups, refuse_gap, sampler_gap
from selftaught.records import Batch, Rollout, Verdict
from selftaught.tensors import Lazy


@dataclass(frozen=True)
class Drawn:
    """All that a step has sampled, and which of it is trained on."""

    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]
    used: tuple[bool, ...]
    metrics: dict[str, float]

    @property
    def batch(self) -> tuple[list[Rollout], list[Verdict]]:
        """The rollouts that are trained on, and their verdicts."""
        pairs = zip(self.rollouts, self.verdicts, self.used, strict=True)
        kept = [(rollout, verdict) for rollout, verdict, used in pairs if used]
        return [rollout for rollout, _ in kept], [verdict for _, verdict in kept]


def draw(parts: Parts, step: int) -> Drawn:
    """The step's rollouts and verdicts: prompts_per_step groups, of the problems that are next.

    With `rollout.filter_groups`, as many problems again are drawn until so many groups are live (by their scores, or
    by right and wrong, as in arXiv 2503.14476 eq. 11), for at most `max_resample` further rounds, and never a problem
    twice. The first prompts_per_step live groups are used; more are dropped, and not carried over, so that every
    rollout is of the weights that it trains. Where no group is live the first draw is used as it is.
    """
    config, wanted = parts.ground.run.rollout, parts.ground.run.rollout.prompts_per_step
    rollouts, verdicts = _round(parts, step, wanted, 0, ())
    if not config.filter_groups:
        return Drawn(tuple(rollouts), tuple(verdicts), (True,) * len(rollouts), {})
    first = ids = _problems(rollouts)
    live, rounds = live_groups(rollouts, verdicts, config.filter_groups), 0
    while len(live) < wanted and rounds < config.max_resample and len(ids) < len(parts.cursor):
        rounds += 1
        more = _round(parts, step, min(wanted, len(parts.cursor) - len(ids)), rounds, ids)
        live += live_groups(*more, config.filter_groups)
        rollouts, verdicts, ids = rollouts + more[0], verdicts + more[1], ids + _problems(more[0])
    kept = live[:wanted]
    used = set(kept or first)
    return Drawn(tuple(rollouts), tuple(verdicts), tuple(rollout.problem.id in used for rollout in rollouts), {
        "filter/drawn": float(len(ids)), "filter/kept": float(len(kept)), "filter/rounds": float(rounds),
        "filter/surplus": float(len(live) - len(kept)),
    })


def _round(parts: Parts, step: int, problems: int, number: int,
           already: Sequence[str]) -> tuple[list[Rollout], list[Verdict]]:
    ground = parts.ground
    rollouts, verdicts = sample_and_verify(ground, parts.engine,
                                           requests(ground, parts.cursor.next(problems, already), step),
                                           ground.run.rollout.num_generations, parts.sampling)
    if stale := {rollout.version for rollout in rollouts} - {step}:
        raise UserError(f"step {step + 1}: the engine sampled with the weights of step {min(stale)}, not with those of "
                        f"step {step}; its `sync` has to take them over")
    if ground.run.reward is not None and ground.run.reward.shuffle:
        verdicts = shuffled(verdicts, ground.run.seed, step, number)  # a control
    return rollouts, verdicts


def _problems(rollouts: Sequence[Rollout]) -> list[str]:
    return list(dict.fromkeys(rollout.problem.id for rollout in rollouts))


def optimiser_batches(parts: Parts, batch: Batch) -> Iterator[tuple[Batch, Mapping[str, Tensor]]]:
    """Each optimiser batch of a rollout batch, and the log-probs that the method's credit needs of it.

    One is the batch itself. Of several, all have `logp_old`, from a pass before the first update, in which views are
    scored too: what credit says of a rollout is what the policy that wrote it was taught. The student's own scores
    are taken anew before every later update where credit asks for them, as ratios of whole rollouts do (arXiv
    2507.18071).

    Raises:
        UserError: the sampler is not the scorer's distribution (of several: here, before the first update).
    """
    run, method, scorer = parts.ground.run, parts.ground.method, parts.scorer
    names = method.scores | ({"student"} if run.loss.sampler_cap else frozenset())
    if run.optim.updates_per_batch * run.optim.minibatches == 1:
        yield batch, scorer.sampled(names, batch)
        return
    logp = scorer.sampled(names | {"student"}, batch)
    tokens = replace(batch.tokens, logp_old=logp["student"])
    refuse_gap(sampler_gap(tokens, logp["student"]), run.rollout)
    own = frozenset(name for name in method.scores if name.partition(".")[0] == "student")
    batches = list(cut(replace(batch, tokens=tokens), run.optim.minibatches))
    for update in range(run.optim.updates_per_batch * len(batches)):
        part, rows = batches[update % len(batches)]
        known = {name: value[rows] for name, value in logp.items()}
        yield part, _anew(known, own, cache(partial(scorer.sampled, own, part))) if update else known


def _anew(known: Mapping[str, Tensor], own: frozenset[str], score: Callable[[], Mapping[str, Tensor]]) -> Lazy:
    """`known`, with the student's `own` scores from `score` when somebody asks for one."""
    def scored(name: str) -> Tensor:
        return score()[name]

    return Lazy({name: partial(scored if name in own else known.__getitem__, name) for name in known})


def cut(batch: Batch, count: int) -> Iterator[tuple[Batch, Tensor]]:
    """`count` batches of whole groups, in order, and which tokens (N,) each has; fewer where groups are fewer.

    Sizes differ by one group at most. Statistics of groups are those of the whole batch; weights and denominators
    will be the part's own.
    """
    assert batch.tokens.group is not None
    group = batch.tokens.group.tolist()
    groups = list(dict.fromkeys(group))
    count = min(count, len(groups))
    ends = [len(groups) * part // count for part in range(count + 1)]
    for start, end in pairwise(ends):
        mine = set(groups[start:end])
        yield pick(batch, [index for index, name in enumerate(group) if name in mine])


def pick(batch: Batch, rollouts: Sequence[int]) -> tuple[Batch, Tensor]:
    """The batch of these rollouts alone, in the order of the batch, and which tokens (N,) it has."""
    tokens = batch.tokens
    kept = torch.zeros(len(batch.responses), dtype=torch.bool, device=tokens.tokens.device)
    kept[list(rollouts)] = True
    rows = kept[tokens.sequence_ids]
    per_token = {name: value[rows] for name in ("tokens", "logp_old", "terminal", "mask", "logp_sampler")
                 if (value := getattr(tokens, name)) is not None}
    per_rollout = {name: value[kept] for name in ("reward", "group", "privileged", "privileges")
                   if (value := getattr(tokens, name)) is not None}
    number = kept.long().cumsum(0) - 1
    mine = replace(tokens, sequence_ids=number[tokens.sequence_ids[rows]], **per_token, **per_rollout)
    chosen = kept.nonzero().flatten().tolist()
    contexts = {name: tuple(prompts[i] for i in chosen) for name, prompts in batch.contexts.items()}
    return replace(batch, tokens=mine, contexts=contexts, responses=tuple(batch.responses[i] for i in chosen)), rows
