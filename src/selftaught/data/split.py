"""Train, held-out and shots out of one source or a weighted mixture, disjoint by the problems' ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selftaught.data import graphs, gym, science
from selftaught.data.columns import to_problems
from selftaught.data.config import DataConfig, Part
from selftaught.data.files import find, read
from selftaught.errors import UserError
from selftaught.records import Problem, Say


@dataclass(frozen=True)
class Dataset:
    """Problems by use; no id is in two of them. `columns` maps our names to the source's columns (a mixture: all)."""

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    shots: tuple[Problem, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check(config: DataConfig) -> None:
    """Raise UserError for what no source can be: a task or a key that nobody knows, a file that is not there.

    No row is read, and the Hub is not asked.
    """
    for source in (part.source for part in config.parts()):
        if generator := _generator(source):
            generator.parse(source)
        elif science.is_science(source):
            find(science.parse(source)[2])
        else:
            find(source)


def load(config: DataConfig, *, seed: int, say: Say) -> Dataset:
    """Read the sources, collapse duplicates and split by `seed`.

    Membership depends on the problems and the seed, never on the order of a file. `say` gets one line per fact
    that a user should know (what was inferred, how many duplicates); the same lines are the dataset's `notes`.
    Raises UserError for unreadable sources and for more problems asked than there are.
    """
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    parts = config.parts()
    weights = [part.weight for part in parts]
    train = config.train
    if train is None and any(_generator(part.source) for part in parts):
        train = gym.DEFAULT_TRAIN
    heldout, shots = _shares(config.heldout, weights), _shares(config.shots, weights)
    wanted = None if train is None else _shares(train, weights)
    columns: dict[str, str] = {}
    pools: list[list[Problem]] = []
    taken: set[str] = set()
    for index, part in enumerate(parts):
        need = heldout[index] + shots[index] + (wanted[index] if wanted else 0)
        pool = _pool(config, part, need, seed, taken, columns, note)
        taken.update(problem.id for problem in pool)
        pools.append(sorted(_tag(pool, part, note) if len(parts) > 1 else pool, key=lambda p: _key(seed, p.id)))
    if wanted is None:
        wanted = _all(pools, heldout, shots, weights)
    for part, pool, *counts in zip(parts, pools, wanted, heldout, shots, strict=True):
        _check_enough(part, len(pool), counts)
    return _cut(pools, shots, heldout, wanted, columns, note, notes, seed)


def _generator(source: str) -> Any:
    """The module that draws the problems of `source`; None where they are read."""
    return next((module for module in (gym, graphs) if source.startswith(module.PREFIX)), None)


def _pool(
    config: DataConfig, part: Part, need: int, seed: int, taken: set[str], columns: dict[str, str], note: Say
) -> list[Problem]:
    """The distinct problems of one part that no earlier part holds."""
    if generator := _generator(part.source):
        if config.columns or part.columns:
            raise UserError(f"data.columns: {part.source} has no columns to choose from; leave `columns` out")
        return generator.generate(part.source, need, seed=seed, taken=taken, say=note) if need else []
    given = config.split != DataConfig.model_fields["split"].default
    if science.is_science(part.source):
        if config.columns or part.columns:
            raise UserError(f"data.columns: the columns of {part.source} are those of its format; leave `columns` out")
        problems = science.load(part.source, config.split, given, seed=seed, say=note)
        mapping = dict(science.FORMATS[part.source.partition(":")[0]].mapping)
    else:
        rows = read(part.source, config.split, given)
        problems, mapping = to_problems(part.source, rows, {**config.columns, **part.columns})
    for ours, theirs in mapping.items():
        if theirs not in columns.get(ours, "").split(" | "):
            columns[ours] = f"{columns[ours]} | {theirs}" if ours in columns else theirs
    found = ", ".join(f"{ours} <- {mapping.get(ours, 'none')}" for ours in ("prompt", "answer", "solution"))
    line = f"data: {part.source}: {len(problems)} rows, {found}"
    distinct = _collapse(problems)
    if len(distinct) < len(problems):
        answers: dict[str, set[str | None]] = {}
        for problem in problems:
            answers.setdefault(problem.id, set()).add(problem.answer)
        conflicts = sum(len(found) > 1 for found in answers.values())
        line += f"; {len(problems) - len(distinct)} duplicates collapsed"
        line += f", {conflicts} of these problems had several answers and keep one" if conflicts else ""
    fresh = [problem for problem in distinct if problem.id not in taken]
    line += f"; {len(distinct) - len(fresh)} left out as an earlier part has them" if len(fresh) < len(distinct) else ""
    note(line)
    return fresh


def _collapse(problems: Sequence[Problem]) -> list[Problem]:
    """One problem per id. Which one stays is decided by content, so the order of the file does not matter."""
    kept: dict[str, Problem] = {}
    for problem in problems:
        other = kept.get(problem.id)
        if other is None or _content(problem) < _content(other):
            kept[problem.id] = problem
    return list(kept.values())


def _content(problem: Problem) -> str:
    return json.dumps([problem.answer, problem.solution, problem.columns], sort_keys=True, default=str)


def _tag(pool: list[Problem], part: Part, note: Say) -> list[Problem]:
    """Write the part's source into the column `source`; a column of that name moves to `source_column`."""
    if any("source" in problem.columns for problem in pool):
        note(f"data: {part.source}: its own column 'source' is now 'source_column'; 'source' names the mixture's part")
    return [
        replace(
            problem,
            columns={"source_column" if name == "source" else name: value for name, value in problem.columns.items()}
            | {"source": part.source},
        )
        for problem in pool
    ]


def _key(seed: int, identity: str) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by `weights` into whole numbers, by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _all(
    pools: Sequence[list[Problem]], heldout: Sequence[int], shots: Sequence[int], weights: Sequence[float]
) -> list[int]:
    """Training problems of each part when all that remain are wanted, in the mixture's proportions."""
    spare = [max(1, len(pool) - h - s) for pool, h, s in zip(pools, heldout, shots, strict=True)]
    # The scarcest part sets the scale. Rounded before it is floored: 3 * (1/3) must be 1, not 0.999...
    scale = min(count / weight for count, weight in zip(spare, weights, strict=True))
    return [int(round(scale * weight, 6)) for weight in weights]


def _check_enough(part: Part, have: int, counts: Sequence[int]) -> None:
    train, heldout, shots = counts
    if have < train + heldout + shots:
        raise UserError(
            f"data: {part.source} has {have} distinct problems, but {train} train + {heldout} held-out + {shots} shots "
            f"= {train + heldout + shots} are asked for; lower data.train or data.heldout, or give more problems"
        )


def _cut(
    pools: Sequence[list[Problem]],
    shots: Sequence[int],
    heldout: Sequence[int],
    wanted: Sequence[int],
    columns: Mapping[str, str],
    note: Say,
    notes: list[str],
    seed: int,
) -> Dataset:
    """Shots first, then held-out, then train: a change of `data.train` leaves the other two as they are (files)."""
    cuts: dict[str, list[Sequence[Problem]]] = {"shots": [], "heldout": [], "train": []}
    for pool, s, h, t in zip(pools, shots, heldout, wanted, strict=True):
        cuts["shots"].append(pool[:s])
        cuts["heldout"].append(pool[s : s + h])
        cuts["train"].append(pool[s + h : s + h + t])
    mixed = {name: _interleave(lists) for name, lists in cuts.items()}
    if not mixed["train"]:
        raise UserError("data: no training problem is left after held-out and shots; lower data.heldout")
    counts = f"{len(mixed['train'])} train, {len(mixed['heldout'])} held-out, {len(mixed['shots'])} shots"
    note(f"data: {counts} (seed {seed})")
    return Dataset(mixed["train"], mixed["heldout"], mixed["shots"], dict(columns), tuple(notes))


def _interleave(lists: Sequence[Sequence[Problem]]) -> tuple[Problem, ...]:
    """Spread each list evenly over the whole."""
    placed = [((rank + 0.5) / len(part), index, rank) for index, part in enumerate(lists) for rank in range(len(part))]
    return tuple(lists[index][rank] for _, index, rank in sorted(placed))
