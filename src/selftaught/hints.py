"""Hints for DOPD (arXiv 2606.30626): a model writes how to go about each problem, a second pass throws weak ones out.

As published: step-wise decomposition hints, written from verified rationales, that carry neither the executed steps nor
the final answer (on C-Eval such hints gave 71.3, hints with the steps 63.1, the bare answer 59.5, none 63.0); the same
model then checks their quality, and weak samples are dropped. Not published, and ours: the wording of both prompts
(an image in the paper), what counts as weak, and the test for a leaked answer that needs no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selftaught.chat import Chat, Failed
from selftaught.data import read, to_problems
from selftaught.errors import UserError
from selftaught.eval.rows import mend_tail, parse
from selftaught.records import Problem, Say

WRITE = """\
You help a student with a problem whose solution you know. Write a hint: the steps into which the problem falls apart, \
in order, one line each, and for each step what is to be found and which idea finds it.
Do not carry out any step. Do not give any intermediate result, nor the final answer, nor anything from which it can \
be read off. Write the hint alone.

Problem:
{problem}

{reference}"""
CHECK = """\
Below are a problem, its reference, and a hint that a student will see before solving the problem.
A good hint is right, is about this very problem, breaks it into steps that lead to the solution, carries out none of \
them, and does not reveal the final answer.
Say in one short sentence what speaks against it, if anything. Then write one last line: KEEP or DROP.

Problem:
{problem}

{reference}

