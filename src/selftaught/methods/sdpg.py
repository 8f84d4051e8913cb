"""SDPG: self-distilled policy gradient (arXiv 2606.04036)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import base_credit, broadcast, evidence, group_advantage, trapezoid
from selftaught.loss import REFERENCE_KLS, clipped_loss, importance_ratio, kl, reference_penalty
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class SDPG:
    """GRPO, a pull of the better rollouts towards the privileged self, and a leash to where training began.

        A      = (R - mean_g) / (std_g + 1e-6)
        beta_k = beta ramp(k / beta_warmup) ramp((steps - k) / beta_decay), k optimiser batches done
        g      = 1[A > 0]; 1 where gate is "all"; 0 without a privilege                 (eq. 3.5)
        K      = of log w = logp - log ref: urkl log(w)^2 / 2, ufkl 1/w + log w, rkl (log w + 1)^2 / 2, fkl 1/w
        loss   = surrogate(A) + sg[rho] (beta_k g KL(S||T) + alpha K)                   (eqs. 3.1, 3.2, A.3)

    T is the student itself, live, with the privileged prompt; ref the initial policy. The surrogate is -rho A, or
    grpo's where an eps is set. `exclude_terminal`: g is 0 on stop tokens, which T, knowing more, would put off.

    Deviations: a clipped surrogate, if asked for, is PPO's, as in the authors' code (A.3: sg of it times logp).
    Equals: grpo with eps None when alpha = beta = 0.
    """

    name: ClassVar[str] = "sdpg"
    arxiv: ClassVar[str] = "2606.04036"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group", "privilege"})

    beta: float = 1e-3
    beta_warmup: int = 50
    beta_decay: int = 350
    steps: int = 400
    alpha: float = 1e-3
    reference_kl: str = "urkl"
    gate: str = "positive"
    exclude_terminal: bool = False
    eps_low: float | None = None
    eps_high: float | None = None
    dual_clip: float | None = None
    views: Mapping[str, View] = field(default_factory=lambda: {
        "teacher": View("live", "privileged"), "reference": View("initial", "plain")})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.reference_kl not in REFERENCE_KLS:
            raise ValueError(f"reference_kl = {self.reference_kl!r}: must be one of {', '.join(REFERENCE_KLS)}")
        if self.gate not in ("positive", "all"):
            raise ValueError(f"gate = {self.gate!r}: must be positive or all")

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        advantage = broadcast(group_advantage(batch), batch)
        gate = advantage > 0 if self.gate == "positive" else torch.ones_like(advantage, dtype=torch.bool)
        if batch.privileged is not None:
            gate = gate & broadcast(batch.privileged, batch)
        if self.exclude_terminal and batch.terminal is not None:
            gate = gate & ~batch.terminal
        beta = trapezoid(self.beta, batch.step, self.beta_warmup, self.beta_decay, self.steps)
        return {**base_credit(batch, needs_reward=True), "advantage": advantage, "gate": gate.to(advantage.dtype),
                "beta": torch.full_like(advantage, beta, dtype=torch.float64)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        logp, old, teacher = student.at_sampled, credit.get("logp_old"), views["teacher"]
        clip = clipped_loss(logp, old, credit["advantage"], eps_low=self.eps_low, eps_high=self.eps_high,
                            dual_clip=self.dual_clip)
        on = credit["gate"] > 0
        part = kl(student[on].log_probs, teacher[on].log_probs)  # no vocabulary where the gate is shut
        pull = torch.zeros_like(clip.loss).masked_scatter(on, part.to(clip.loss.dtype))
        leash = reference_penalty(self.reference_kl, logp, views["reference"].at_sampled)
        rho = importance_ratio(logp.detach(), old)
        loss = clip.loss + rho * (credit["beta"].to(pull.dtype) * pull + self.alpha * leash)
        gap = evidence(teacher.at_sampled, logp).detach()
        return TokenLoss(loss, {**clip.metrics, "gap": gap, "kl": pull.detach(), "reference_kl": leash.detach()})
