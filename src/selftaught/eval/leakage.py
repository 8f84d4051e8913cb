"""Has a student taken over what only its teacher could know? Per rollout, from log-probs and texts alone.

y: a response of R tokens; x: its prompt; c: a privilege; S: the student, on x; T: the teacher, on x and c. All
log-probs are of the same tokens of y, in nats.

Two questions are kept apart. What the teacher KNOWS: the gap log T(y) - log S(y) under the right privilege minus that
under a wrong one; it is large for any response that is right, so it measures the teacher and not the student's guilt.
Whether the student LEANS on what it was not shown: it mentions a reference that its prompt does not have, or its
wording is evidence that there was one. That evidence is the likelihood ratio under a fixed reference model R (the one
that training began with), with a WRONG privilege in the place of c, so that being right earns nothing:

    e(y) = prod over the tokens with a letter, but for the answer's, of R(y_t | x, c_wrong, y_<t) / R(y_t | x, y_<t)

Digits and signs do not count: they follow the form of the block (a full stop after a number) more than its content.
Over all tokens, and where R itself writes, the ratio has mean 1 for every c, so that 20 is reached in at most one of 20
responses: an e-value against "nothing but the question was there" (arXiv 1912.06116). For a part of the tokens, and for
another writer, no such bound holds. So 20 is a convention; what flags a student is that it leans more than R does.
A wording that R does not connect with privileges is no evidence, whatever it means: the measure is as good as R.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selftaught.eval.config import LeakageConfig
from selftaught.eval.copies import longest_copy
from selftaught.eval.intervals import permutation_test
from selftaught.eval.lexicon import MENTIONS, STYLE_WORDS
from selftaught.eval.tables import Table, changes, differences, means

Array = NDArray[np.float64]
Span = tuple[int, int]

ARMS: tuple[Literal["right", "wrong", "other_problem", "empty"], ...] = ("right", "wrong", "other_problem", "empty")
STUDENT, REFERENCE, REFERENCE_WRONG = "student", "reference", "reference/wrong"
DEMONSTRATION = "demonstration/"
SIGNIFICANT = 0.05  # of the permutation test that a rise must pass to be flagged
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
# Signs that carry the task in formulas and code; all other signs and all blanks are style.
TASK_SIGNS = frozenset("+-*/=<>^%$\\{}[]()|&~#@_")


@dataclass(frozen=True)
class Scored:
    """One response with what was seen of it: its texts, the characters of each token, and log-probs (R,) by name.

    `logp` holds "student"; "teacher/ARM" of `ARMS`; "reference" and "reference/wrong" of the model that training began
    with; "demonstration/0", ... of the teacher under different demonstrations. What is missing is not measured.
    `privilege` is the right one's evidence, "" where there is none; the three ids are of response, privilege, prompt.
    """

    problem: Any
    sample: int
    right: bool
    prompt: str
    response: str
    privilege: str
    answers: tuple[str, ...]
    spans: tuple[Span, ...]
    logp: Mapping[str, Array]
    ids: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())
    entropy: Array | None = field(default=None, repr=False)


# ---------------------------------------------------------------------------------------------- what the text shows


def occurrences(text: str, answer: str) -> list[Span]:
    """Where `answer` stands in `text` by itself: not inside a longer number or word. Case does not count."""
    answer = answer.strip()
    if not answer:
        return []
    before = r"(?<![\w.-])" if answer[0].isalnum() else r"(?<!\w)" if answer[0] == "-" else ""
    after = r"(?![\w]|\.\d)" if answer[-1].isalnum() else ""
    return [match.span() for match in re.finditer(before + re.escape(answer) + after, text, re.IGNORECASE)]


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def mentions(response: str, prompt: str, patterns: Sequence[str] | None = None) -> list[str]:
    """What in the response speaks of a reference that its prompt does not have, in order of the patterns.

    Without `patterns`, those of `lexicon.py`. One that the prompt itself matches is not asked: to speak of a hint that
    is there is no leak.
    """
    compiled = map(_compiled, MENTIONS if patterns is None else patterns)
    asked = [pattern for pattern in compiled if not pattern.search(prompt)]
    return [match.group() for pattern in asked if (match := pattern.search(response))]


def answer_position(response: str, answer: str | None) -> float:
    """Where the answer first stands, as a share of the response: 0 is its beginning. NaN where it does not stand."""
    found = occurrences(response, answer) if answer else []
    return found[0][0] / len(response) if found else math.nan


def token_classes(one: Scored, style_words: frozenset[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(R,) of each token: is it the answer's, and is it style? Every other token is the task's.

    The answer's: a character of it is in a mention of the answer. Style: not the answer's, and each of its characters
    is blank, a sign other than `TASK_SIGNS`, or in a word of `style_words` (the whole word counts, not the token's
    piece of it).
    """
    answer = np.zeros(len(one.response), dtype=bool)
    for text in one.answers:
        for start, end in occurrences(one.response, text):
            answer[start:end] = True
    style = np.array([not (c.isalnum() or c in TASK_SIGNS) for c in one.response], dtype=bool)
    for match in WORD.finditer(one.response):
        style[match.start() : match.end()] = match.group().casefold().replace("’", "'") in style_words
    is_answer = np.array([answer[start:end].any() for start, end in one.spans], dtype=bool)
    is_style = np.array([style[start:end].all() for start, end in one.spans], dtype=bool) & ~is_answer
    return is_answer, is_style


