"""The views of a batch: (weights, context) to hidden states and heads, for one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from selftaught.heap import keeping
from selftaught.records import Batch, View
from selftaught.score.backbone import Backbone, Named
from selftaught.tensors import Lazy, offsets, pack, split_by_budget, split_padded
from selftaught.vocabulary import Head, sampled_log_probs

STUDENT = View("live", "plain")
KEPT_BYTES = 2**28  # of hidden states that credit's scores leave for the loss of the same batch


@dataclass(frozen=True)
class Micro:
    """Some rollouts of a batch, whole, and where their tokens lie in it."""

    rollouts: list[int]
    tokens: slice


class Scorer:
    """Scores one batch under the student and a method's views, in micro-batches of at most `token_budget` tokens.

    `weights(view name)` gives the parameters of a view, or None where it uses the student's own. Views with `external`
    weights are scored by the backbone `external`, with its own width and head, and never asked for weights.
    """

    def __init__(self, backbone: Backbone, views: Mapping[str, View], weights: Callable[[str], Named | None],
                 token_budget: int, temperature: float = 1.0, external: Backbone | None = None) -> None:
        self.backbone, self.views, self.external = backbone, {"student": STUDENT, **views}, external
        self.weights = weights
        self.token_budget, self.temperature = token_budget, temperature
        self._kept: tuple[Batch | None, dict[tuple[str, int], Tensor]] = None, {}

    def split(self, batch: Batch) -> Iterator[Micro]:
        """Micro-batches in order; every view of each fits the budget."""
        seen = {(view.context, view.nth): view for view in self.views.values()}
        # What a rollout lacks costs nothing; its first privilege in that place keeps the bound.
        contexts = [[prompt or batch.contexts[view.context][i] for i, prompt in enumerate(_prompts(batch, view))]
                    for _, view in sorted(seen.items(), key=lambda item: item[0])]
        ends = offsets(map(len, batch.responses))
        layouts = {self._of(view)[0].layout for view in self.views}
        split = split_padded if "plain" in layouts else split_by_budget
        for rollouts in split(contexts, batch.responses, self.token_budget):
            yield Micro(rollouts, slice(ends[rollouts[0]], ends[rollouts[-1] + 1]))

    def hidden(self, batch: Batch, micro: Micro) -> Lazy:
        """(n, H) for "student", with gradient if enabled, and for each view, without; equal views are run once.

        Each is run when it is asked for: a view that only a method's credit reads, by `sampled`, costs nothing more. A
        view that `sampled` has run for this very batch is not run again, as far as its states fit into KEPT_BYTES: no
        update may lie between the two.
        """
        found: dict[str | View, Callable[[], Tensor]] = {}
        for name, view in self.views.items():
            key = name if name == "student" else view
            found.setdefault(key, cache(partial(self._once, batch, micro, name, view)))
        return Lazy({name: found[name if name == "student" else view] for name, view in self.views.items()})

    def heads(self) -> dict[str, Head]:
        """The vocabulary head of every view."""
        return {name: self._head(name) for name in self.views}

    def sampled(self, names: frozenset[str], batch: Batch) -> dict[str, Tensor]:
        """Log-probs (N,) of the sampled tokens under each named view; "student.entropy" is the student's entropy."""
        out: dict[str, list[Tensor]] = {name: [] for name in sorted(names)}
        kept: dict[tuple[str, int], Tensor] = {}
        room, self._kept = KEPT_BYTES, (batch, kept)
        wanted = {name.removesuffix(".entropy") for name in names}
        with torch.no_grad(), keeping():
            for micro in self.split(batch) if names else ():
                for name in sorted(wanted):
                    hidden = self._run(batch, micro, name, self.views[name])
                    logp, entropy = sampled_log_probs(hidden, self._head(name), batch.tokens.tokens[micro.tokens],
                                                      temperature=self.temperature,
                                                      entropy=f"{name}.entropy" in names)
                    if name != "student" and (size := hidden.numel() * hidden.element_size()) <= room:
                        kept[name, micro.rollouts[0]], room = hidden, room - size
                    if name in names:
                        out[name].append(logp)
                    if entropy is not None:
                        out[f"{name}.entropy"].append(entropy)
        return {name: torch.cat(parts) for name, parts in out.items()}

    def _once(self, batch: Batch, micro: Micro, name: str, view: View) -> Tensor:
        """The states that `sampled` kept, given up here, or those of a run."""
        scored, kept = self._kept
        found = kept.pop((name, micro.rollouts[0]), None) if scored is batch else None
        return self._run(batch, micro, name, view) if found is None else found

    def _run(self, batch: Batch, micro: Micro, name: str, view: View) -> Tensor:
        prompts = _prompts(batch, view)
        there = [i for i in micro.rollouts if prompts[i]]
        if not there:
            return self._zeros(name, micro)
        backbone, weights = self._of(name)
        packed = pack([prompts[i] for i in there], [batch.responses[i] for i in there], str(backbone.device))
        if name == "student":
            return backbone.hidden(packed)
        with backbone.frozen(), keeping():
            hidden = backbone.hidden(packed, weights)
        if len(there) == len(micro.rollouts):
            return hidden
        scored = torch.tensor([bool(prompts[i]) for i in micro.rollouts for _ in batch.responses[i]])
        out = self._zeros(name, micro).to(hidden.dtype)
        out[scored.to(out.device)] = hidden
        return out

    def _zeros(self, name: str, micro: Micro) -> Tensor:
        """In the place of hidden states (n, H) that no prompt gives: finite, and read by nobody."""
        weight = self._head(name).weight
        return weight.new_zeros(micro.tokens.stop - micro.tokens.start, weight.shape[1])

    def _head(self, name: str) -> Head:
        backbone, weights = self._of(name)
        return backbone.head(weights)

    def _of(self, name: str) -> tuple[Backbone, Named | None]:
        """The model that scores a view, and the weights that stand in for its own."""
        if self.views[name].weights == "external":
            assert self.external is not None, f"view {name!r} is external, and no other model was given"
            return self.external, None
        return self.backbone, None if name == "student" else self.weights(name)


def _prompts(batch: Batch, view: View) -> tuple[tuple[int, ...], ...]:
    """The prompt of each rollout in the view's context; () where it has none of that number."""
    if not view.nth:
        return batch.contexts[view.context]
    return batch.contexts.get(f"{view.context}.{view.nth}", ((),) * len(batch.responses))
