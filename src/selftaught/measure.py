"""The numbers of one training step, under TRL's names where the meaning is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import stdev

import torch
from torch import Tensor

from selftaught.credit import broadcast
from selftaught.credit.group import relative
from selftaught.records import Batch, Credit, Rollout, Verdict


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
        reward = torch.tensor([float("nan") if v.score is None else v.score for v in verdicts])
        names = {rollout.problem.id: i for i, rollout in enumerate(rollouts)}
        group = torch.tensor([names[rollout.problem.id] for rollout in rollouts])
        moved = relative(reward, group) != 0
        alive = {g for g, m in zip(group.tolist(), moved.tolist(), strict=True) if m}
        metrics["frac_reward_zero_std"] = 1 - len(alive) / len(names)
    for status, count in Counter(verdict.status for verdict in verdicts).items():
        metrics[f"reward/status/{status}"] = count / len(verdicts)
    for part in sorted({name for verdict in verdicts for name in verdict.parts}):
        values = torch.tensor([v.parts[part] for v in verdicts if v.parts.get(part) is not None])
        metrics[f"rewards/{part}/mean"] = values.mean().item()
    return metrics


def token_metrics(batch: Batch, credit: Credit, found: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means over the counted tokens: entropy, the sampler's gap, the method's own numbers."""
    counted = credit["counted"]
    merged = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    logp = merged.pop("logp")
    metrics = {"counted": counted.float().mean().item()}
    if batch.tokens.logp_sampler is not None:
        gap = (logp - batch.tokens.logp_sampler).abs()
        metrics["sampling/sampling_logp_difference/mean"] = gap.mean().item()
        metrics["sampling/sampling_logp_difference/max"] = gap.max().item()
    constants = {name: value for name, value in credit.items()  # with a dot: of one teacher of several
                 if name not in ("counted", "logp_old") and "." not in name}
    taught = counted if batch.tokens.privileged is None else counted & broadcast(batch.tokens.privileged, batch.tokens)
    for name, value in {**constants, **merged}.items():
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
