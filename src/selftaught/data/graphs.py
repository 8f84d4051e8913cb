"""Concept graphs with several right answers: `graphs:KIND?key=value&...` (arXiv 2606.26091, section 4 and figure 6).

A hub "start" stands in the middle of sectors. A sector is one concept (birds, fish, ...): some chains of its instances,
all from the hub to one end node, which is a shape. Two sectors end in the target's shape, the others in another; so two
concepts are two ways to solve one problem. Names repeat among the chains of a sector, never inside a chain.

Of the two target sectors one is in slot 0 and one in slot 1. Where their lengths are equal, a mark still tells them
apart (`mark`): slot 0 is listed before slot 1, or its concept is of the first half of the concepts and that of slot 1
of the second. Lengths count the nodes of a path, the hub and the shape included.

    train          paths of slot 0 have `short` nodes, of slot 1 `long`; the other sectors take turns
    larger         all paths have `nodes` nodes
    harder         all paths have `short` nodes, and every chain of slot 0 lacks one edge between two instances
    harder-random  the control: the slot that is cut is drawn at random
    varied         every sector's length is drawn from `short` to `long`, no matter which slot

What marks the slots, which edge is cut, and how many chains a sector has, the paper leaves open.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from selftaught.data.columns import digest
from selftaught.data.instances import INSTANCES, SHAPES
from selftaught.errors import UserError, nearest
from selftaught.records import Problem

PREFIX = "graphs:"
KINDS = ("train", "larger", "harder", "harder-random", "varied")
STYLES = ("chat", "tokens")
MARKS = ("order", "concept")
STALE_DRAWS = 2000  # give up after so many draws without a new problem
HUB = "start"
GAP = ";"  # before each walk of the style `tokens`
TARGETS = 2  # sectors that end in the target's shape
EXAMPLE = ("start", "poodle", "beagle", "circle")  # of the answer's form, in no concept of the list


@dataclass(frozen=True)
class Layout:
    """What the graphs of a source are like; the keys of `graphs:KIND?key=value`."""

    sectors: int = 4  #: concepts in a graph, two of them lead to the target
    chains: int = 3  #: of each sector
    short: int = 11  #: nodes of a path through slot 0, hub and shape included
    long: int = 15  #: nodes of a path through slot 1
    nodes: int = 20  #: nodes of every path of larger
    concepts: int = 10  #: how many concepts of the list are in use
    names: int = 20  #: how many instances of each
    mark: str = "order"  #: what tells slot 0 from slot 1: the order of listing, or the half that a concept is of
    style: str = "chat"  #: chat: the task in words, for a language model; tokens: target and walks, a word a token


@dataclass(frozen=True)
class Sector:
    """One concept's chains, each its instances' names from the hub outwards.

    `slot` is 0 or 1 for the two that lead to the target, None for others. `cut[i]` is the edge that chain i lacks, if
    any: edge 0 leads from the hub to its first instance, and so on.
    """

    concept: str
    chains: tuple[tuple[str, ...], ...]
    shape: str
    slot: int | None
    cut: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """Sectors in the order in which they are listed."""

    sectors: tuple[Sector, ...]
    target: str

    def parts(self) -> tuple[list[str], list[str | None], list[tuple[int, int]]]:
        """Names and concepts of the nodes by id (None: hub and shapes), and edges. Node 0 is the hub."""
        names: list[str] = [HUB]
        concepts: list[str | None] = [None]
        edges: list[tuple[int, int]] = []
        for sector in self.sectors:
            first = len(names)
            end = first + sum(map(len, sector.chains))
            for chain, cut in zip(sector.chains, sector.cut, strict=True):
                walk = [0, *range(len(names), len(names) + len(chain)), end]
                edges += [edge for j, edge in enumerate(pairwise(walk)) if j != cut]
                names += chain
            names.append(sector.shape)
            concepts += [sector.concept] * (end - first) + [None]
        return names, concepts, edges

    def path(self, slot: int, chain: int = 0) -> tuple[str, ...]:
        """The names of a path through the target sector of that slot."""
        sector = self.slot(slot)
        return (HUB, *sector.chains[chain], sector.shape)

    def slot(self, slot: int) -> Sector:
        return next(sector for sector in self.sectors if sector.slot == slot)

    def open_slots(self) -> list[int]:
        """The target sectors through which a path leads."""
        return [slot for slot in range(TARGETS) if any(cut is None for cut in self.slot(slot).cut)]


def draw(kind: str, layout: Layout, rng: random.Random) -> Graph:
    """A graph of that kind."""
    concepts = _concepts(layout, rng)
    target, other = rng.sample(SHAPES, 2)
    cut_slot = {"harder": 0, "harder-random": rng.randrange(TARGETS)}.get(kind)
    order: list[int | None] = [*range(TARGETS), *[None] * (layout.sectors - TARGETS)]
    rng.shuffle(order)
    if layout.mark == "order":  # slot 0 takes the first of the two places
        targets = iter(range(TARGETS))
        order = [None if slot is None else next(targets) for slot in order]
    others = iter(concepts[TARGETS:])
    turn = 0
    sectors = []
    for slot in order:
        concept = next(others) if slot is None else concepts[slot]
        turn += slot is None
        length = _length(kind, layout, turn if slot is None else slot, rng)
        instances = list(INSTANCES[concept])[: layout.names]
        chains = tuple(tuple(rng.sample(instances, length - 2)) for _ in range(layout.chains))
        inner = range(1, length - 2) or range(length - 1)  # between two instances, so that neither end shows it
        cut = tuple(rng.choice(inner) if slot is not None and slot == cut_slot else None for _ in chains)
        sectors.append(Sector(concept, chains, other if slot is None else target, slot, cut))
    return Graph(tuple(sectors), target)


def _concepts(layout: Layout, rng: random.Random) -> list[str]:
    """Those of the slots, then of the other sectors."""
    every = list(INSTANCES)[: layout.concepts]
    if layout.mark == "order":
        return rng.sample(every, layout.sectors)
    half = layout.concepts // 2
    of_slots = [rng.choice(every[:half]), rng.choice(every[half:])]
    return of_slots + rng.sample([concept for concept in every if concept not in of_slots], layout.sectors - TARGETS)


def _length(kind: str, layout: Layout, turn: int, rng: random.Random) -> int:
    """Nodes of a sector's paths; the sectors beside the targets take turns, so that length tells nothing."""
    if kind == "varied":
        return rng.randint(layout.short, layout.long)
    if kind == "train":
        return (layout.short, layout.long)[turn % 2]
    return layout.nodes if kind == "larger" else layout.short


