"""The verifiers as pure functions: a table of cases each."""

from __future__ import annotations

import math as maths

import pytest

from selftaught.reward import extract, verifiers


def judge(name: str, text: str, gold: str | None, **options: object) -> tuple[str, str | None]:
    found = verifiers.VERIFIERS[name](text, {"answer": gold, "columns": {}}, options)
    assert (found["score"] == 1.0) == (found["status"] == "right")
    return found["status"], found["answer"]


@pytest.mark.parametrize(
    ("text", "gold", "options", "expected"),
    [
        (" Paris \n", "Paris", {}, ("right", "Paris")),
        ("paris", "Paris", {}, ("wrong", "paris")),
        ("PARIS", "paris ", {"ignore_case": True}, ("right", "paris")),
        ("I think\nso: Rome. Yes.\n", "Rome. Yes", {"extract": "after:so:"}, ("right", "Rome. Yes")),
        ("no mark", "x", {"extract": "after:The answer is"}, ("unparsed", None)),
        ("The answer is 3. The answer is 4.\nQ: 5", "4", {"extract": "after:The answer is"}, ("right", "4")),
        ("a\n b \n\n", "b", {"extract": "last_line"}, ("right", "b")),
        ("<a>1</a><a>2</a>", "2", {"extract": "regex", "pattern": "<a>(.*?)</a>"}, ("right", "2")),
        ("\\boxed{1} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", {"extract": "boxed"}, ("right", "\\frac{1}{2}")),
        ("", "x", {}, ("unparsed", None)),
        ("", "", {}, ("error", None)),
        ("None", None, {}, ("error", None)),
    ],
)
def test_exact(text: str, gold: str | None, options: dict[str, object], expected: object) -> None:
    assert judge("exact", text, gold, **options) == expected


@pytest.mark.parametrize(
    ("text", "gold", "options", "expected"),
    [
        ("2 + 2 = 4", "4", {}, ("right", "4")),
        ("so 5-3", "3", {}, ("right", "3")),
        ("x = -3.", "-3", {}, ("right", "-3")),
        ("(-3)", "-3", {}, ("right", "-3")),
        ("it costs $1,234.50 in all.", "1234.5", {}, ("right", "1234.5")),
        ("-$5", "-5", {}, ("right", "-5")),
        ("1/2", "0.5", {}, ("right", "0.5")),
        ("about 2/6", "1/3", {}, ("right", "1/3")),
        ("1/0", "1", {}, ("unparsed", None)),
        ("0.33", "1/3", {}, ("wrong", "0.33")),
        ("0.33", "1/3", {"tolerance": 0.01}, ("right", "0.33")),
        ("101", "100", {"tolerance": 0.01}, ("right", "101")),
        ("102", "100", {"tolerance": 0.01}, ("wrong", "102")),
        ("1e3", "1000", {}, ("right", "1000")),
        ("9e99999999", "1", {}, ("unparsed", None)),
        ("version 1.2.3", "1.2", {}, ("unparsed", None)),
        ("9" * 5000, "1", {}, ("unparsed", None)),
        ("the answer is forty", "40", {}, ("unparsed", None)),
        ("4 apples", "4", {"extract": "whole"}, ("unparsed", None)),
        ("\u22127", "-7", {}, ("right", "-7")),
        ("\\boxed{\\frac{3}{4}}", "0.75", {"extract": "boxed"}, ("right", "0.75")),
        ("12345678", "12345679", {}, ("wrong", "12345678")),
        ("1", "forty", {}, ("error", None)),
        ("0", "", {}, ("error", None)),
        ("", "0", {}, ("unparsed", None)),
        ("1,2,3", "3", {}, ("right", "3")),
    ],
)
def test_numeric(text: str, gold: str, options: dict[str, object], expected: object) -> None:
    assert judge("numeric", text, gold, **options) == expected