def character_spans(pieces: Sequence[bytes], text: str) -> tuple[Span, ...]:
    """The characters of `text` that each token's bytes cover; a character of several tokens belongs to all of them.

    Bytes that are no UTF-8 are the replacement character that a decoder puts there. `pieces` joined may begin with a
    blank that the text lacks, as SentencePiece's do, and end with what a stop string cut away.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    joined = b"".join(pieces)
    done = -1 if joined.startswith(b" ") and not text.startswith(" ") else 0
    places = []  # the character that each byte belongs to
    for byte in joined:
        done += len(decoder.decode(bytes([byte])))
        places.append(done if decoder.getstate()[0] else done - 1)
    found, at = [], 0
    for piece in pieces:
        end = at + len(piece)
        start, stop = (places[at], places[end - 1] + 1) if piece else (0, 0)
        found.append((min(max(start, 0), len(text)), min(max(stop, 0), len(text))))
        at = end
    return tuple(found)


# -------------------------------------------------------------------------------------------- measures of a rollout


def rollout_measures(one: Scored, config: LeakageConfig) -> dict[str, float]:
    """Every measure of one response; NaN where something that it needs is missing.

    gap/ARM      mean over tokens of log T - log S under that privilege: nats per token
    knows        gap/right - gap/wrong: the part that knows the answer; the rest is common to any privilege
    answer_share, style_share    of sum |log T - log S| under the right privilege, that on those tokens
    gap_answer, gap_style, gap_task    its mean on the tokens of each class: nats per token
    pcmi         i(y; c | x) = log p(y | x, c) - log p(y | x), the sum over tokens: nats (arXiv 2606.26091, Prop. 2);
                 both under the teacher's weights: of an initial teacher the gap holds the student's drift too
    pcmi_demonstrations, pcmi_spread    over the demonstrations c: mean and standard deviation (n - 1)
    evidence     log e of the module's docstring: nats;  mention: 1 where the text mentions an unseen reference
    leaning      1 where it mentions one, or e >= `evidence`
    copied_characters, copied_tokens    the longest span from the privilege that is not in the prompt
    answer_position    see there
    """
    words = STYLE_WORDS if config.style_words is None else frozenset(word.casefold() for word in config.style_words)
    answer, style = token_classes(one, words)
    logp, student = one.logp, one.logp.get(STUDENT)
    gaps = {arm: logp[f"teacher/{arm}"] - student for arm in ARMS if student is not None and f"teacher/{arm}" in logp}
    found = {f"gap/{arm}": _mean(gaps.get(arm)) for arm in ARMS}
    found["knows"] = found["gap/right"] - found["gap/wrong"]
    found |= _shares(gaps.get("right"), answer, style)
    plain = logp.get(_plain(config))
    found["pcmi"] = math.nan
    if plain is not None and "teacher/right" in logp:
        found["pcmi"] = float((logp["teacher/right"] - plain).sum())
    shown = _information(logp, plain)
    found["pcmi_demonstrations"] = float(np.mean(shown)) if shown else math.nan
    found["pcmi_spread"] = float(np.std(shown, ddof=1)) if len(shown) > 1 else math.nan
    found["evidence"] = math.nan
    if REFERENCE in logp and REFERENCE_WRONG in logp:
        word = np.array([any(map(str.isalpha, one.response[start:end])) for start, end in one.spans], dtype=bool)
        found["evidence"] = float((logp[REFERENCE_WRONG] - logp[REFERENCE])[word & ~answer].sum())
    found["mention"] = float(bool(mentions(one.response, one.prompt, config.mentions)))
    found["leaning"] = float(found["mention"] > 0 or found["evidence"] >= math.log(config.evidence))
    if one.privilege:
        start, end = longest_copy(one.response, one.privilege, one.prompt)
        found["copied_characters"] = float(end - start)
        start, end = longest_copy(*one.ids)
        found["copied_tokens"] = float(end - start)
    else:
        found["copied_characters"] = found["copied_tokens"] = math.nan
    found["answer_position"] = min((position for answer_text in one.answers
                                    if not math.isnan(position := answer_position(one.response, answer_text))),
                                   default=math.nan)  # fmt: skip
    return found


def _plain(config: LeakageConfig) -> str:
    """The view that has the teacher's weights and no privilege."""
    return STUDENT if config.teacher == "live" else REFERENCE


