"""The rows of completions.jsonl: one for each saved completion, and all that any measure may read.

A row is a plain mapping with the keys of `KEYS`. An evaluation is the rows of one (model, arm, step); within
it, (seed, problem, sample) names a row.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selftaught.errors import UserError
from selftaught.eval.measures import lacks_answers
from selftaught.records import Rollout, Sampling, Verdict

Row = Mapping[str, Any]

KEYS = (
    "problem", "sample", "prompt", "response", "score", "status", "answer", "strategy",
    "tokens", "finish", "step", "sampling", "seed", "model", "arm", "reference",
)  # fmt: skip
NEEDED = ("problem", "sample", "score")
TYPES: dict[str, tuple[Any, str]] = {  # of what may be missing and, where it is there, is counted, compared or read
    "tokens": (int | float, "a number"), "step": (int | float, "a number"), "seed": (int | str, "a number"),
    "model": (str, "text"), "arm": (str, "text"), "status": (str, "text"), "finish": (str, "text"),
    "response": (str, "text"),
}  # fmt: skip
STUDENT = "student"


def rows_of(
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Verdict],
    *,
    model: str,
    seed: int,
    step: int,
    arm: str = STUDENT,
    prompts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """One row for each rollout. `arm` says which evaluation it belongs to: "student", "teacher/right", ...

    `prompts` is the text that the model saw, one for each rollout; without it, the problem's own prompt.
    """
    shown = prompts if prompts is not None else [_plain_prompt(r.problem.prompt) for r in rollouts]
    return [
        {
            "problem": rollout.problem.id,
            "sample": rollout.sample,
            "prompt": prompt,
            "response": rollout.text,
            "score": verdict.score,
            "status": verdict.status,
            "answer": verdict.answer,
            "strategy": verdict.strategy,
            "tokens": len(rollout.token_ids),
            "finish": rollout.finish,
            "step": step,
            "sampling": sampling_as_saved(rollout.sampling),
            "seed": seed,
            "model": model,
            "arm": arm,
            "reference": rollout.problem.answer,
        }
        for rollout, verdict, prompt in zip(rollouts, verdicts, shown, strict=True)
    ]


def sampling_as_saved(sampling: Sampling) -> dict[str, Any]:
    """The mapping that a row holds."""
    return {**asdict(sampling), "stop": list(sampling.stop)}


def append_rows(path: Path | str, rows: Iterable[Row]) -> None:
    """Append rows and flush them to the disk. A torn last line of an earlier, killed writer is cut away first.

    OSError passes through; what a failed write left behind is cut away, so that the file stays readable.
    """
    path = Path(path)
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    mend_tail(path)
    size = path.stat().st_size if path.exists() else 0
    try:
        # Lone surrogates can come out of a byte-level tokenizer; they must not cost the evaluation.
        with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
        raise


def mend_tail(path: Path) -> bool:
    """Make the file end at a line's end: a whole last row gets its newline, a torn one is cut away (then True)."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb+") as file:
        start, tail = file.seek(0, os.SEEK_END), b""
        while start > 0 and b"\n" not in tail:
            take = min(65536, start)
            start = file.seek(start - take)
            tail = file.read(take) + tail
        if tail.endswith(b"\n"):
            return False
        last = tail[tail.rfind(b"\n") + 1 :]
        torn = parse(last.decode("utf-8", "replace")) is None
        if torn:
            file.truncate(start + len(tail) - len(last))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
    return torn


def read_rows(path: Path | str, warn: Callable[[str], None] = warnings.warn) -> list[dict[str, Any]]:
    """All whole rows of a file, in file order, every key of `KEYS` present (None where the file has none).

    What is wrong with single lines is named through `warn` and the rest still counted: lines that are no
    rows, a truncated last line, duplicated ids (the first row stands), mixed sampling settings, problems on which
    no sample has a score, and problems without a reference answer, or without a sample's answer, among others that have
    one. UserError: no such file, or not one whole row in it.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    broken: list[str] = []
    duplicated: list[str] = []
    for number, line, last in _lines(path):
        row = parse(line)
        fault = _fault(row)
        if row is None and last and not line.endswith("\n"):
            fault = "is truncated"
        if row is None or fault:
            broken.append(f"line {number} {fault}")
        else:
            row["arm"] = row.get("arm") or STUDENT
            key = (row.get("model"), row["arm"], row.get("step"), row.get("seed"), row["problem"], row["sample"])
            if key in seen:
                duplicated.append(f"problem {row['problem']} sample {row['sample']} (line {number})")
                continue
            seen.add(key)
            rows.append({**dict.fromkeys(KEYS), **row})
    if not rows:
        raise UserError(f"{path}: no completion in it; each line must be a JSON object with {', '.join(NEEDED)}")
    if broken:
        warn(f"{path.name}: {count_of(broken, 'line')} left out: {some_of(broken)}")
    if duplicated:
        warn(f"{path.name}: {count_of(duplicated, 'duplicated row')} left out, the first stands: {some_of(duplicated)}")
    for message in _doubts(rows):
        warn(f"{path.name}: {message}")
    return rows


def evaluations(rows: Iterable[Row]) -> dict[tuple[Any, str, Any], list[Row]]:
    """The rows of each evaluation, by (model, arm, step), in order of first appearance."""
    found: dict[tuple[Any, str, Any], list[Row]] = {}
    for row in rows:
        found.setdefault((row.get("model"), row.get("arm") or STUDENT, row.get("step")), []).append(row)
    return found


def refuse_several(rows: Iterable[Row]) -> None:
    """Raise UserError for rows of more than one evaluation: measured together they would be nobody's."""
    kinds = list(evaluations(rows))
    if len(kinds) > 1:
        shown = "; ".join(f"model {model}, arm {arm}, step {step}" for model, arm, step in kinds[:6])
        raise UserError(f"rows of {len(kinds)} evaluations at once ({shown}); measure one at a time: put the rows of "
                        "each into a file of its own")


