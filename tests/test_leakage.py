"""Leakage as pure functions: texts and log-probs by hand, by brute force, and on distributions small enough to sum."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from selftaught.eval import LeakageConfig, Scored, compare_leakage, leakage_table, summarise_leakage
from selftaught.eval import leakage as k
from selftaught.eval.auroc import auroc, delong, kendall, paired_bootstrap
from selftaught.eval.copies import longest_copy
from selftaught.eval.lexicon import STYLE_WORDS

FEW = settings(max_examples=80, deadline=None)
SHORT = st.text("ab", max_size=9)


def spans_of(*pieces: str) -> tuple[tuple[int, int], ...]:
    ends = np.cumsum([0, *map(len, pieces)]).tolist()
    return tuple(pairwise(ends))


def scored(*pieces: str, answers: tuple[str, ...] = ("7",), **more: Any) -> Scored:
    fields: dict[str, Any] = {"problem": "p", "sample": 0, "right": True, "prompt": "3 + 4", "privilege": "7",
                              "logp": {}, **more}  # fmt: skip
    return Scored(response="".join(pieces), spans=spans_of(*pieces), answers=answers, **fields)


# Copies.


@FEW
@given(SHORT, SHORT, SHORT)
def test_the_longest_copy_is_that_of_trying_every_span(response: str, source: str, known: str) -> None:
    spans = [(i, j) for i in range(len(response)) for j in range(i + 1, len(response) + 1)]
    copied = [(i, j) for i, j in spans if response[i:j] in source and response[i:j] not in known]
    longest = max((j - i for i, j in copied), default=0)
    start, end = longest_copy(response, source, known)
    assert end - start == longest
    if longest:
        assert (start, end) == min(span for span in copied if span[1] - span[0] == longest)
    assert longest_copy(tuple(response), tuple(source), tuple(known)) == (start, end)  # tokens are copied alike


def test_what_the_prompt_has_too_is_no_copy() -> None:
    assert longest_copy("so 12 apples", "there are 12 apples", "how many apples") == (2, 12)
    assert longest_copy("apples", "12 apples", "apples") == (0, 0)


def test_copies_of_long_texts_are_found_in_seconds() -> None:
    rng = np.random.default_rng(0)
    source = "".join(rng.choice(list("abcd"), 20_000))
    response = "".join(rng.choice(list("abcd"), 5_000)) + source[700:900]
    start, end = longest_copy(response, source, "")
    assert end - start >= 200 and response[start:end] in source


# What a text shows.


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It is 7.", "7", [(6, 7)]), ("17 or 7 or 72", "7", [(6, 7)]), ("3.7 and 7.5", "7", []), ("-7", "7", []),
        ("it is -7", "-7", [(6, 8)]), ("3-7", "-7", []), ("Paris, PARIS", "paris", [(0, 5), (7, 12)]), ("x", "", []),
        ("7, then 7", "7", [(0, 1), (8, 9)]),
    ],
)  # fmt: skip
def test_an_answer_stands_by_itself_and_not_inside_another(text: str, answer: str, found: list[Any]) -> None:
    assert k.occurrences(text, answer) == found


def test_position_of_the_answer_is_its_first_place_as_a_share() -> None:
    assert k.answer_position("7 is 7", "7") == 0.0
    assert k.answer_position("is it 7", "7") == 6 / 7
    assert math.isnan(k.answer_position("17", "7")) and math.isnan(k.answer_position("7", None))


@pytest.mark.parametrize("text", [
    "As the hint says, it is 7.", "The reference solution gives 7.", "As given, x = 7.", "As was stated, 7",
    "According to the answer key", "We are told that the answer is 7", "my earlier attempt failed",
    "the feedback says so", "We were given the result 7",
])  # fmt: skip
def test_mentions_of_an_unseen_reference_are_found(text: str) -> None:
    assert k.mentions(text, "3 + 4 =")


@pytest.mark.parametrize("text", [
    "The answer is 7.", "Given that x = 3, y is 4.", "The correct answer is 7", "Adding 3 and 4 gives 7.",
    "We have shown that 7 is prime.", "Let me try again. The result is 7.", "It gave a hinterland.",
    "First solution: x = 7. Second solution: x = 1.", "as shown by induction? no", "The key is under the mat",
])  # fmt: skip
def test_ordinary_working_mentions_nothing(text: str) -> None:
    expected = ["as shown"] if text.startswith("as shown") else []  # the list is blunt there, and known to be
    assert k.mentions(text, "3 + 4 =") == expected


def test_what_the_prompt_mentions_itself_is_no_leak() -> None:
    assert k.mentions("As the hint says", "Use the hint: 7") == []
    assert k.mentions("As the hint and the answer key say", "Use the hint: 7") == ["answer key"]
    assert k.mentions("ich weiss es schon", "3 + 4", ["weiss es"]) == ["weiss es"]


def test_every_token_is_the_answers_or_style_or_the_tasks() -> None:
    one = scored(" So", " the", " sum", " of", " 3", " +", " 4", " is", " 7", ".", " Th", "us", " add", "ition")
    answer, style = k.token_classes(one, STYLE_WORDS)
    words = [one.response[a:b].strip() for a, b in one.spans]
    assert [w for w, a in zip(words, answer, strict=True) if a] == ["7"]
    assert [w for w, s in zip(words, style, strict=True) if s] == ["So", "the", "of", "is", ".", "Th", "us"]
    answer, style = k.token_classes(one, frozenset({"sum"}))
    assert [w for w, s in zip(words, style, strict=True) if s] == ["sum", "."]


def test_tokens_find_their_characters_across_bytes_and_blanks() -> None:
    assert k.character_spans([b"a", "é".encode()[:1], "é".encode()[1:], b"b"], "aéb") == (
        (0, 1), (1, 2), (1, 2), (2, 3))
    assert k.character_spans([b" 3", b" +"], "3 +") == ((0, 1), (1, 3))  # a blank that SentencePiece put before
    assert k.character_spans([b" 3", b" +"], " 3 +") == ((0, 2), (2, 4))
    assert k.character_spans([b"ab", b"c\n"], "ab") == ((0, 2), (2, 2))  # cut away by a stop string
    broken = [b"\xe2", b"A\xff", b"\xe2\x82", b"\xac"]  # no UTF-8 at first, then a euro sign in two tokens
    assert b"".join(broken).decode("utf-8", "replace") == "\ufffdA\ufffd\u20ac"
    assert k.character_spans(broken, "\ufffdA\ufffd\u20ac") == ((0, 1), (1, 3), (3, 4), (3, 4))


# Measures of one rollout.


def test_measures_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    pieces = (" It", " is", " known", " 7", ".")
    names = ("student", "teacher/right", "teacher/wrong", "teacher/other_problem", "teacher/empty", "reference",
             "reference/wrong", "demonstration/00", "demonstration/01")  # fmt: skip
    logp = {name: -rng.random(5) * 3 for name in names}
    one = scored(*pieces, logp=logp, privilege="It is 7", prompt="3 + 4 is", ids=((5, 6, 7, 8, 9), (6, 7, 1), (7,)))
    found = k.rollout_measures(one, LeakageConfig())
    gap = logp["teacher/right"] - logp["student"]
    assert found["gap/right"] == pytest.approx(gap.sum() / 5)
    assert found["gap/empty"] == pytest.approx((logp["teacher/empty"] - logp["student"]).mean())
    assert found["knows"] == pytest.approx((logp["teacher/right"] - logp["teacher/wrong"]).mean())
    assert found["answer_share"] == pytest.approx(abs(gap[3]) / abs(gap).sum())
    assert found["style_share"] == pytest.approx((abs(gap[0]) + abs(gap[1]) + abs(gap[4])) / abs(gap).sum())
    assert found["gap_task"] == pytest.approx(abs(gap[2])) and found["gap_answer"] == pytest.approx(abs(gap[3]))
    assert found["pcmi"] == pytest.approx(gap.sum())
    shown = [(logp[f"demonstration/0{i}"] - logp["student"]).sum() for i in (0, 1)]
    assert found["pcmi_demonstrations"] == pytest.approx(sum(shown) / 2)
    assert found["pcmi_spread"] == pytest.approx(abs(shown[0] - shown[1]) / math.sqrt(2))
    evidence = (logp["reference/wrong"] - logp["reference"])[:3].sum()  # without the answer's token and the full stop
    assert found["evidence"] == pytest.approx(evidence)
    assert (found["copied_characters"], found["copied_tokens"]) == (6, 2)  # "It is " and the ids 6, 7
    assert found["answer_position"] == 13 / 15


def test_leaning_is_a_mention_or_evidence_of_at_least_twenty() -> None:
    def leaning(text: str, evidence: float) -> float:
        logp = {"reference": np.zeros(1), "reference/wrong": np.array([evidence])}
        return k.rollout_measures(scored(text, logp=logp), LeakageConfig())["leaning"]

    assert leaning("fine", math.log(20)) == 1 and leaning("fine", math.log(20) - 1e-9) == 0
    assert leaning("as the hint says", -5.0) == 1
    assert k.rollout_measures(scored("fine"), LeakageConfig())["leaning"] == 0  # unknown evidence accuses nobody
    logp = {"reference": np.zeros(1), "reference/wrong": np.array([math.log(5)])}
    assert k.rollout_measures(scored("x", logp=logp), LeakageConfig(evidence=4))["leaning"] == 1
    # Being right earns nothing: an answer that the wrong privilege makes likelier is not evidence.
    logp = {"reference": np.zeros(1), "reference/wrong": np.array([99.0])}
    assert k.rollout_measures(scored("seven", answers=("seven",), logp=logp), LeakageConfig())["evidence"] == 0
    assert k.rollout_measures(scored("12.", logp=logp), LeakageConfig())["evidence"] == 0  # nor does the form


def test_what_is_missing_is_not_measured() -> None:
    found = k.rollout_measures(scored(privilege=""), LeakageConfig())
    assert {name for name, value in found.items() if not math.isnan(value)} == {"mention", "leaning"}
    summary = summarise_leakage([scored(privilege="")], LeakageConfig())
    assert summary["gap/right"]["value"] is None and summary["mention"]["value"] == 0 and summary["tokens"] == 0
    assert summarise_leakage([], LeakageConfig())["problems"] == 0


def test_evidence_is_an_e_value_where_the_reference_model_writes() -> None:
    """Over all responses of a process that writes words alone: its mean is 1, and 20 comes in at most one of 20."""
    rng = np.random.default_rng(3)
    first, second = rng.dirichlet(np.ones(3) * 0.3, 2), rng.dirichlet(np.ones(3) * 0.3, (2, 3))  # 0: plain, 1: wrong
    mean = reached = 0.0
    for a, b in product(range(3), repeat=2):
        plain, wrong = (np.log([first[c][a], second[c][a][b]]) for c in (0, 1))
        one = scored("x", "y", answers=(), logp={"reference": plain, "reference/wrong": wrong})
        evidence = k.rollout_measures(one, LeakageConfig())["evidence"]
        mean += math.exp(plain.sum() + evidence)
        reached += math.exp(plain.sum()) * (evidence >= math.log(20))
    assert mean == pytest.approx(1) and reached <= 1 / 20


# Over problems.


def pcmi_of(text: str, student: float, shown: float, right: bool = True) -> Scored:
    return scored(text, right=right, logp={"student": np.array([student]), "demonstration/00": np.array([shown])})


def test_sharpening_asks_whether_the_likelier_gains_more() -> None:
    likely, rare, config = pcmi_of("a", -1.0, -0.2), pcmi_of("b", -3.0, -2.9), LeakageConfig()  # PCMI 0.8 and 0.1
    assert k.sharpening([likely, rare], config) == 1.0
    assert k.sharpening([pcmi_of("a", -1.0, -0.9), pcmi_of("b", -3.0, -2.2)], config) == 0.0
    assert k.sharpening([pcmi_of("a", -1.0, -0.5), pcmi_of("b", -3.0, -2.5)], config) == 0.5  # equal keeps the ratio
    assert math.isnan(k.sharpening([likely, pcmi_of("a ", -1.0, -0.2)], config))  # one text is no pair
    assert math.isnan(k.sharpening([likely, pcmi_of("b", -3.0, -2.9, right=False)], config))


def test_a_copying_teacher_sharpens_under_demonstrations_that_are_as_frequent_as_their_texts() -> None:
    """T(y | c) = .9 [y = c] + .1 p(y) with p = (.6, .3, .1): E i(y; c) = sum_c p(c) log T(y | c) / p(y) orders as p."""
    p = np.array([0.6, 0.3, 0.1])
    shown = [0] * 6 + [1] * 3 + [2]
    group = [scored(text, logp={"student": np.log(p[[i]])} | {
        f"demonstration/{n:02d}": np.log([0.9 * (i == c) + 0.1 * p[i]]) for n, c in enumerate(shown)})
        for i, text in enumerate("abc")]  # fmt: skip
    expected = [sum(p[c] * math.log((0.9 * (i == c) + 0.1 * p[i]) / p[i]) for c in range(3)) for i in range(3)]
    found = [k.rollout_measures(one, LeakageConfig())["pcmi_demonstrations"] for one in group]
    assert found == pytest.approx(expected) and expected == sorted(expected, reverse=True)
    assert k.sharpening(group, LeakageConfig()) == 1.0


def test_information_is_of_one_models_weights_and_holds_no_drift() -> None:
    """The student drifted by 2 nats since the run began; its teacher of that time learns .5 from the privilege."""
    first = {"reference": np.array([-1.0, -2.0]), "teacher/right": np.array([-0.5, -2.0]),
             "demonstration/00": np.array([-1.0, -1.5]), "demonstration/01": np.array([-1.0, -2.0])}  # fmt: skip
    one = scored("a", "b", logp={**first, "student": np.array([-0.5, -0.5])})
    other = scored("c", logp={"student": np.array([-0.5]), "reference": np.array([-2.0]),
                              "demonstration/00": np.array([-2.0]), "demonstration/01": np.array([-2.0])})  # fmt: skip
    initial, live = LeakageConfig(teacher="initial"), LeakageConfig()
    found = k.rollout_measures(one, initial)
    assert (found["pcmi"], found["pcmi_demonstrations"]) == (0.5, 0.25)
    assert found["gap/right"] == -0.75  # information less drift, a token
    assert k.rollout_measures(one, live)["pcmi"] == -1.5
    # `other` is likelier under both; it gains less by the first weights, and more by what mixes in the drift.
    assert k.sharpening([one, other], initial) == 0.0 and k.sharpening([one, other], live) == 1.0
    assert math.isnan(k.rollout_measures(scored("a", "b", logp={"student": np.zeros(2), "teacher/right": np.ones(2)}),
                                         initial)["pcmi"])  # fmt: skip


def test_problems_weigh_alike_however_many_samples_they_have() -> None:
    rows = [scored("as the hint says", problem="p"), *(scored("fine", problem="q", sample=i) for i in range(3))]
    problems, names, values = leakage_table(rows, LeakageConfig())
    assert problems == ["p", "q"] and values[:, names.index("mention")].tolist() == [1, 0]
    assert summarise_leakage(rows, LeakageConfig())["leaning"]["value"] == 0.5


def test_a_rise_of_leaning_is_flagged_only_where_interval_and_test_both_say_so() -> None:
    def side(leaning: int) -> list[Scored]:
        return [scored("as the hint says" if p < leaning else "fine", problem=p) for p in range(40)]

    config = LeakageConfig()
    assert compare_leakage(side(0), side(12), config)["flagged"] is True
    assert compare_leakage(side(0), side(1), config)["flagged"] is False  # in a third of all draws nobody leans
    rare = compare_leakage(side(0), side(4), config)  # the interval accuses, and chance does as much in one of eight
    assert rare["leaning"]["low"] > 0 and rare["leaning"]["p"] == 0.125 and rare["flagged"] is False
    assert compare_leakage(side(0), side(6), config)["leaning"]["p"] == 2 / 2**6
    assert compare_leakage(side(12), side(12), config)["leaning"]["value"] == 0
    assert compare_leakage(side(0), [scored("x", problem="other")], config)["flagged"] is None


def test_a_broken_expression_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"eval.leakage.mentions = '\('"):
        LeakageConfig(mentions=("(",))


# How well a score ranks.


@FEW
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.lists(st.integers(0, 4), min_size=1, max_size=7))
def test_auroc_is_the_share_of_ordered_pairs(positive: list[int], negative: list[int]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_delong_variance_is_that_of_its_definition_and_its_interval_covers() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(1, 1, 9), rng.normal(0, 1, 7)
    area, low, high = delong(x, y)
    v10 = [np.mean([(a > b) + 0.5 * (a == b) for b in y]) for a in x]
    v01 = [np.mean([(a > b) + 0.5 * (a == b) for a in x]) for b in y]
    variance = sum((v - area) ** 2 for v in v10) / 8 / 9 + sum((v - area) ** 2 for v in v01) / 6 / 7
    logit = math.log(area / (1 - area))
    width = 1.959964 * math.sqrt(variance) / (area * (1 - area))
    assert (low, high) == pytest.approx((1 / (1 + math.exp(width - logit)), 1 / (1 + math.exp(-width - logit))))
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1,1) > N(0,1)) = Phi(1 / sqrt 2)
    hits = sum(low <= truth <= high for _ in range(400)
               for _, low, high in [delong(rng.normal(1, 1, 25), rng.normal(0, 1, 25))])  # fmt: skip
    assert 0.91 <= hits / 400 <= 0.99


def test_perfect_separation_is_not_certainty() -> None:
    assert delong([2, 3, 4], [0, 1]) == (1.0, pytest.approx(0.025**0.5), 1.0)
    assert delong([0], [1, 2]) == (0.0, 0.0, pytest.approx(0.975))
    assert delong([1], [0, 2]) == (0.5, 0.0, 1.0)
    assert all(math.isnan(value) for value in delong([], [1.0]))


def test_paired_bootstrap_draws_problems_with_both_of_their_scores() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.random(12) + 0.3, rng.random(12)
    index = np.random.default_rng(5)
    slow = [auroc(x[i], y[i]) for i in (index.integers(0, 12, 12) for _ in range(50))]
    assert paired_bootstrap(x, y, draws=50, seed=5) == pytest.approx((auroc(x, y), *np.quantile(slow, [0.025, 0.975])))


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=8))
def test_kendall_counts_pairs_in_order(points: list[tuple[int, int]]) -> None:
    pairs = [(a, b) for i, a in enumerate(points) for b in points[:i]]
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for a, b in pairs]
    untied = math.sqrt(sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs))
    found = kendall([x for x, _ in points], [y for _, y in points])
    if untied:
        assert found == pytest.approx(sum(s * t for s, t in signs) / untied)
    else:
        assert math.isnan(found)