Hint:
{hint}"""
NUMBERING = re.compile(r"^\s*(?:[-*#]+\s*)?(?:\*\*)?(?:step\s+)?\d+\s*[.):]", re.IGNORECASE | re.MULTILINE)
GIVE_UP = 10  # problems that failed before any worked out: something is wrong with all of them
TOLD_EVERY = 100


@dataclass(frozen=True)
class Task:
    """One row of the source that has no hint yet."""

    where: str
    id: str
    row: Mapping[str, Any]
    problem: Problem


@dataclass(frozen=True)
class Outcome:
    """A hint; why it was dropped, or None where it is good; what failed, or None."""

    task: Task
    hint: str = ""
    dropped: str | None = None
    failed: str | None = None


@dataclass
class Counts:
    """What became of the problems. `dropped` by reason; `failed` are (where, why), for another call to try again."""

    written: int = 0
    before: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        yield (f"hints: {self.written} written, {self.before} were done before, {self.dropped.total()} dropped"
               f"{f' ({reasons})' if reasons else ''}, {len(self.failed)} failed")
        for where, why in self.failed:
            yield f"failed: {where}: {why}; the same command tries it again"


def write_hints(source: str, out: Path, chat: Chat, model: str, *, judge: str | None = None, check: bool = True,
                columns: Mapping[str, str] | None = None, column: str = "hint", split: str = "train",
                limit: int | None = None, concurrency: int = 8, say: Say = print) -> Counts:
    """One JSON line in `out` for each problem of `source` that gets a good hint: its columns and `column`.

    Dropped ones go to `out` + ".dropped", with the reason, and are not asked for again. What a killed call left is
    kept: a last line that is not whole is cut off, and problems that are done are skipped.

    Raises:
        UserError: a source, column, file or endpoint that cannot work; or every problem fails.
    """
    if concurrency < 1:
        raise UserError(f"--concurrency {concurrency}: must be at least 1")
    tasks = _tasks(source, split, columns or {}, column)
    dropped = out.with_name(out.name + ".dropped")
    done = {_id({k: v for k, v in row.items() if k != column}) for row in _resumed(out)}
    done |= {str(row.get("id")) for row in _resumed(dropped)}
    todo = [task for task in tasks if task.id not in done]
    counts = Counts(before=len(tasks) - len(todo))
    todo = todo[:limit]
    say(f"hints: {len(todo)} problems to do, {counts.before} done before")
    ask = _Asker(chat, model, judge or model, check)
    with _appended(out) as good, _appended(dropped) as bad, closing(_in_parallel(ask, todo, concurrency)) as outcomes:
        for number, outcome in enumerate(outcomes, start=1):
            _account(outcome, counts, column, good.write, bad.write)
            good.flush()
            bad.flush()
            if len(counts.failed) >= min(GIVE_UP, len(todo)) and not counts.written and not counts.dropped:
                where, why = counts.failed[0]
                raise UserError(f"hints: the first {len(counts.failed)} problems failed and none worked out; "
                                f"{where}: {why}; check --endpoint and --model")
            if number % TOLD_EVERY == 0:
                say(f"hints: {number} of {len(todo)}")
    return counts


def leak(hint: str, problem: Problem) -> str | None:
    r"""Why `hint` gives the answer away, or None. Ours: no model is asked.

    A \boxed{...} always does. The answer itself does where it stands alone (no part of a longer word or number) and the
    problem's own text does not hold it too; numbers of a list of steps are no answers. A letter (a choice) counts only
    where the hint states it. A short number that a step needs anyway is taken for a leak: better one hint too few.
    """
    if re.search(r"\\f?box(ed)?\s*\{", hint):
        return "leaks the answer"
    answer = _plain(problem.answer or "")
    if not answer:
        return None
    if re.fullmatch(r"[a-j]", answer):
        stated = re.search(rf"(answer|choice|option)(\s+is)?\s*[:=]?\s*\(?{answer}(?!\w)", _plain(hint))
        return "leaks the answer" if stated else None
    alone = re.compile(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)")
    told = alone.search(_plain(NUMBERING.sub(" ", hint))) and not alone.search(_plain(_question(problem)))
    return "leaks the answer" if told else None


@dataclass(frozen=True)
class _Asker:
    chat: Chat
    model: str
    judge: str
    check: bool

    def __call__(self, task: Task) -> Outcome:
        """Write, then filter. Raises UserError where nothing can work."""
        problem = task.problem
        asked = {"problem": _question(problem), "reference": _reference(problem)}
        try:
            hint = self.chat.ask(self.model, [{"role": "user", "content": WRITE.format(**asked)}])
            if not hint.whole or not hint.text:
                return Outcome(task, hint.text, "cut off")
            if why := leak(hint.text, problem):
                return Outcome(task, hint.text, why)
            if self.check:
                content = CHECK.format(**asked, hint=hint.text)
                verdict = self.chat.ask(self.judge, [{"role": "user", "content": content}])
                if not re.search(r"\bKEEP\b\W*\Z", verdict.text):  # no clear verdict is not a good one
                    return Outcome(task, hint.text, "found weak")
            return Outcome(task, hint.text)
        except Failed as error:
            return Outcome(task, failed=str(error))


def _in_parallel(ask: _Asker, tasks: Sequence[Task], concurrency: int) -> Generator[Outcome, None, None]:
    """Outcomes as they come. An error of one ends all: what is under way is awaited, the rest is never begun."""
    with ThreadPoolExecutor(concurrency) as pool:
        waiting: set[Future[Outcome]] = set()
        rest = iter(tasks)
        try:
            while True:
                for task in rest:
                    waiting.add(pool.submit(ask, task))
                    if len(waiting) >= concurrency:
                        break
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:
            ask.chat.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _account(outcome: Outcome, counts: Counts, column: str, good: Callable[[str], Any],
             bad: Callable[[str], Any]) -> None:
    task = outcome.task
    if outcome.failed is not None:
        counts.failed.append((task.where, outcome.failed))
    elif outcome.dropped is not None:
        counts.dropped[outcome.dropped] += 1
        bad(_line({"id": task.id, "where": task.where, "reason": outcome.dropped, column: outcome.hint}))
    else:
        counts.written += 1
        good(_line({**task.row, column: outcome.hint}))


def _tasks(source: str, split: str, columns: Mapping[str, str], column: str) -> list[Task]:
    """The rows with something to write a hint from, each once. Raises UserError for columns that are not there."""
    rows = read(source, split, split != "train")
    problems, mapping = to_problems(source, rows, columns)
    if "solution" not in mapping and "answer" not in mapping:
        names = ", ".join(sorted({name for row in rows for name in row.values}))
        raise UserError(f"--solution: {source} has no column to write hints from (columns: {names}); name one with "
                        "--solution or --answer")
    if any(column in row.values for row in rows):
        raise UserError(f"--column {column!r}: {source} has such a column already; choose another name for the hint")
    tasks: dict[str, Task] = {}
    for row, problem in zip(rows, problems, strict=True):
        if problem.solution or problem.answer:
            identity = _id(row.values)
            tasks.setdefault(identity, Task(row.where, identity, row.values, problem))
    return list(tasks.values())


def _resumed(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of ours; a last line that a kill left half-written is cut off the file."""
    if not path.exists():
        return []
    lines, rows = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, start=1):
        row = parse(line.decode("utf-8", "replace"))
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise UserError(f"--out: line {number} of {path} is no JSON object; it is not a file of this command: "
                            "name another")
    mend_tail(path)  # not before: what is no file of ours stays as it is
    return rows


def _appended(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); choose another place") from error


def _line(row: Mapping[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return json.dumps(row, default=str) + "\n"
    return line


def _id(row: Mapping[str, Any]) -> str:
    """A digest of a row's columns, the same before and after a way through JSON."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _question(problem: Problem) -> str:
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n\n".join(message["content"] for message in problem.prompt)


def _reference(problem: Problem) -> str:
    parts = [("Reference solution", problem.solution), ("Final answer", problem.answer)]
    return "\n\n".join(f"{name}:\n{text}" for name, text in parts if text)


def _plain(text: str) -> str:
    """For comparison: without dollar signs, backslash-commas and case, with single blanks."""
    return " ".join(re.sub(r"\$|\\[,;!]|\\left|\\right", " ", text).casefold().split())
