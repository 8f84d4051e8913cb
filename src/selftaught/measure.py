"""The numbers of one training step, under TRL's names where the meaning is the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Literal

import torch
from torch import Tensor

from selftaught.credit import broadcast
from selftaught.credit.group import relative
from selftaught.errors import UserError
from selftaught.records import Batch, Credit, Rollout, TokenBatch, Verdict
from selftaught.rollout import RolloutConfig
from selftaught.tensors import MAX_LOG_RATIO, difference


def live_groups(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict],
                by: Literal[True, "right"] = True) -> list[str]:
    """Ids of the problems of which some rollout was better than its siblings, by the methods' own rule, in order.

    By "right": of which some rollout with a score was right and some was not (arXiv 2503.14476 eq. 11).
    """
    if by == "right":
        found: dict[str, set[bool]] = {}
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            if verdict.score is not None:
                found.setdefault(rollout.problem.id, set()).add(verdict.status == "right")
        return [problem for problem, kinds in found.items() if len(kinds) == 2]
    reward = torch.tensor([float("nan") if v.score is None else v.score for v in verdicts])
    names = {rollout.problem.id: i for i, rollout in enumerate(rollouts)}
    moved = relative(reward, torch.tensor([names[rollout.problem.id] for rollout in rollouts])) != 0
    return list(dict.fromkeys(r.problem.id for r, m in zip(rollouts, moved.tolist(), strict=True) if m))


def rollout_metrics(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Rewards, statuses and lengths of one step's rollouts; `verdicts` is empty where the run has no reward.

    `reward_std` is TRL's: the mean over groups of the unbiased standard deviation within the group, 0 for one score.
    """
    lengths = torch.tensor([float(len(rollout.token_ids)) for rollout in rollouts])
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        "completions/tokens": lengths.sum().item(),
    }
    scores = torch.tensor([v.score for v in verdicts if v.score is not None])
    if scores.numel():
        metrics["reward"] = scores.mean().item()
        groups: dict[str, list[float]] = {}
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            if verdict.score is not None:
                groups.setdefault(rollout.problem.id, []).append(verdict.score)
        metrics["reward_std"] = sum(stdev(group) if len(group) > 1 else 0.0 for group in groups.values()) / len(groups)
        count = len({rollout.problem.id for rollout in rollouts})
        metrics["frac_reward_zero_std"] = 1 - len(live_groups(rollouts, verdicts)) / count
    for status, count in Counter(verdict.status for verdict in verdicts).items():
        metrics[f"reward/status/{status}"] = count / len(verdicts)
    for part in sorted({name for verdict in verdicts for name in verdict.parts}):
        values = torch.tensor([v.parts[part] for v in verdicts if v.parts.get(part) is not None])
        metrics[f"rewards/{part}/mean"] = values.mean().item()
    return metrics


def sampler_gap(tokens: TokenBatch, logp: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from `logp`, the trainer's under the weights that sampled, in nats."""
    if tokens.logp_sampler is None:
        return {}
    gap = (logp - tokens.logp_sampler).abs()
    return {"sampling/sampling_logp_difference/mean": gap.mean().item(),
            "sampling/sampling_logp_difference/max": gap.max().item()}


def refuse_gap(metrics: Mapping[str, float], config: RolloutConfig) -> None:
    """Stop where sampler and scorer are not the same distribution, unless they cannot be. Raises UserError."""
    gap = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    if not config.truncated and not gap <= config.max_logp_gap:
        raise UserError(f"the sampler's log-probs differ from the scorer's by {gap:.3g} nats on average, above "
                        f"rollout.max_logp_gap = {config.max_logp_gap}: they do not hold the same weights, temperature "
                        "or precision; run `selftaught doctor`, or raise the bound if the difference is known")


def over_updates(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its updates: their mean; the sum of times and of skipped updates; the
    greatest of what is a maximum. Of one update, its own.
    """
    if len(found) == 1:
        return dict(found[0])
    merged = {"updates": float(len(found))}
    for name in dict.fromkeys(name for metrics in found for name in metrics):
        values = [metrics[name] for metrics in found if name in metrics]
        if name.startswith("time/") or name == "skipped":
            merged[name] = math.fsum(values)
        else:
            greatest = name.endswith("/max") or name == "skipped_total"
            merged[name] = max(values) if greatest else sum(values) / len(values)
    return merged


def _k3(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r of r = S/S_old: at tokens of S_old never negative, and in expectation KL(S_old||S)."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1 - log_ratio


def token_metrics(batch: Batch, credit: Credit, found: Sequence[Mapping[str, Tensor]],
                  sampler_cap: float | None = None, privileged: bool = True) -> dict[str, float]:
    """Means over the counted tokens: entropy, the sampler's gap, how far the policy went, the method's own numbers.

    `privileged`: does a view of the method see a privilege? Then the gap to the teacher is that of the rollouts that
    have one.
    """
    counted, old = credit["counted"], batch.tokens.logp_old
    merged = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    logp, clipped = merged.pop("logp"), merged.pop("clip_ratio", None)
    share = counted.float().mean().item()
    metrics = {"counted": share, "masked": 1 - share}
    metrics |= sampler_gap(batch.tokens, logp if old is None else old)
    if sampler_cap is not None and batch.tokens.logp_sampler is not None and counted.any():
        log_ratio = difference(logp if old is None else old, batch.tokens.logp_sampler)[counted]
        metrics["sampler/gap_mean"] = log_ratio.mean().item()
        metrics["sampler/ratio_capped"] = (log_ratio > math.log(sampler_cap)).float().mean().item()
    if old is not None and counted.any():
        metrics["approx_kl"] = _k3(difference(logp, old)[counted]).mean().item()
        if clipped is not None:
            metrics["clip_ratio"] = clipped[counted].float().mean().item()
    constants = {name: value for name, value in credit.items()  # with a dot: of one teacher of several
                 if name not in ("counted", "logp_old") and "." not in name}
    taught = counted
    if privileged and batch.tokens.privileged is not None:
        taught = counted & broadcast(batch.tokens.privileged, batch.tokens)
    for name, value in {**constants, **merged}.items():
        if value.dtype == torch.int64:  # a label, such as a route: its mean would mean nothing
            continue
        kept = value[taught if name == "gap" else counted].float()  # without a privilege there is no teacher to differ
        if not kept.numel():
            continue
        label = name if name == "entropy" else f"method/{name}"
        metrics[label] = kept.mean().item()
        if name == "gap":
            metrics["teacher/gap_abs"] = kept.abs().mean().item()
        if name in ("advantage", "weight"):
            metrics[f"{label}_std"] = kept.std(unbiased=False).item()
    return metrics
