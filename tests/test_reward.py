"""The reward stage: its section, users' functions, weighted sums, the check before a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selftaught.errors import UserError
from selftaught.records import Problem, Prompt, Rollout, Sampling, Verdict
from selftaught.reward import RewardConfig, Rewarder, check, from_callables
from selftaught.reward.rewarder import columns_of, combine, part_keys

FILES = Path(__file__).parent / "rewards"
PROTOCOL, VERDICTS = FILES / "protocol.py", FILES / "verdicts.py"


def problem(answer: str | None = "4", prompt: Any = "2+2?", **columns: Any) -> Problem:
    return Problem("p1", prompt, answer, None, columns)


def rollout(text: str, of: Problem | None = None, tokens: int = 3) -> Rollout:
    ids = tuple(range(tokens))
    return Rollout(
        of or problem(), 0, Prompt((1,)), ids, (0.0,) * tokens, text, "stop", Sampling(max_completion_length=10), 0, 0
    )


def score(reward: Any, *rollouts: Rollout, functions: Mapping[str, Any] | None = None) -> list[Verdict]:
    config = RewardConfig.parse(reward).model_copy(update={"workers": 1})
    with Rewarder(config, functions) as rewarder:
        return rewarder(rollouts)


def test_short_forms_mean_the_same_as_long_ones() -> None:
    long = RewardConfig.parse({"parts": [{"name": "numeric"}]})
    assert RewardConfig.parse("numeric") == RewardConfig.parse(["numeric"]) == RewardConfig.parse([{"name": "numeric"}])
    assert RewardConfig.parse({"name": "numeric"}) == long == RewardConfig.parse(long)
    assert RewardConfig.parse(long.model_dump(mode="json")) == long
    beside = RewardConfig.parse({"name": "numeric", "tolerance": 0.5, "timeout": 3, "shuffle": True})
    parts = [{"name": "numeric", "tolerance": 0.5}]
    assert beside == RewardConfig.parse({"parts": parts, "timeout": 3, "shuffle": True})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("numerik", "did you mean 'numeric'"),
        ("rewards.py", "neither a verifier"),
        ([{"name": "numeric", "ignore_case": True}], "does not take `ignore_case`"),
        ([{"name": "gym", "options": {"a": 1}}], "does not take `options`"),
        ([{"name": "f.py:g", "extract": "whole"}], "does not take `extract`"),
        ([{"name": "numeric", "extract": "last-number"}], "did you mean 'last_number'"),
        ([{"name": "exact", "extract": "after:"}], "no rule"),
        ([{"name": "format"}], "needs `pattern`"),
        ([{"name": "exact", "extract": "regex"}], "needs `pattern`"),
        ([{"name": "exact", "pattern": "x"}], "only with `extract: regex`"),
        ([{"name": "format", "pattern": "("}], "no regular expression"),
        ([{"name": "length", "max_length": 4, "buffer": 5}], "is over max_length"),
        ({"parts": []}, "at least 1"),
        ({"parts": ["numeric"], "timeout": 0}, "greater than 0"),
        ({"parts": ["numeric"], "time_out": 1}, "Extra inputs"),
    ],
)
def test_a_mistake_in_the_section_is_named(value: Any, says: str) -> None:
    value = {**value, "parts": [{"name": p} for p in value["parts"]]} if isinstance(value, dict) else value
    with pytest.raises(ValidationError, match=says.replace("(", "\\(")):
        RewardConfig.parse(value)


def test_verdicts_come_in_the_order_of_the_rollouts() -> None:
    problems = [Problem(f"p{i}", "?", str(i)) for i in range(40)]
    rollouts = [rollout(f"it is {i if i % 2 else 99}", of) for i, of in enumerate(problems)]
    with Rewarder(RewardConfig.parse("numeric")) as rewarder:
        pending = [rewarder.submit(rollouts[:20]), rewarder.submit([]), rewarder.submit(rollouts[20:])]
        found = [verdict for one in pending for verdict in one.result()]
        assert all(one.done() for one in pending)
    assert [verdict.score for verdict in found] == [float(i % 2) for i in range(40)]
    assert [verdict.answer for verdict in found] == [str(i if i % 2 else 99) for i in range(40)]


def test_parts_are_summed_by_weight_and_the_first_one_rules() -> None:
    reward = [
        {"name": "numeric", "weight": 0.8},
        {"name": "format", "pattern": "^<a>", "weight": 0.2},
        {"name": "length", "weight": 0.5, "buffer": 4},
    ]
    found = score(reward, rollout("<a>4"), rollout("4"), rollout("<a>5", tokens=8), rollout("<a>none", tokens=10))
    assert [verdict.score for verdict in found] == pytest.approx([1.0, 0.8, 0.2 - 0.25, 0.2 - 0.5])
    assert [verdict.status for verdict in found] == ["right", "right", "wrong", "unparsed"]
    assert [verdict.answer for verdict in found] == ["4", "4", "5", None]
    assert found[2].parts == {"numeric": 0.0, "format": 1.0, "length": -0.5}


def test_no_opinion_is_left_out_and_a_failure_shows() -> None:
    def part(value: float | None, status: str, feedback: str | None = None) -> dict[str, Any]:
        return {"score": value, "status": status, "feedback": feedback, "answer": None}

    keys, weights = ["a", "b"], [1.0, 2.0]
    assert combine(keys, weights, [part(None, "unparsed"), part(0.5, "wrong")]).score == 1.0
    assert combine(keys, weights, [part(None, "unparsed"), part(None, "unparsed")]).score is None
    late = combine(keys, weights, [part(1.0, "right"), part(0.0, "timeout", "late")])
    assert (late.score, late.status, late.feedback, late.parts) == (1.0, "timeout", "late", {"a": 1.0, "b": 0.0})
    assert combine(keys, weights, [part(1.0, "right"), part(0.0, "wrong", "hm")]).feedback == "hm"


def test_part_keys_are_short_and_distinct() -> None:
    config = RewardConfig.parse([{"name": n} for n in ("a.py:f", "b.py:f", "exact", "m.n:g", "exact", "c:f")])
    assert part_keys(config.parts) == ["f", "f#2", "exact", "g", "exact#2", "f#3"]


def test_a_function_gets_trls_keywords_as_lists_of_one() -> None:
    of = problem(level=(1, 2))
    (found,) = score(f"{VERDICTS}:echo", rollout("it is 4", of))
    assert (found.score, found.status) == (0.5, "wrong")
    assert found.feedback == repr((["2+2?"], ["it is 4"], [[0, 1, 2]], ["4"], [[1, 2]]))


def test_a_chat_prompt_makes_chat_completions() -> None:
    chat = ({"role": "user", "content": "2+2?"},)
    (found,) = score(f"{VERDICTS}:echo", rollout("4", problem(prompt=chat, level=1)))
    message = [[{"role": "assistant", "content": "4"}]]
    assert found.feedback == repr(([[dict(chat[0])]], message, [[0, 1, 2]], ["4"], [1]))


def test_a_function_gets_the_answer_that_the_verifiers_compare_with() -> None:
    worked = "40 + 2 = 42\n#### 42"
    of = Problem("p1", "40 + 2?", "42", worked, {"question": "40 + 2?", "answer": worked})
    assert columns_of(of) == {"question": "40 + 2?", "answer": "42", "solution": worked, "raw_answer": worked}
    functions = {"here:same": lambda completions, answer: [float(completions == answer)]}
    (found,) = score("here:same", rollout("42", of), functions=functions)
    assert found.score == 1.0
    named = Problem("p1", "?", "4", None, {"gold": "4", "answer": "four", "raw_answer": "mine"})
    assert columns_of(named) == {"gold": "4", "answer": "4", "raw_answer": "mine"}
    typed = Problem("p1", "?", "42", '["a", 1]', {"answer": 42, "solution": ["a", 1]})
    assert columns_of(typed) == {"answer": 42, "solution": ["a", 1]}, "the same, so a function gets the source's type"
    assert columns_of(Problem("p1", "?", "4", None, {"answer": None})) == {"answer": "4"}
    assert columns_of(Problem("p1", "?", None, None, {"answer": ""})) == {"answer": ""}


def test_a_function_takes_what_it_names_or_everything() -> None:
    of = problem(level=1, picture=object())  # what cannot cross is left out where nobody asked for it
    assert [v.score for v in score(f"{PROTOCOL}:subset", rollout("4", of), rollout("5", of))] == [1.0, 0.0]
    (found,) = score(f"{VERDICTS}:everything", rollout("4", of))
    assert found.feedback == "answer completion_ids level prompts"


def test_an_async_function_keeps_one_loop_and_none_is_no_opinion() -> None:
    found = score(f"{PROTOCOL}:later", rollout("x" * 10), rollout(""), rollout("xx"))
    assert [(v.score, v.status) for v in found] == [(1.0, "right"), (None, "unparsed"), (0.2, "wrong")]


def test_batch_makes_one_call_and_options_are_keywords() -> None:
    reward = [{"name": f"{PROTOCOL}:whole", "batch": True, "options": {"bonus": 0.5}}]
    assert [v.score for v in score(reward, *[rollout("x")] * 3)] == [3.5, 3.5, 3.5]
    assert [v.score for v in score(f"{PROTOCOL}:whole", *[rollout("x")] * 3)] == [1.0, 1.0, 1.0]


def module_level(completions: list[str], **_: Any) -> list[float]:
    return [float(completion == "4") for completion in completions]


def test_callables_are_imported_where_possible_and_else_inherited() -> None:
    secret = "4"

    def closure(completions: list[str], **_: Any) -> list[float]:
        return [float(completion == secret) for completion in completions]

    form, functions = from_callables([module_level, {"name": closure, "weight": 2.0}, lambda completions: [1.0]])
    assert form[0] == f"{__name__}:module_level" and len(functions) == 2
    assert next(iter(functions.values())) is closure
    found = score(form, rollout("4"), rollout("5"), functions=functions)
    assert [v.score for v in found] == [4.0, 1.0]
    assert from_callables("gym") == ("gym", {}) and from_callables([{"name": "gym"}]) == ([{"name": "gym"}], {})
    check(RewardConfig.parse(form), [problem()], functions)


@pytest.mark.parametrize(
    ("reward", "of", "says"),
    [
        ("numeric", problem("forty"), "problem p1 is 'forty', not a number"),
        ("exact", problem(None), "data.columns"),
        ("gym", problem(), "no column `entry`"),
        ("nowhere.py:f", problem(), "no file .*nowhere.py"),
        ("no_such_module:f", problem(), "ModuleNotFoundError.*no_such_module"),
        (f"{PROTOCOL}:sub_set", problem(), "no function 'sub_set' .did you mean 'subset'"),
        (f"{PROTOCOL}:not_a_function", problem(), "is int, not a function"),
        (f"{PROTOCOL}:no_completions", problem(), "no parameter `completions` .it has: prompts, answers"),
        (f"{PROTOCOL}:needs", problem(difficult=1), "argument 'difficulty'.*did you mean 'difficult'"),
        (f"{PROTOCOL}:breaks", problem(), r"ZeroDivisionError: division by zero \(protocol.py:\d+\)"),
        (f"{PROTOCOL}:picture", problem(image=object()), "'image', which cannot be passed"),
        ([{"name": f"{PROTOCOL}:subset", "options": {"answers": 1}}], problem(), "options.answers is no parameter"),
        ([{"name": "exact"}, {"name": f"{FILES / 'hostile.py'}:score"}], problem("sleep"), r"parts\[1\].*no verdict"),
    ],
)
def test_check_refuses_what_cannot_work_and_says_why(reward: Any, of: Problem, says: str) -> None:
    config = RewardConfig.parse(reward).model_copy(update={"timeout": 1.0})
    with pytest.raises(UserError, match=says) as caught:
        check(config, [of])
    assert "\n" not in str(caught.value)


def test_check_accepts_what_works() -> None:
    check(RewardConfig.parse([{"name": "numeric"}, {"name": f"{PROTOCOL}:later"}]), [problem(level=1)] * 2)


def test_workers_start_without_torch_and_pydantic() -> None:
    code = "import sys, selftaught.reward.guard; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
