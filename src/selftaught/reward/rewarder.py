"""From rollouts to verdicts: the check before a run, the calls to the workers, and the weighted sum."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from selftaught.errors import UserError, nearest
from selftaught.records import Problem, Rollout, Say, Status, Verdict
from selftaught.reward import extract, verifiers
from selftaught.reward.config import RewardConfig, RewardPart
from selftaught.reward.pool import Pool, Prepare
from selftaught.reward.verifiers import Result
from selftaught.reward.worker import ALWAYS

_EXTRAS = {"math": "math_verify", "gym": "reasoning_gym"}  # verifier, also the extra's name: its package
_GOLD: dict[str, tuple[Callable[[str], Any], str]] = {
    "exact": (str.strip, "a text"),
    "numeric": (extract.number, "a number"),
    "choice": (extract.letter, "a letter A to J"),
    "math": (str.strip, "an expression"),
}
Functions = Mapping[str, Callable[..., Any]]


class Pending:
    """Verdicts on their way."""

    def __init__(
        self, parts: Sequence[RewardPart], rollouts: Sequence[Rollout], futures: list[list[Future[list[Result]]]]
    ) -> None:
        self._parts, self._rollouts, self._futures = parts, rollouts, futures

    def done(self) -> bool:
        return all(future.done() for futures in self._futures for future in futures)

    def result(self) -> list[Verdict]:
        """One verdict per rollout, in the rollouts' order. Waits; raises CancelledError if closed meanwhile."""
        columns = []
        for part, futures in zip(self._parts, self._futures, strict=True):
            if part.name == "length":
                columns.append([_length(part, rollout) for rollout in self._rollouts])
            else:
                columns.append([found for future in futures for found in future.result()])
        keys = part_keys(self._parts)
        weights = [part.weight for part in self._parts]
        return [combine(keys, weights, found) for found in zip(*columns, strict=True)]


