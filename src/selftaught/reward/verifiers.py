"""The built-in verifiers: pure functions (completion, problem, options) -> result.

`problem` and `options` are plain mappings, the fields of `Problem` and of `RewardPart`; a result holds the
fields of `Verdict` by name. They run in worker processes (so that a pattern that backtracks for ever, or
9**9**9 handed to sympy, costs one verdict) but can be called directly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from selftaught.reward.extract import captured, extract, letter, number, number_text

Result = dict[str, Any]
Verifier = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Result]


def result(score: float | None, status: str, feedback: str | None = None, answer: str | None = None) -> Result:
    return {"score": score, "status": status, "feedback": feedback, "answer": answer}


def _judged(right: bool, answer: str) -> Result:
    return result(1.0, "right", answer=answer) if right else result(0.0, "wrong", answer=answer)


def _unparsed(what: str) -> Result:
    return result(0.0, "unparsed", f"no {what} was found in the completion")


def _bad_gold(kind: str, gold: Any) -> Result:
    """A reference answer that cannot be read must never pay: nothing is known about the completion."""
    return result(0.0, "error", f"the problem's own answer {gold!r} is not {kind}")


def exact(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """Is the extracted answer, stripped, the problem's answer letter for letter (or but for case)?"""
    gold = (problem.get("answer") or "").strip()
    if not gold:
        return _bad_gold("a text", problem.get("answer"))
    answer = extract(text, options.get("extract") or "whole", options.get("pattern"))
    if answer is None:
        return _unparsed("answer")
    if options.get("ignore_case"):
        gold, answer = gold.casefold(), answer.casefold()
    return _judged(answer == gold, answer)


def numeric(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """Is the extracted number the problem's? Exact in rationals, or within `tolerance` (absolute or relative)."""
    gold = number(problem.get("answer") or "")
    if gold is None:
        return _bad_gold("a number", problem.get("answer"))
    found = extract(text, options.get("extract") or "last_number", options.get("pattern"))
    value = None if found is None else number(found)
    if value is None:
        return _unparsed("number")
    slack = Fraction(options.get("tolerance") or 0) * max(Fraction(1), abs(gold))
    return _judged(abs(value - gold) <= slack, number_text(value))


def choice(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """Is the chosen letter, A to J, the problem's? A hedge between two letters is no choice."""
    gold = letter(problem.get("answer") or "")
    if gold is None:
        return _bad_gold("a letter A to J", problem.get("answer"))
    rule = options.get("extract")
    part = extract(text, rule, options.get("pattern")) if rule else text
    answer = None if part is None else letter(part)
    return _unparsed("choice") if answer is None else _judged(answer == gold, answer)


def regex(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """With a group in `pattern`: is its last match the problem's answer? Without: does it match anywhere?"""
    pattern = options["pattern"]
    answer = captured(text, pattern)
    if answer is None:
        return _unparsed(f"match of {pattern!r}")
    if re.compile(pattern).groups == 0:
        return _judged(True, answer)
    gold = (problem.get("answer") or "").strip()
    if not gold:
        return _bad_gold("a text", problem.get("answer"))
    if options.get("ignore_case"):
        gold, answer = gold.casefold(), answer.casefold()
    return _judged(answer == gold, answer)


def math(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """Is the last expression equal to the problem's by math-verify, whichever of the two is called gold?

    math-verify's own timeouts are signals that only work on a main thread; they are off, since the pool
    has a deadline. Its `verify(gold, prediction)` accepts some pairs in one order only, so both are asked.
    """
    from math_verify import parse, verify

    gold_text = (problem.get("answer") or "").strip()
    anchored = any(sign in gold_text for sign in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(gold_text if anchored else f"${gold_text}$", parsing_timeout=None) if gold_text else []
    if not gold:
        return _bad_gold("a mathematical expression", problem.get("answer"))
    part = extract(text, options.get("extract") or "whole", options.get("pattern"))
    found = parse(part, parsing_timeout=None) if part else []
    if not found:
        return _unparsed("mathematical expression")

    def equal(left: Any, right: Any) -> bool:
        return bool(verify(left, right, allow_set_relation_comp=True, timeout_seconds=None))

    return _judged(equal(gold, found) and equal(found, gold), str(found[0])[:1000])


@lru_cache(maxsize=64)
def _gym_scorer(source: str) -> Callable[..., float]:
    import reasoning_gym

    scorer: Callable[..., float] = reasoning_gym.get_score_answer_fn(source)
    return scorer


def gym(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """reasoning-gym's own score of the extracted answer; right at 1, though it may pay partly below."""
    entry = problem["columns"].get("entry")
    try:
        source = entry["metadata"]["source_dataset"]
    except (TypeError, KeyError):
        return result(0.0, "error", "the column `entry` is not a reasoning-gym entry with its metadata")
    answer = extract(text, options.get("extract") or "whole", options.get("pattern"))
    if answer is None:
        return _unparsed("answer")
    score = float(_gym_scorer(source)(answer, entry))
    return result(score, "right" if score >= 1.0 else "wrong", answer=answer)


def format(text: str, problem: Mapping[str, Any], options: Mapping[str, Any]) -> Result:
    """1 where `pattern` is found, else 0. A dot matches line ends too; anchor with ^ and $ for the whole text."""
    found = re.search(options["pattern"], text, re.DOTALL) is not None
    return result(float(found), "right" if found else "wrong")


def length(tokens: int, max_length: int, buffer: int) -> Result:
    """DAPO's soft over-length penalty (arXiv 2503.14476, eq. 13), in [-1, 0].

    0 up to max_length - buffer tokens, then falling linearly to -1 at max_length, and -1 beyond.
    """
    over = tokens - (max_length - buffer)
    score = 0.0 if over <= 0 else -1.0 if tokens > max_length else -over / buffer
    return result(score, "right" if over <= 0 else "wrong")


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "numeric": numeric,
    "choice": choice,
    "regex": regex,
    "math": math,
    "gym": gym,
    "format": format,
}
