"""K teachers in the place of one, each with another demonstration before its eyes: any method, unaware of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from selftaught.credit import broadcast
from selftaught.methods.base import Method
from selftaught.records import Credit, TokenBatch, TokenLoss, View, privileged_views
from selftaught.vocabulary import Mixture, TokenDist, log_mean_exp

T = TypeVar("T")


@dataclass(frozen=True)
class Several:
    """`method` with up to `count` privileges per rollout; k_n of them are there for rollout n (arXiv 2606.26091, 5).

        average    (1 / k_n) sum_k loss(S, T_k), credit of each k by T_k alone (RLSD: K weights, K losses, their mean)
        mixture    loss(S, T), T(v) = (1 / k_n) sum_k T_k(v); in `credit` the same at the sampled tokens

    Every privileged view has the same k in one term: "teacher" is seen with privilege 0, "teacher.1" with the next.
    Statistics over the batch (DOPD's thresholds) are taken for each k over the rollouts that have a k-th privilege.
    A rollout without any is what it is to the method: its term is that of k = 0.

    For KL(T||S) unclipped the two have one gradient (they differ by what does not depend on S); averaged KL(S||T_k) has
    the geometric mean for its optimum, not the mixture.
    """

    method: Method
    count: int
    combine: Literal["average", "mixture"]

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def arxiv(self) -> str | None:
        return getattr(self.method, "arxiv", None)

    @property
    def needs(self) -> frozenset[str]:
        return self.method.needs

    @property
    def views(self) -> dict[str, View]:
        return {_nth(name, k): replace(view, nth=k) for name, view in self.method.views.items()
                for k in range(self.count if view.context == "privileged" else 1)}

    @property
    def scores(self) -> frozenset[str]:
        return frozenset(_nth(name, k) for name in self.method.scores
                         for k in range(self.count if name in self._privileged else 1))

    @property
    def _privileged(self) -> set[str]:
        return {*privileged_views(self.method.views)}

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        """The method's credit (of `average`: its mean over k, for metrics), that of each k, and which k are there."""
        has_NK = self._has(batch)
        has = {f"has.{k}": has_NK[:, k] for k in range(self.count)}
        if self.combine == "mixture":
            mixed = {name: log_mean_exp([logp[_nth(name, k)] for k in range(self.count)], has_NK)
                     if name in self._privileged else value for name, value in logp.items() if _plain(name)}
            return {**self.method.credit(batch, mixed), **has}
        each = []
        for k in range(self.count):
            there = None if batch.privileges is None else batch.privileges > k
            seen = replace(batch, privileged=there) if k and there is not None else batch
            each.append(self.method.credit(seen, self._of(k, logp)))
        share = has_NK / has_NK.sum(1, keepdim=True)
        mean = {name: (share * torch.stack([one[name] for one in each], 1).masked_fill(~has_NK, 0)).sum(1)
                for name, value in sorted(each[0].items())
                if name not in ("counted", "logp_old") and value.dtype != torch.int64}  # of a label there is no mean
        kept = {name: each[0][name] for name in ("counted", "logp_old") if name in each[0]}
        return {**kept, **mean, **has, **{f"{k}.{n}": v for k, one in enumerate(each) for n, v in one.items()}}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        has_nK = torch.stack([credit[f"has.{k}"] for k in range(self.count)], 1)
        there = [k for k in range(self.count) if has_nK[:, k].any()]
        if self.combine == "mixture":
            own = {name: value for name, value in credit.items() if _plain(name)}
            mixed = {name: Mixture([views[_nth(name, k)] for k in there], has_nK[:, there])
                     if name in self._privileged else views[name] for name in self.method.views}
            return self.method.loss(student, mixed, own)
        total = torch.zeros_like(student.at_sampled)
        metrics: dict[str, Tensor] = {}
        for k in there:
            own = {name.partition(".")[2]: value for name, value in credit.items() if name.startswith(f"{k}.")}
            part = self.method.loss(student, self._of(k, views), own)
            share, counts = has_nK[:, k].to(total.dtype) / has_nK.sum(1), has_nK[:, k]
            total = total + share * torch.where(counts, part.loss, 0.0)
            for name, value in part.metrics.items():
                mine = share * torch.where(counts, value.detach(), 0.0)
                metrics[name] = metrics[name] + mine if name in metrics else mine
        return TokenLoss(total, metrics)

    def _has(self, batch: TokenBatch) -> Tensor:
        """(N, K) bool. The first is there always: a rollout without a privilege has the student's prompt in its place.
        """
        has = torch.zeros(*batch.tokens.shape, self.count, dtype=torch.bool, device=batch.tokens.device)
        if batch.privileges is not None:
            assert batch.privileged is None or batch.privileged.shape == batch.privileges.shape, "both are per rollout"
            order = torch.arange(self.count, device=has.device)
            has = broadcast(batch.privileges, batch)[:, None] > order
        has[:, 0] = True
        return has

    def _of(self, k: int, given: Mapping[str, T]) -> dict[str, T]:
        """What the method sees where the k-th privilege is the only one."""
        return {name: given[_nth(name, k) if name in self._privileged else name] for name in given if _plain(name)}


def _nth(name: str, k: int) -> str:
    return f"{name}.{k}" if k else name


def _plain(name: str) -> bool:
    """Is this a name that the method itself uses? `student.entropy` is one."""
    return "." not in name or name.startswith("student.")
