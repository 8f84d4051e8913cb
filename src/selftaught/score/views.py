"""The views of a batch: (weights, context) to hidden states and heads, for one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class _Known:
    """What is known of one batch until the next update: the passes of a view, and what was found in those."""

    batch: Batch | None = None
    passes: dict[View, list[Micro]] = field(default_factory=dict)
    states: dict[tuple[View, int], Tensor] = field(default_factory=dict)  # by the first rollout of a pass


class Scorer:
    """Scores one batch under the student and a method's views, in micro-batches of at most `token_budget` tokens.

    A pass without gradient is cut by its own view alone, to the same budget: larger ones were no faster on a CPU.

    `weights(view name)` gives the parameters of a view, or None where it uses the student's own. Views with `external`
    weights are scored by the backbone `external`, with its own width and head, and never asked for weights.
    """

    def __init__(self, backbone: Backbone, views: Mapping[str, View], weights: Callable[[str], Named | None],
                 token_budget: int, temperature: float = 1.0, external: Backbone | None = None) -> None:
        self.backbone, self.views, self.external = backbone, {"student": STUDENT, **views}, external
        self.weights = weights
        self.token_budget, self.temperature = token_budget, temperature
        self._known = _Known()

    def split(self, batch: Batch) -> Iterator[Micro]:
        """Micro-batches in order; every view of each fits the budget."""
        seen = {(view.context, view.nth): view for view in self.views.values()}
        layouts = {self._of(name)[0].layout for name in self.views}
        return _cut(batch, [view for _, view in sorted(seen.items(), key=lambda item: item[0])], self.token_budget,
                    padded="plain" in layouts)

    def hidden(self, batch: Batch, micro: Micro) -> Lazy:
        """(n, H) for "student", with gradient if enabled, and for each view, without; equal views are run once.

        Each is run when it is asked for: a view that only a method's credit reads, by `sampled`, costs nothing more. A
        pass without gradient takes tokens of the micro-batches that follow along, where its view's prompts are shorter
        than another's, and one that `sampled` has run for this very batch is not run again, as far as its states fit
        into KEPT_BYTES. Whoever changes weights between two calls for the same batch calls `forget`.
        """
        found: dict[str | View, Callable[[], Tensor]] = {}
        for name, view in self.views.items():
            key, run = (name, self._run) if name == "student" else (view, self._ahead)
            found.setdefault(key, cache(partial(run, batch, micro, name)))
        return Lazy({name: found[name if name == "student" else view] for name, view in self.views.items()})

    def forget(self) -> None:
        """What is known of the batch: its weights are no longer those of the model."""
        self._known = _Known()

    def heads(self) -> dict[str, Head]:
        """The vocabulary head of every view."""
        return {name: self._head(name) for name in self.views}

    def sampled(self, names: frozenset[str], batch: Batch) -> dict[str, Tensor]:
        """Log-probs (N,) of the sampled tokens under each named view; "student.entropy" is the student's entropy."""
        out: dict[str, list[Tensor]] = {name: [] for name in sorted(names)}
        self._known, room = _Known(batch), KEPT_BYTES
        with torch.no_grad(), keeping():
            for name in sorted({name.removesuffix(".entropy") for name in names}):
                for micro in self._passes(batch, name):
                    key = self.views[name], micro.rollouts[0]
                    hidden = None if name == "student" else self._known.states.get(key)
                    if hidden is None:
                        hidden = self._run(batch, micro, name)
                        if name != "student" and (size := hidden.numel() * hidden.element_size()) <= room:
                            self._known.states[key], room = hidden, room - size
                    logp, entropy = sampled_log_probs(hidden, self._head(name), batch.tokens.tokens[micro.tokens],
                                                      temperature=self.temperature,
                                                      entropy=f"{name}.entropy" in names)
                    if name in names:
                        out[name].append(logp)
                    if entropy is not None:
                        out[f"{name}.entropy"].append(entropy)
        return {name: torch.cat(parts) for name, parts in out.items()}

    def _ahead(self, batch: Batch, micro: Micro, name: str) -> Tensor:
        """The states of these tokens, of the passes in which they lie; those of tokens that follow are kept."""
        view, found = self.views[name], []
        for one in self._passes(batch, name):
            if micro.rollouts[0] <= one.rollouts[-1] and one.rollouts[0] <= micro.rollouts[-1]:
                states = self._known.states.pop((view, one.rollouts[0]), None)
                states = self._run(batch, one, name) if states is None else states
                if micro.rollouts[-1] < one.rollouts[-1]:
                    self._known.states[view, one.rollouts[0]] = states
                first = one.tokens.start
                found.append(states[max(micro.tokens.start - first, 0) : micro.tokens.stop - first])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _passes(self, batch: Batch, name: str) -> list[Micro]:
        """A batch cut for passes without gradient under a view, of which nothing is kept from layer to layer."""
        view = self.views[name]
        if self._known.batch is not batch:
            self._known = _Known(batch)
        if view not in self._known.passes:
            self._known.passes[view] = list(_cut(
                batch, [view], self.token_budget, padded=self._of(name)[0].layout == "plain"))
        return self._known.passes[view]

    def _run(self, batch: Batch, micro: Micro, name: str) -> Tensor:
        prompts = _prompts(batch, self.views[name])
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


def _cut(batch: Batch, views: Sequence[View], budget: int, padded: bool) -> Iterator[Micro]:
    """Rollouts in order, so many that each of these views fits the budget; a longer one by itself."""
    # What a rollout lacks costs nothing; its first privilege in that place keeps the bound.
    contexts = [[prompt or batch.contexts[view.context][i] for i, prompt in enumerate(_prompts(batch, view))]
                for view in views]
    ends = offsets(map(len, batch.responses))
    for rollouts in (split_padded if padded else split_by_budget)(contexts, batch.responses, budget):
        yield Micro(rollouts, slice(ends[rollouts[0]], ends[rollouts[-1] + 1]))


def _prompts(batch: Batch, view: View) -> tuple[tuple[int, ...], ...]:
    """The prompt of each rollout in the view's context; () where it has none of that number."""
    if not view.nth:
        return batch.contexts[view.context]
    return batch.contexts.get(f"{view.context}.{view.nth}", ((),) * len(batch.responses))
