"""A method of one's own: GRPO that listens where the student hesitates.

Most tokens of a response are forced: only at a few does the model choose, and those decide whether it is right. Here a
token's share of the rollout's advantage is its entropy relative to the rollout's mean, to the power `sharpness`.

    selftaught train quickstart method=examples/own_method.py:EntropyGRPO method.sharpness=0.5 out=runs/own_method
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit, broadcast, group_advantage
from selftaught.loss import clipped_loss
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.tensors import segment_mean
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class EntropyGRPO:
    """GRPO whose advantage goes to the tokens at which the student was unsure.

        h    = entropy of the student at the token, over its mean in the rollout
        loss = -min(rho A h^sharpness, clip(rho, 0.8, 1.2) A h^sharpness)

    Divergence: none; clipped surrogate
    Equals: grpo when sharpness is 0.
    """

    name: ClassVar[str] = "entropy_grpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    views: ClassVar[Mapping[str, View]] = {}
    scores: ClassVar[frozenset[str]] = frozenset({"student.entropy"})

    sharpness: float = 1.0  #: 0: every token alike; higher: only where the student hesitates

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        credit, entropy = base_credit(batch, needs_reward=True), logp["student.entropy"].clamp_min(1e-6)
        rollouts = int(batch.sequence_ids.max()) + 1
        mean = segment_mean(entropy, batch.sequence_ids, rollouts, credit["counted"])[batch.sequence_ids]
        weight = (entropy / mean.clamp_min(1e-6)) ** self.sharpness
        return {**credit, "advantage": broadcast(group_advantage(batch), batch) * weight, "weight": weight}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return clipped_loss(student.at_sampled, credit.get("logp_old"), credit["advantage"], eps_low=0.2, eps_high=0.2)
