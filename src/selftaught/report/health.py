"""A dead step says so: one plain sentence, a metric, and after a few in a row an error with the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from selftaught.errors import UserError

SILENT_TEACHER = 1e-6  # nats: a mean gap below it is rounding
REMEDIES = {
    "dead_groups": (
        "in every group all rollouts scored the same (all right or all wrong), so none was better than its siblings",
        "use problems that the model solves sometimes, more rollout.num_generations, or a graded reward",
    ),
    "no_reward": (
        "the reward had no opinion (None) of any rollout, so there was nothing to learn from",
        "let it return a number; `selftaught doctor` tries it on a right, a wrong and an empty answer",
    ),
    "reward_failed": (
        "the reward failed or ran out of time on half of the responses or more",
        "look at the statuses in rollouts/ and at `selftaught doctor`, mend the reward, or raise reward.timeout",
    ),
    "zero_gradient": (
        "the gradient was zero, so nothing was learned",
        "look at `reward_std`, `counted` and the learning rate in metrics.jsonl",
    ),
    "bad_gradient": (
        "the gradient was not finite, so the update was left out",
        "lower optim.learning_rate, use optim.dtype=float32, or look for infinite rewards",
    ),
    "cut_off": (
        "half of the responses or more reached the length limit",
        "raise rollout.max_completion_length, or give rollout.stop strings that the model writes",
    ),
    "silent_teacher": (
        "the teacher agreed with the student on every token, so its privilege adds nothing",
        "look at the teacher's prompt with `selftaught doctor`, and at privilege.kind",
    ),
    "no_privilege": (
        "no rollout had a privilege, so the teacher said nothing",
        "choose another privilege.kind, or raise rollout.num_generations",
    ),
}


class Health:
    """Counts dead steps in a row by kind; `state` is saved with a checkpoint."""

    def __init__(self, patience: int | None, needs: frozenset[str], privileged: bool) -> None:
        self.patience, self._needs, self._privileged = patience, needs, privileged
        self._row: dict[str, int] = {}

    def state(self) -> dict[str, int]:
        return dict(self._row)

    def load(self, state: Mapping[str, int]) -> None:
        self._row = {kind: int(count) for kind, count in state.items()}

    def check(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Metrics health/KIND (1 for a dead step), and a sentence for each kind that has just begun."""
        found = self._found(metrics)
        sentences = [f"{REMEDIES[kind][0]}" for kind in found if not self._row.get(kind)]
        self._row = {kind: self._row.get(kind, 0) + 1 for kind in found}
        return {f"health/{kind}": 1.0 for kind in found}, sentences

    def verdict(self) -> None:
        """Raises UserError where the last steps were all dead in one way for longer than the patience."""
        for kind, count in self._row.items():
            if self.patience is not None and count >= self.patience:
                what, remedy = REMEDIES[kind]
                raise UserError(
                    f"stopped after {count} dead steps in a row: {what}; {remedy} "
                    "(report.patience: how many steps may be dead; null: any number)"
                )

    def _found(self, metrics: Mapping[str, float]) -> list[str]:
        found = []
        if "reward" in self._needs and "reward" not in metrics:
            found.append("no_reward")
        if metrics.get("reward/status/error", 0.0) + metrics.get("reward/status/timeout", 0.0) >= 0.5:
            found.append("reward_failed")
        if "group" in self._needs and metrics.get("frac_reward_zero_std", 0.0) >= 1.0:
            found.append("dead_groups")
        norm = metrics.get("grad_norm", 1.0)
        if not math.isfinite(norm):
            found.append("bad_gradient")
        elif norm == 0.0 and not {"dead_groups", "no_reward"} & set(found):
            found.append("zero_gradient")
        if metrics.get("completions/clipped_ratio", 0.0) >= 0.5:
            found.append("cut_off")
        if self._privileged and metrics.get("privilege/missing", 0.0) >= 1.0:
            found.append("no_privilege")
        elif self._privileged and metrics.get("teacher/gap_abs", 1.0) < SILENT_TEACHER:
            found.append("silent_teacher")
        return found