def select(rows: Iterable[Row], *, arm: str = STUDENT, step: int | None = None) -> list[Row]:
    """The rows of one arm at one step; `step` None takes the latest step that the arm has."""
    mine = [row for row in rows if (row.get("arm") or STUDENT) == arm]
    if step is None:
        step = max((row["step"] for row in mine if row.get("step") is not None), default=None)
    return [row for row in mine if row.get("step") == step]


def _doubts(rows: Sequence[Row]) -> Iterator[str]:
    """Sentences about rows that are whole but should not be counted without a thought."""
    for (_, arm, step), mine in evaluations(rows).items():
        settings = Counter(json.dumps(row["sampling"], sort_keys=True) for row in mine)
        where = f"arm {arm}" + ("" if step is None else f", step {step}")
        if len(settings) > 1:
            shown = "; ".join(f"{count} rows with {setting}" for setting, count in settings.most_common())
            yield f"mixed sampling settings ({where}), counted together: {shown}"
        judged = {row["problem"] for row in mine if row["score"] is not None}
        unjudged = sorted({str(row["problem"]) for row in mine if row["problem"] not in judged})
        if unjudged:
            yield f"{count_of(unjudged, 'problem')} without one score ({where}) not counted: {some_of(unjudged)}"
        known = {row["problem"] for row in mine if row.get("reference") is not None}
        unknown = sorted({str(row["problem"]) for row in mine if row["problem"] not in known})
        if known and unknown:
            lacking = f"{count_of(unknown, 'problem')} without a reference answer ({where})"
            yield f"{lacking}, left out of best_constant alone: {some_of(unknown)}"
        by_problem: dict[Any, list[Row]] = {}
        for row in mine:
            by_problem.setdefault(row["problem"], []).append(row)
        silent = sorted(str(problem) for problem in judged if lacks_answers(by_problem[problem]))
        if silent and any(row["answer"] is not None for row in mine):
            lacking = f"{count_of(silent, 'problem')} without one sample's answer ({where})"
            yield f"{lacking}, left out of maj@k and distinct_answers alone: {some_of(silent)}"


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(number from 1, line, is it the last) of every line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
            held: tuple[int, str] | None = None
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if held is not None:
                    yield (*held, False)
                held = (number, line)
            if held is not None:
                yield (*held, True)
    except OSError as error:
        raise UserError(f"completions {path}: {error.strerror}; give a completions.jsonl that can be read") from error


def parse(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _fault(row: dict[str, Any] | None) -> str | None:
    """What keeps a parsed line from being a row, to be read after "line 7"."""
    if row is None:
        return "is not a JSON object"
    missing = [key for key in NEEDED if key not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    if not isinstance(row["problem"], str | int) or not isinstance(row["sample"], int):
        return f"has the problem {row['problem']!r} and the sample {row['sample']!r}, not an id and a number"
    score = row["score"]
    if score is not None and not (isinstance(score, int | float) and abs(score) <= sys.float_info.max):
        return f"has the score {score!r}, not a finite number"
    for key, (kind, called) in TYPES.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            return f"has the {key} {row[key]!r}, not {called}"
    return None


def _plain_prompt(prompt: str | Sequence[Mapping[str, str]]) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def count_of(items: Sequence[str], noun: str) -> str:
    """ "3 rows"."""
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def some_of(items: Sequence[str], shown: int = 5) -> str:
    """ "p1, p2 and 7 more"."""
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more} more" if more > 0 else "")