def prompt(graph: Graph, style: str) -> str:
    """The problem in words, with nodes and edges (chat), or its target and walks along all edges (tokens)."""
    if style == "tokens":
        pieces = [piece for sector in graph.sectors for piece in _pieces(sector)]
        return " ".join(["to", graph.target, *(name for piece in pieces for name in (GAP, *piece))])
    names, concepts, edges = graph.parts()
    tags = ["hub", *(f"concept={c}" if c else "shape" for c in concepts[1:])]
    nodes = "\n".join(f"{i}: {name} [{tag}]" for i, (name, tag) in enumerate(zip(names, tags, strict=True)))
    listed = "\n".join(f"{u}({names[u]})--{v}({names[v]})" for u, v in edges)
    return (f"Here is a graph. Its nodes, each with id, name and kind:\n{nodes}\n\nIts undirected edges:\n{listed}\n\n"
            f"Give a path along the edges from {HUB} to a node named {graph.target}. Any such path is right. Put the "
            f"names of its nodes, in order, from {HUB} to {graph.target}, into one \\boxed{{}} with commas between "
            f"them, for example \\boxed{{{', '.join(EXAMPLE)}}}.")


def _pieces(sector: Sector) -> list[tuple[str, ...]]:
    """The edges of a sector as walks from the shape inwards; a cut makes two of one."""
    pieces = []
    for chain, cut in zip(sector.chains, sector.cut, strict=True):
        walk = (sector.shape, *chain[::-1], HUB)
        after = len(walk) if cut is None else len(walk) - 1 - cut  # nodes before the missing edge, from the shape
        pieces += [piece for piece in (walk[:after], walk[after:]) if piece]
    return pieces


def shown(path: Sequence[str], style: str) -> str:
    """A path, from the hub, as a response to `prompt`; in the style `tokens` it is written from the target to the hub.

    So the first token says which shape is looked for, and each further one follows what it followed in the prompt: a
    step that a small decoder learns in minutes. From the hub, the first step would need the whole lookup at once.
    """
    return " ".join(path[::-1]) if style == "tokens" else f"\\boxed{{{', '.join(path)}}}"


