"""SDPG: self-distilled policy gradient (arXiv 2606.04036)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from selftaught.credit import base_credit, broadcast, evidence, group_advantage, trapezoid
from selftaught.loss import REFERENCE_KLS, clipped_loss, importance_ratio, kl, reference_penalty
from selftaught.methods.fields import CLIP, DUAL_CLIP, require
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class SDPG:
    """GRPO, a pull of the better rollouts towards the privileged self, and a KL penalty to where training began.

        A      = (R - mean_g) / (std_g + 1e-6)
        beta_k = beta ramp(k / beta_warmup) ramp((steps - k) / beta_decay), k steps (rollout batches) done
        g      = 1[A > 0]; 1 where gate is "all"; 0 without a privilege                 (eq. 3.5)
        K      = of log w = logp - log ref: urkl log(w)^2 / 2, ufkl 1/w + log w, rkl (log w + 1)^2 / 2, fkl 1/w
        loss   = surrogate(A) + sg[rho] (beta_k g KL(S||T) + alpha K)                   (eqs. 3.1, 3.2, A.3)

    T is the student itself, live, with the privileged prompt; ref the initial policy. The surrogate is -rho A, or
    grpo's where an eps is set. `exclude_terminal`: g is 0 on stop tokens, which T, knowing more, would put off.

    Sees: the answer and a solution
    Divergence: KL(S||T) over the whole vocabulary
    Deviations: a clipped surrogate, if asked for, is PPO's, as in the authors' code (A.3: sg of it times logp); the
    mean is over the batch's tokens (paper: over a prompt's rollouts; code: a micro-batch).
    Equals: grpo with eps None when alpha = beta = 0.
    Criticism: the paper's own curve with beta = 0 keeps up, so little of the gain is the teacher's; its grpo baseline
    puts a KL into the reward before dividing by the std; gate and schedule are off in the code unless set; on stop
    tokens the teacher, knowing more, wants to go on.
    """

    name: ClassVar[str] = "sdpg"
    arxiv: ClassVar[str] = "2606.04036"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group", "privilege"})

    beta: float = 1e-3  #: weight of KL(S||T) at its highest
    beta_warmup: int = 50  #: steps in which beta_k rises to beta; 0: it begins there
    beta_decay: int = 350  #: last steps of `steps`, in which beta_k falls to 0; 0: it does not
    steps: int = 400  #: length of that schedule; where rise and fall overlap, beta_k stays below beta
    alpha: float = 1e-3  #: weight of the KL to the reference
    reference_kl: str = "urkl"  #: urkl or rkl, of KL(S||ref); ufkl or fkl, of KL(ref||S)
    gate: str = "positive"  #: positive: the teacher speaks where A > 0; all: everywhere
    exclude_terminal: bool = False  #: the teacher is silent on stop tokens
    eps_low: float | None = None  #: rho is clipped from below at 1 - eps_low; None: it is not
    eps_high: float | None = None  #: rho is clipped from above at 1 + eps_high; None: it is not
    dual_clip: float | None = None  #: where A < 0 the loss is at most -dual_clip A; None: no bound
    views: Mapping[str, View] = field(default_factory=lambda: {
        "teacher": View("live", "privileged"), "reference": View("initial", "plain")})

    scores: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require(self, beta="[0, inf)", alpha="[0, inf)", beta_warmup="int [0, inf)", beta_decay="int [0, inf)",
                steps="int [1, inf)", reference_kl=f"one of {', '.join(REFERENCE_KLS)}", gate="one of positive, all",
                **CLIP, dual_clip=DUAL_CLIP)

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
        logp, old = student.at_sampled, credit.get("logp_old")
        clip = clipped_loss(logp, old, credit["advantage"], eps_low=self.eps_low, eps_high=self.eps_high,
                            dual_clip=self.dual_clip)
        on, weighed = credit["gate"] > 0, credit["beta"] > 0
        own, teacher = student[on], views["teacher"][on]  # no vocabulary of the teacher where it has no say
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(weighed.any())):
            pull = torch.zeros_like(logp).masked_scatter(on, kl(own, teacher).to(logp.dtype))
        gap = torch.zeros_like(logp).masked_scatter(on, evidence(teacher.at_sampled, own.at_sampled)).detach()
        taught = torch.where(weighed, credit["beta"].to(logp.dtype) * pull, torch.zeros_like(pull))  # never 0 * inf
        penalty = reference_penalty(self.reference_kl, logp, views["reference"].at_sampled)
        rho = importance_ratio(logp.detach(), old)
        loss = clip.loss + rho * (taught + self.alpha * penalty)
        return TokenLoss(loss, {**clip.metrics, "gap": gap, "kl": pull.detach(), "reference_kl": penalty.detach()})
