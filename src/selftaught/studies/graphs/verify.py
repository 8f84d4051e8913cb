"""Is a list of names a path? An exact verifier, and the rewards that the recipes name. Light: workers import it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selftaught.records import Verdict
from selftaught.reward.extract import boxed

JOIN = " + "  # between the concepts of one strategy


def follow(listed: Sequence[str], names: Sequence[str], edges: Iterable[Sequence[int]], target: str) -> str | None:
    """None where `listed` names a walk from node 0 to a node named `target`; else what is wrong with it.

    Names repeat, so a list is right if SOME nodes of those names form a walk along edges. The set of nodes at which a
    walk with the names so far can stand is carried from name to name: O(names in the list x edges), exact.
    """
    beside: dict[int, set[int]] = {}
    for u, v in edges:
        beside.setdefault(u, set()).add(v)
        beside.setdefault(v, set()).add(u)
    if not listed or listed[0] != names[0]:
        return f"It does not begin at {names[0]}."
    standing = {0}
    for place, name in enumerate(listed[1:], start=2):
        standing = {v for u in standing for v in beside.get(u, ()) if names[v] == name}
        if not standing:
            return f"No edge leads to name {place}, {name!r}, from those before it."
    return None if listed[-1] == target else f"It ends at {listed[-1]!r}, not at {target!r}."


def read(completion: str, style: str) -> list[str] | None:
    """The names that a completion lists, from the hub: its words in reverse (tokens), or its last \\boxed{} (chat)."""
    if style == "tokens":
        return completion.split()[::-1] or None
    inside = boxed(completion)
    return None if inside is None else [name.strip() for name in inside.split(",")]


def strategy(listed: Iterable[str], names: Sequence[str], concepts: Sequence[str | None]) -> str | None:
    """The concepts that the names of a list belong to, as one text; None where there is none."""
    of = {name: concept for name, concept in zip(names, concepts, strict=True) if concept is not None}
    return JOIN.join(sorted({of[name] for name in listed if name in of})) or None


def judge(completion: str, graph: Mapping[str, Any]) -> Verdict:
    """The verdict on one completion; `strategy` is the set of concepts that it goes through, right or wrong."""
    listed = read(completion, graph["style"])
    if listed is None:
        return Verdict(0.0, "unparsed", "There is no list of names.")
    fault = follow(listed, graph["names"], graph["edges"], graph["target"])
    return Verdict(float(fault is None), "right" if fault is None else "wrong", fault, ", ".join(listed),
                   strategy(listed, graph["names"], graph["concepts"]))


def path(completions: Sequence[str], names: Sequence[Any], concepts: Sequence[Any], edges: Sequence[Any],
         target: Sequence[str], style: Sequence[str]) -> list[Verdict]:
    """The outcome reward: 1 for a path from the hub to the target."""
    return [judge(completion, graph) for completion, graph in
            zip(completions, _graphs(names, concepts, edges, target, style), strict=True)]


def diversity(prompts: Sequence[str], completions: Sequence[str], names: Sequence[Any], concepts: Sequence[Any],
              edges: Sequence[Any], target: Sequence[str], style: Sequence[str]) -> list[float]:
    """The share of a group's other rollouts that go through none of a rollout's concepts; a wrong rollout gets 0.

    Needs `batch: true`: a group are the completions of one prompt. The paper does not say whether a wrong rollout earns
    it; here it does not, else wandering off would be rewarded (arXiv 2606.26091, section 4).
    """
    verdicts = path(completions, names, concepts, edges, target, style)
    groups: dict[str, list[set[str]]] = {}
    own = [set((verdict.strategy or "").split(JOIN)) - {""} for verdict in verdicts]
    for prompt, mine in zip(prompts, own, strict=True):
        groups.setdefault(prompt, []).append(mine)
    scores = []
    for prompt, mine, verdict in zip(prompts, own, verdicts, strict=True):
        group = groups[prompt]
        apart = sum(not mine & other for other in group)  # not itself: a right one has a concept
        right = verdict.status == "right" and len(group) > 1
        scores.append(apart / (len(group) - 1) if right else 0.0)
    return scores


def _graphs(names: Sequence[Any], concepts: Sequence[Any], edges: Sequence[Any], target: Sequence[str],
            style: Sequence[str]) -> list[dict[str, Any]]:
    rows = zip(names, concepts, edges, target, style, strict=True)
    return [dict(zip(("names", "concepts", "edges", "target", "style"), row, strict=True)) for row in rows]