def problem(graph: Graph, style: str, rng: random.Random) -> Problem:
    """A problem without one answer; its solution is a path through one of the target sectors, drawn at random."""
    names, concepts, edges = graph.parts()
    slot = rng.choice(graph.open_slots())
    chains = [i for i, cut in enumerate(graph.slot(slot).cut) if cut is None]
    columns: dict[str, Any] = {
        "names": names, "concepts": concepts, "edges": [list(edge) for edge in edges], "target": graph.target,
        "style": style, "slots": [graph.slot(i).concept for i in range(TARGETS)],
    }
    solution = shown(graph.path(slot, rng.choice(chains)), style)
    return Problem(digest(f"graphs {_canonical(graph)}"), prompt(graph, style), None, solution, columns)


def _canonical(graph: Graph) -> str:
    """What makes two graphs equal: chains, shapes and cuts, in any order."""
    listed = sorted(
        f"{sector.shape}: " + "; ".join(sorted(f"{' '.join(chain)} {cut}" for chain, cut in
                                              zip(sector.chains, sector.cut, strict=True)))
        for sector in graph.sectors
    )  # fmt: skip
    return f"{graph.target} | " + " | ".join(listed)


def generate(source: str, need: int, *, seed: int, taken: Container[str], say: Callable[[str], None]) -> list[Problem]:
    """`need` distinct problems whose ids are not in `taken`, the same for the same source and seed.

    Raises UserError for an unknown kind or key, a value that makes no graph, or too few distinct graphs.
    """
    kind, layout = parse(source)
    key = hashlib.sha256(f"graphs/{seed}/{kind}/{layout}".encode()).digest()
    rng = random.Random(key)
    found: dict[str, Problem] = {}
    stale = 0
    while len(found) < need:
        one = problem(draw(kind, layout, rng), layout.style, rng)
        stale = 0 if one.id not in found and one.id not in taken else stale + 1
        if not stale:
            found[one.id] = one
        if stale >= STALE_DRAWS:
            raise UserError(f"data.source: {source} gave {len(found)} distinct graphs, and {need} are needed; raise "
                            "concepts or names, or ask for fewer")
    say(f"data: {source}: {need} distinct graphs")
    return list(found.values())


def source(kind: str, layout: Layout) -> str:
    """The source of those graphs, as a recipe names it; `parse` undoes it."""
    return f"{PREFIX}{kind}?" + "&".join(f"{key}={value}" for key, value in vars(layout).items())


def parse(source: str) -> tuple[str, Layout]:
    """The kind and the layout that a source names. Raises UserError."""
    kind, _, query = source.removeprefix(PREFIX).partition("?")
    if kind not in KINDS:
        raise UserError(f"data.source: no graphs of kind {kind!r} in {source}; {nearest(kind, KINDS)}")
    defaults = vars(Layout())
    given: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, _, text = pair.partition("=")
        if key not in defaults:
            raise UserError(f"data.source: graphs have no key {key!r} in {source}; {nearest(key, defaults)}")
        if isinstance(defaults[key], int) and not text.isdecimal():
            raise UserError(f"data.source: {key}={text} in {source}: expected a whole number, such as {defaults[key]}")
        given[key] = int(text) if isinstance(defaults[key], int) else text
    layout = Layout(**given)
    _check(source, kind, layout)
    return kind, layout


def _check(source: str, kind: str, layout: Layout) -> None:
    """Raise UserError for a layout of which no graph can be drawn."""
    def refuse(key: str, why: str) -> UserError:
        return UserError(f"data.source: {key}={getattr(layout, key)} in {source}: {why}")

    for key, known in (("style", STYLES), ("mark", MARKS)):
        if getattr(layout, key) not in known:
            raise refuse(key, nearest(getattr(layout, key), known))
    if not TARGETS < layout.sectors <= layout.concepts:
        raise refuse("sectors", f"must be above {TARGETS}, so that some lead elsewhere, and at most concepts = "
                     f"{layout.concepts}")
    if layout.concepts > len(INSTANCES):
        raise refuse("concepts", f"the list has {len(INSTANCES)}")
    if not 1 <= layout.names <= len(next(iter(INSTANCES.values()))):
        raise refuse("names", f"every concept has {len(next(iter(INSTANCES.values())))}")
    if layout.chains < 1 or (layout.style == "tokens" and layout.chains > 1):
        raise refuse("chains", "must be at least 1; and 1 with style=tokens, which tells nodes apart by name alone")
    for key in {"train": ("short", "long"), "varied": ("short", "long"), "larger": ("nodes",)}.get(kind, ("short",)):
        if not 3 <= getattr(layout, key) <= layout.names + 2:
            raise refuse(key, f"must be from 3 to names + 2 = {layout.names + 2}: a hub, instances of one concept, and "
                         "a shape")
    if layout.short > layout.long:
        raise refuse("short", f"must be at most long = {layout.long}")