def _information(logp: Mapping[str, Array], plain: Array | None) -> list[float]:
    """i(y; c | x) for each demonstration c, a repeated one as often as it was drawn."""
    return [float((value - plain).sum()) for name, value in sorted(logp.items())
            if plain is not None and name.startswith(DEMONSTRATION)]


def _shares(gap: Array | None, answer: NDArray[np.bool_], style: NDArray[np.bool_]) -> dict[str, float]:
    names = ("answer_share", "style_share", "gap_answer", "gap_style", "gap_task")
    if gap is None or not gap.size:
        return dict.fromkeys(names, math.nan)
    size = np.abs(gap)
    total = float(size.sum())
    shares = [float(size[where].sum()) / total if total > 0 else math.nan for where in (answer, style)]
    return dict(zip(names, [*shares, *(_mean(size[where]) for where in (answer, style, ~answer & ~style))],
                    strict=True))


def _mean(values: Array | None) -> float:
    return float(values.mean()) if values is not None and values.size else math.nan


def sharpening(group: Sequence[Scored], config: LeakageConfig) -> float:
    """Among pairs of right responses to one problem with different texts: how often the likelier one has the larger
    expected PCMI over demonstrations, both under the teacher's weights. 0.5: distillation keeps their ratio; above: it
    sharpens (arXiv 2606.26091, Remark 1). A tie counts half. NaN without such a pair. All responses must have been
    scored under the same demonstrations, a text among them as often as the policy wrote it: the remark's expectation.
    """
    texts: dict[str, tuple[float, float]] = {}
    for one in group:
        plain = one.logp.get(_plain(config))
        if one.right and plain is not None and (shown := _information(one.logp, plain)):
            texts.setdefault(one.response.strip(), (float(plain.sum()), float(np.mean(shown))))
    votes = [0.5 * (1 + math.copysign(1, (p - q) * (i - j))) if (p - q) * (i - j) else 0.5
             for (p, i), (q, j) in combinations(texts.values(), 2)]
    return float(np.mean(votes)) if votes else math.nan


# --------------------------------------------------------------------------------------------------------- summary


def leakage_table(scored: Sequence[Scored], config: LeakageConfig) -> Table:
    """Problems, names of the measures, and (P, M) means over each problem's samples; NaN where none has a value."""
    groups: dict[Any, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.problem, []).append(one)
    names: list[str] = []
    rows = []
    for group in groups.values():
        each = [rollout_measures(one, config) for one in group]
        names = list(each[0])
        values = np.array([[measures[name] for name in names] for measures in each])
        counted = np.isfinite(values).sum(0)
        means = np.where(counted > 0, np.nansum(values, 0) / np.maximum(counted, 1), math.nan)
        rows.append([*means, sharpening(group, config)])
    return list(groups), [*names, "sharpening"], np.array(rows, dtype=np.float64).reshape(len(rows), len(names) + 1)


def summarise_leakage(scored: Sequence[Scored], config: LeakageConfig, *, seed: int = 0) -> dict[str, Any]:
    """Each measure as {value, low, high, problems}: mean over problems, its 95 % bootstrap interval over problems.

    None where nothing is valued. `problems` and `samples` are counts, `tokens` those that were scored.
    """
    table = leakage_table(scored, config)
    counts = {"problems": len(table[0]), "samples": len(scored), "tokens": sum(len(one.spans) for one in scored)}
    return {**(means(table, seed) if table[0] else {}), **counts}


def compare_leakage(before: Sequence[Scored], after: Sequence[Scored], config: LeakageConfig, *, seed: int = 0
                    ) -> dict[str, Any]:
    """Paired differences, after minus before, on the problems that both have, by measure.

    That of `leaning` has a p beside its interval, and `flagged` is what `rise` says of it; None without a common
    problem.
    """
    tables = leakage_table(before, config), leakage_table(after, config)
    found: dict[str, Any] = dict(differences(*tables, seed))
    if not found:
        return {"flagged": None}
    found["leaning"], flagged = rise(*tables, "leaning", seed)
    return {**found, "flagged": flagged}


def rise(before: Table, after: Table, name: str, seed: int = 0) -> tuple[dict[str, Any], bool]:
    """The paired difference of a measure with the two-sided p of its permutation test; and does that flag a rise?

    Only where its whole interval is above 0 and p <= .05. The interval alone accuses too soon where a rise is rare:
    four problems that rose and none that fell, among however many, put it above 0, because no more than e^-4 = .018 of
    the draws hold none of the four. The test needs six of equal size.
    """
    problems, names, change_PM = changes(before, after)
    column_P1 = change_PM[:, [names.index(name)]]
    found = means((problems, [name], column_P1), seed)[name]
    found["p"] = permutation_test(column_P1)[0].p
    return found, found["value"] is not None and found["low"] > 0 and found["p"] <= SIGNIFICANT