def test_equal_numbers_share_one_spelling() -> None:
    values = [extract.number(text) for text in ("1/2", "0.50", ".5", "2/4", "5e-1", "\\frac{1}{2}")]
    assert {extract.number_text(value) for value in values if value is not None} == {"0.5"} and None not in values
    assert [extract.number_text(extract.number(t) or maths.nan) for t in ("-0.05", "1/3", "-7")] == [
        "-0.05", "1/3", "-7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"), ("B", "B"), ("B.", "B"), ("b", "B"), ("B) because A is wrong", "B"), ("Answer: C", "C"),
        ("The answer is (d).", "D"), ("the answer is a number", None), ("Answer: a", "A"), ("Answer: **E**", "E"),
        ("\\boxed{\\text{B}}", "B"), ("A cat sat.", None), ("I do not know", None), ("Answer: A or B", None),
        ("A, B", None), ("(A) and (B)", None), ("I first took (A).\nAnswer: B", "B"), ("some thoughts\nC\n", "C"),
        ("Answer: Z", None), ("", None), ("The correct choice is J", "J"), ("Answer: Because", None),
        ("answer is B. Why? (A) is too small", "B"), ("\\boxed{12}", None), ("Answer: A/B", None),
        ("The answer is A because it fits", "A"), ("Answer: I think", None),
        ("The answer is A, or is it?\n<answer>b</answer>", "B"), ("<answer>\n(C)\n</answer>\n", "C"),
        ("<answer>A</answer> no: <answer>D</answer>", "D"), ("<answer>A or B</answer>", None),
    ],
)  # fmt: skip
def test_choice(text: str, letter: str | None) -> None:
    assert extract.letter(text) == letter
    for gold in "ABCDEFGHIJ":
        expected = "unparsed" if letter is None else "right" if letter == gold else "wrong"
        assert judge("choice", text, gold) == (expected, letter)


def test_choice_without_a_letter_as_gold_is_an_error() -> None:
    assert judge("choice", "A", "Paris")[0] == "error"


@pytest.mark.parametrize(
    ("text", "gold", "pattern", "expected"),
    [
        ("x=1 x=2", "2", r"x=(\d)", ("right", "2")),
        ("x=1 x=2", "1", r"x=(\d)", ("wrong", "2")),
        ("nothing", "1", r"x=(\d)", ("unparsed", None)),
        ("x=1", None, r"x=(\d)", ("error", None)),
        ("ok then", None, r"ok", ("right", "ok")),
    ],
)
def test_regex(text: str, gold: str | None, pattern: str, expected: object) -> None:
    assert judge("regex", text, gold, pattern=pattern) == expected


def test_format_pays_for_the_shape_alone() -> None:
    pattern = r"^<think>.*</think>\s*<answer>.*</answer>$"
    assert judge("format", "<think>a\nb</think>\n<answer>1</answer>", None, pattern=pattern)[0] == "right"
    assert judge("format", "<think>a</think> 1", None, pattern=pattern)[0] == "wrong"


@pytest.mark.parametrize(
    ("tokens", "score"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (999, -1.0)]
)
def test_length_is_dapos_soft_penalty(tokens: int, score: float) -> None:
    assert verifiers.length(tokens, 100, 20)["score"] == pytest.approx(score, abs=1e-12)


MATHS = [
    ("137", "the answer is 137.", "right"), ("137", "1", "wrong"), ("\\frac{1}{2}", "$0.5$", "right"),
    ("1/2", "\\boxed{\\frac{2}{4}}", "right"), ("5", "$x=5$", "right"), ("$\\{1,2\\}$", "$\\{2,1\\}$", "right"),
    ("$x^2+2x+1$", "$(x+1)^2$", "right"), ("$(1,2)$", "$[1,2]$", "wrong"), ("5", "$5$ or $6$", "wrong"),
    ("3", "no idea", "unparsed"), ("3", "", "unparsed"), ("", "3", "error"), ("$$", "", "error"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "text", "status"), MATHS)
def test_math(gold: str, text: str, status: str) -> None:
    assert judge("math", text, gold)[0] == status


@pytest.mark.parametrize(
    ("left", "right"),
    [("$1<x<2$", "$(1,2)$"), ("$0.5$", "$\\frac{1}{2}$"), ("$1$", "$1,2$"), ("$x=3$", "$3$"), ("$5$", "$6$"),
     ("$x<3$", "$(-\\infty,3)$"), ("$0.333333$", "$\\frac13$"), ("$10\\%$", "$0.1$")],
)  # fmt: skip
def test_math_does_not_depend_on_which_side_is_called_gold(left: str, right: str) -> None:
    assert judge("math", left, right)[0] == judge("math", right, left)[0]


def test_gym_scores_with_the_source_s_own_function() -> None:
    import reasoning_gym

    for entry in reasoning_gym.create_dataset("chain_sum", size=3, seed=1):
        problem = {"answer": entry["answer"], "columns": {"entry": entry}}
        right = verifiers.gym(f"So.\nThe answer is {entry['answer']}.", problem, {"extract": "after:The answer is"})
        assert (right["score"], right["status"], right["answer"]) == (1.0, "right", entry["answer"])
        assert verifiers.gym("no", problem, {})["status"] == "wrong"
        assert verifiers.gym("", problem, {})["status"] == "unparsed"
    assert verifiers.gym("1", {"answer": "1", "columns": {}}, {})["status"] == "error"