class Rewarder:
    """Scores rollouts in worker processes, which start on the first call.

    `functions` maps names in the config to callables that cannot be imported (see `from_callables`). With
    any of them the processes are forked here and now: build the Rewarder before the model.
    """

    def __init__(self, config: RewardConfig, functions: Functions | None = None) -> None:
        self.config = config
        self._parts = config.parts
        spec = {"parts": [part.model_dump(mode="json") for part in config.parts], "memory_mb": config.memory_mb}
        self._pool = Pool(spec, config.workers, functions or {})

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict per rollout, in order, whatever the verifiers do."""
        return self.submit(rollouts).result()

    def submit(self, rollouts: Sequence[Rollout]) -> Pending:
        """Begin to verify, and return at once: sampling can go on meanwhile."""
        futures: list[list[Future[list[Result]]]] = []
        for index, part in enumerate(self._parts):
            if part.name == "length" or not rollouts:
                futures.append([])
                continue
            jobs = [tuple(rollouts)] if part.batch else [(rollout,) for rollout in rollouts]
            futures.append([self._pool.submit(self._prepare(index, job), len(job)) for job in jobs])
        return Pending(self._parts, tuple(rollouts), futures)

    def trial(self, problem: Problem, completion: str) -> list[tuple[RewardPart, dict[str, Any], Result | None]]:
        """Per part but `length`: what its worker says of the function, and of one made-up completion.

        The result is None where the function could not be called at all: `info` says why.
        """
        found: list[tuple[RewardPart, dict[str, Any], Result | None]] = []
        for index, part in enumerate(self._parts):
            if part.name != "length":
                seen: list[dict[str, Any]] = []
                job = self._prepare(index, ((problem, completion, ()),), seen)
                verdict = self._pool.submit(job, 1).result()[0]
                found.append((part, seen[0] if seen else {"error": verdict["feedback"]}, verdict))
        return found

    def close(self) -> None:
        """End all workers; what is not verified yet is cancelled."""
        self._pool.close()

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(
        self,
        index: int,
        rollouts: Sequence[Rollout | tuple[Problem, str, tuple[int, ...]]],
        seen: list[dict[str, Any]] | None = None,
    ) -> Prepare:
        """The job of part `index`, made by the thread that sends it, once the function's parameters are known."""
        part = self._parts[index]

        def prepare(info: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            if seen is not None:
                seen.append(dict(info[index]))
            items = [
                _item(part, info[index], *(r if isinstance(r, tuple) else (r.problem, r.text, r.token_ids)))
                for r in rollouts
            ]
            return {"part": index, "items": items, "seconds": self.config.timeout * len(items)}

        return prepare


def _item(
    part: RewardPart, info: Mapping[str, Any], problem: Problem, text: str, token_ids: Sequence[int]
) -> dict[str, Any]:
    """What crosses to the worker for one completion: only what its verifier asks for."""
    if not part.is_function:
        columns = {"entry": plain(problem.columns.get("entry"))} if part.name == "gym" else {}
        return {"completion": text, "problem": {"answer": problem.answer, "columns": columns}}
    anything, takes = info.get("any", False), info.get("takes", ())
    columns = {}
    for name, value in columns_of(problem).items():
        if anything or name in takes:
            try:
                columns[name] = plain(value)
            except (TypeError, ValueError):  # an image, say: `check` refused it if the function asks for it
                continue
    return {
        "prompt": problem.prompt if isinstance(problem.prompt, str) else [dict(message) for message in problem.prompt],
        "completion": text,
        "completion_ids": list(token_ids) if anything or "completion_ids" in takes else [],
        "columns": columns,
    }


def columns_of(problem: Problem) -> dict[str, Any]:
    """Every column by its own name; `answer` and `solution` are the problem's own, as the built-in verifiers read them.

    A column of such a name that says something else (GSM8K's `answer`: the working and "#### 42") is under
    `raw_answer` or `raw_solution`. One that says the same keeps its type: 42, not "42".
    """
    columns = dict(problem.columns)
    for name, value in (("answer", problem.answer), ("solution", problem.solution)):
        raw = columns.get(name)
        text = json.dumps(raw, ensure_ascii=False, default=str) if isinstance(raw, (list, dict)) else str(raw)
        if value is None or text == value:
            continue
        if raw is not None:
            columns.setdefault(f"raw_{name}", raw)
        columns[name] = value
    return columns


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tuples and arrays become lists. Raises TypeError or ValueError if it cannot."""
    return json.loads(json.dumps(value, default=_default))


def _default(value: Any) -> Any:
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def _length(part: RewardPart, rollout: Rollout) -> Result:
    longest = part.max_length or rollout.sampling.max_completion_length
    return verifiers.length(len(rollout.token_ids), longest, part.buffer or max(1, longest // 5))


def part_keys(parts: Sequence[RewardPart]) -> list[str]:
    """A short name for each part: a function's own name; the second of a kind is called "regex#2"."""
    keys: list[str] = []
    for part in parts:
        short = part.name.rpartition(":")[2]
        count = sum(key.partition("#")[0] == short for key in keys)
        keys.append(f"{short}#{count + 1}" if count else short)
    return keys


def combine(keys: Sequence[str], weights: Sequence[float], found: Sequence[Result]) -> Verdict:
    """One verdict from the parts': sum of weight * score over those with an opinion; None if none has one.

    Answer and status are the first part's, unless any part ended by timeout or error.
    """
    main = next((one for one in found if one["status"] in ("timeout", "error")), found[0])
    scores = {key: one["score"] for key, one in zip(keys, found, strict=True) if one["score"] is not None}
    total = sum(weight * scores[key] for key, weight in zip(keys, weights, strict=True) if key in scores)
    status: Status = main["status"]
    return Verdict(
        score=float(total) if scores else None,
        status=status,
        feedback=main["feedback"] or next((one["feedback"] for one in found if one["feedback"]), None),
        answer=found[0]["answer"],
        strategy=found[0].get("strategy"),
        parts=scores,
    )


def check(config: RewardConfig, problems: Sequence[Problem], functions: Functions | None = None) -> None:
    """Refuse a reward that cannot work on these problems, before any model is loaded.

    Looks for the extra packages, the answers and columns that the parts need, then loads every function in
    a worker, compares its parameters with the data and calls it once. Raises UserError with the remedy.
    """
    for index, part in enumerate(config.parts):
        where = f"reward.parts[{index}] ({part.name})"
        if part.name in _EXTRAS and importlib.util.find_spec(_EXTRAS[part.name]) is None:
            raise UserError(f"{where} needs {_EXTRAS[part.name]}: pip install 'selftaught[{part.name}]'")
        for problem in problems:
            _check_problem(where, part, problem)
    if not problems:
        return
    # One worker is enough, and a fork of its own: the caller's workers stay untouched.
    with Rewarder(config.model_copy(update={"workers": 1}), functions) as rewarder:
        trials = rewarder.trial(problems[0], problems[0].answer or "0")
    at = {id(part): index for index, part in enumerate(config.parts)}
    for part, info, verdict in trials:
        where = f"reward.parts[{at[id(part)]}] ({part.name})"
        _check_function(where, part, info, problems)
        if verdict is not None and verdict["status"] == "timeout":
            raise UserError(
                f"{where}: {verdict['feedback']} on a trial completion; make it faster or raise reward.timeout"
            )
        if verdict is not None and verdict["status"] == "error":
            raise UserError(f"{where} fails on a trial completion: {verdict['feedback']}")


def judgeable(config: RewardConfig, problems: Sequence[Problem], say: Say) -> tuple[Problem, ...]:
    """The problems whose answers the parts can compare with; how many others there are, and why, goes to `say`.

    Raises UserError where none is left.
    """
    kept, faults = [], []
    for problem in problems:
        try:
            for index, part in enumerate(config.parts):
                _check_problem(f"reward.parts[{index}] ({part.name})", part, problem)
            kept.append(problem)
        except UserError as error:
            faults.append((problem.id, error))
    if faults and not kept:
        raise faults[0][1]
    if faults:
        named = ", ".join(each for each, _ in faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
        say(f"{len(faults)} of {len(problems)} problems cannot be judged and are left out: {named}; the first: "
            f"{faults[0][1]}")
    return tuple(kept)


def _check_problem(where: str, part: RewardPart, problem: Problem) -> None:
    has_group = part.name == "regex" and re.compile(part.pattern or "").groups > 0
    reads, kind = _GOLD["exact"] if has_group else _GOLD.get(part.name, (None, ""))
    if reads is not None and reads(problem.answer or "") in (None, ""):
        raise UserError(
            f"{where}: the answer of problem {problem.id} is {problem.answer!r}, not {kind}; "
            "say with data.columns which column holds the answer, or choose another verifier"
        )
    if part.name == "gym" and "entry" not in problem.columns:
        raise UserError(
            f"{where}: problem {problem.id} has no column `entry`; "
            "`gym` scores data from `gym:NAME` only: use exact, numeric or math for other data"
        )


def _check_function(where: str, part: RewardPart, info: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Can the function be loaded, and does the data hold every name that it needs?"""
    if info["error"]:
        raise UserError(f"{where}: {info['error']}")
    if not part.is_function:
        return
    given = {*ALWAYS, *part.options}
    for problem in problems:
        columns = columns_of(problem)
        for name in info["needs"]:
            if name not in given and name not in columns:
                raise UserError(
                    f"{where} needs the argument {name!r}, which is no column of the data "
                    f"({nearest(name, [*columns, *ALWAYS])}); rename it, give it a default, or set it under `options`"
                )
    for problem in problems[:100]:  # a column is of one kind throughout
        columns = columns_of(problem)
        for name in info["takes"]:
            if name in columns and name not in given:
                try:
                    plain(columns[name])
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"{where} takes the column {name!r}, which cannot be passed to a worker process: {error}"
                    ) from error
    for name in part.options:
        if not info["any"] and name not in info["takes"]:
            raise UserError(f"{where}: options.{name} is no parameter of it ({nearest(name, info['takes'])})")
