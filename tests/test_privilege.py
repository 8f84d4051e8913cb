"""Stage `privilege`: who is shown what, in which prompt, and what was cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from selftaught.data import DataConfig, Renderer
from selftaught.errors import UserError
from selftaught.privilege import PrivilegeConfig, build, check, control, describe, for_problems
from selftaught.records import Privilege, Problem, Prompt, Rollout, Sampling, Verdict
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHOTS = (
    Problem(id="s1", prompt="7 + 1", answer="8", solution="7 + 1 = 8.", columns={"hint": "count on"}),
    Problem(id="s2", prompt="2 + 2", answer="4"),
)
PROBLEMS = [
    Problem(f"p{i}", f"{i} + 1", answer=str(i % 4), solution=f"work {i}", columns={"info": {"clue": f"clue {i}"}})
    for i in range(12)
]


def renderer(shots: Sequence[Problem] = (), template: str = "completion") -> Renderer:
    return Renderer(TOKENIZER, DataConfig(source="x.jsonl", template=template), shots)  # type: ignore[arg-type]


def group(problem: Problem, texts: Sequence[str], lengths: Sequence[int] | None = None) -> list[Rollout]:
    return [
        Rollout(problem, i, Prompt((1,)), (7,) * (lengths[i] if lengths else 3), (0.0,), text, "stop", Sampling(), 0, 0)
        for i, text in enumerate(texts)
    ]


def scores(*values: float | None) -> list[Verdict]:
    return [Verdict(value, "right" if value == 1.0 else "wrong", feedback=f"fb {i}") for i, value in enumerate(values)]


def made(config: PrivilegeConfig, rollouts: list[Rollout], verdicts: list[Verdict], **keys: Any) -> list[Any]:
    keys = {"seed": 0, "step": 0, "renderer": renderer(), "problems": PROBLEMS, **keys}
    return build(config, rollouts, verdicts, keys["problems"], keys["renderer"], seed=keys["seed"], step=keys["step"])


def texts(privileges: list[Privilege | None]) -> list[str | None]:
    return [privilege and privilege.text for privilege in privileges]


def decoded(privilege: Privilege | None) -> str:
    assert privilege is not None
    return str(TOKENIZER.decode(list(privilege.prompt.token_ids)))


# Kinds that a problem carries itself.


@pytest.mark.parametrize(
    ("fields", "block"),
    [
        ({"kind": "answer"}, "Hint: the answer is 3."),
        ({"kind": "solution"}, "A correct solution: work 3"),
        ({"kind": "hint", "column": "info.clue"}, "Hint: clue 3"),
        ({"kind": "answer", "template": "({privilege}) {x}\n"}, "(3) {x}"),
    ],
)
def test_the_block_stands_in_the_teachers_prompt_and_nowhere_else(fields: dict[str, Any], block: str):
    [privilege] = made(PrivilegeConfig(**fields), group(PROBLEMS[3], ["x"]), scores(0.0))
    assert decoded(privilege) == f"Question: 3 + 1\n{block}\nAnswer:"
    assert privilege is not None and privilege.kind == fields["kind"] and privilege.cut == 0


@pytest.mark.parametrize("template", ["chat", "completion"])
def test_shots_carry_their_own_privilege_of_the_same_kind(template: str):
    shown = {
        "answer": ("the answer is 8.", "the answer is 4."),
        "solution": ("solution: 7 + 1 = 8.", ""),
        "demonstration": ("solution: 7 + 1 = 8.", "solution: 4"),
        "hint": ("Hint: count on", ""),
        "feedback": ("", ""),
    }
    rollouts, verdicts = group(PROBLEMS[3], ["x", "y"]), scores(0.0, 1.0)
    render = renderer(SHOTS, template)
    for kind, expected in shown.items():
        column = {"column": "hint"} if kind == "hint" else {}
        problem = Problem(id="h", prompt="9 + 9", answer="18", solution="w", columns={"hint": "h"})
        own = [Rollout(**{**vars(r), "problem": problem}) for r in rollouts]
        [first, _] = made(PrivilegeConfig(kind=kind, **column), own, verdicts, renderer=render)
        student = str(TOKENIZER.decode(list(render.prompt(problem).token_ids)))
        for shot, text in zip(SHOTS, expected, strict=True):
            end = "Answer:" if template == "completion" else "<|im_end|>"
            inserted = decoded(first).split(f"{shot.prompt}", 1)[1].split(end)[0].strip()
            assert inserted.endswith(text) and bool(inserted) is bool(text), (kind, shot.id)
        assert len(decoded(first)) > len(student)


def test_rollouts_of_one_context_share_one_object():
    rollouts = group(PROBLEMS[0], ["a"] * 3) + group(PROBLEMS[1], ["a"] * 3)
    privileges = made(PrivilegeConfig(), rollouts, scores(*[0.0] * 6))
    assert len({id(p) for p in privileges}) == 2
    assert len({id(p) for p in privileges[:3]}) == 1 and privileges[0] is not privileges[3]


def test_a_problem_without_the_column_has_no_privilege():
    bare = Problem(id="b", prompt="?")
    privileges = made(PrivilegeConfig(), group(bare, ["a", "b"]) + group(PROBLEMS[1], ["a", "b"]), scores(1, 1, 1, 1))
    assert texts(privileges) == [None, None, "1", "1"]
    metrics = describe(privileges)
    assert metrics["privilege/missing"] == 0.5 and metrics["privilege/contexts"] == 1.0
    assert metrics["privilege/prompt_length"] == len(privileges[2].prompt.token_ids)  # type: ignore[union-attr]
    assert describe([]) == {} and describe([None])["privilege/missing"] == 1.0


# Demonstrations and feedback.


def test_a_demonstration_is_a_sibling_that_succeeded_and_never_oneself():
    rollouts = group(PROBLEMS[0], ["w0", "r1", "w2", "r3"])
    rollouts += group(PROBLEMS[1], ["only", "w"]) + group(PROBLEMS[2], ["w"])
    verdicts = scores(0.0, 1.0, 0.5, 1.0) + scores(1.0, None) + scores(0.0)
    privileges = made(PrivilegeConfig(kind="demonstration"), rollouts, verdicts)
    assert texts(privileges) == ["r1", "r3", "r1", "r1", None, "only", None]
    assert privileges[0] is privileges[2] is privileges[3], "failures share one context"
    with_self = PrivilegeConfig(kind="demonstration", exclude_self=False)
    assert texts(made(with_self, rollouts, verdicts)) == ["r1"] * 4 + ["only", "only", None]
    lower = PrivilegeConfig(kind="demonstration", threshold=0.5)
    assert texts(made(lower, rollouts[:4], verdicts[:4])) == ["r1", "w2", "r1", "r1"]


def test_a_success_is_a_right_answer_and_with_a_threshold_a_score():
    rollouts = group(PROBLEMS[0], ["formatted", "right", "cut", "late"])
    verdicts = [Verdict(1.0, "wrong"), Verdict(0.8, "right"), Verdict(None, "right"), Verdict(1.0, "timeout")]
    assert texts(made(PrivilegeConfig(kind="demonstration"), rollouts, verdicts)) == ["right", None, "right", "right"]
    scored = PrivilegeConfig(kind="demonstration", threshold=1.0)
    assert texts(made(scored, rollouts, verdicts)) == ["late", "formatted", "formatted", "formatted"]


def test_the_choice_of_a_demonstration():
    rollouts = group(PROBLEMS[0], ["w", "r1", "r2", "r3"], lengths=[1, 9, 4, 4])
    verdicts = scores(0.0, 1.0, 1.0, 1.0)
    shortest = PrivilegeConfig(kind="demonstration", choose="shortest")
    assert texts(made(shortest, rollouts, verdicts)) == ["r2", "r2", "r3", "r2"]
    chance = PrivilegeConfig(kind="demonstration", choose="random")
    drawn = [texts(made(chance, rollouts, verdicts, step=step)) for step in range(30)]
    assert {row[0] for row in drawn} == {"r1", "r2", "r3"}
    assert all(row[i] != f"r{i}" for row in drawn for i in (1, 2, 3))
    assert drawn[7] == texts(made(chance, rollouts, verdicts, step=7))


def test_the_order_of_a_batch_changes_nothing():
    rollouts = group(PROBLEMS[0], ["w", "r1", "r2"]) + group(PROBLEMS[1], ["r", "w", "r2"])
    verdicts = scores(0, 1, 1) + scores(1, 0, 1)
    for kind in ("demonstration", "wrong", "other_problem"):
        config = PrivilegeConfig(kind=kind, choose="random")
        expected = texts(made(config, rollouts, verdicts))
        for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
            got = texts(made(config, [rollouts[i] for i in order], [verdicts[i] for i in order]))
            assert got == [expected[i] for i in order]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>a\nb</think>\n\n12", "12"),
        ("a</think> 12", "12"),
        ("<think>a</think>x<think>b</think> y", "x y"),
        ("12 <think>never closed", "12"),
        ("<think>never closed", None),
        ("plain ", "plain"),
    ],
)
def test_thinking_is_stripped_from_demonstrations(text: str, shown: str | None):
    rollouts = group(PROBLEMS[0], ["w", text])
    assert texts(made(PrivilegeConfig(kind="demonstration"), rollouts, scores(0, 1)))[0] == shown
    kept = made(PrivilegeConfig(kind="demonstration", strip_thinking=False), rollouts, scores(0, 1))
    assert texts(kept)[0] == text.strip()


def test_feedback_is_ones_own():
    verdicts = [Verdict(0.0, feedback="too small"), Verdict(1.0), Verdict(0.0, feedback="")]
    privileges = made(PrivilegeConfig(kind="feedback"), group(PROBLEMS[0], ["a", "b", "c"]), verdicts)
    assert texts(privileges) == ["too small", None, None]


# Controls.


def test_empty_is_the_students_prompt_exactly():
    render = renderer(SHOTS)
    [privilege] = made(PrivilegeConfig(kind="empty"), group(PROBLEMS[0], ["a"]), scores(0.0), renderer=render)
    assert privilege is not None and privilege.text == ""
    assert privilege.prompt == render.prompt(PROBLEMS[0])


def test_wrong_is_never_right_and_depends_on_seed_step_and_problem():
    rollouts = [r for problem in PROBLEMS for r in group(problem, ["a", "b"])]
    verdicts = scores(*[0.0] * len(rollouts))
    config = PrivilegeConfig(kind="wrong")
    drawn = [texts(made(config, rollouts, verdicts, step=step)) for step in range(20)]
    for row in drawn:
        assert all(text != rollout.problem.answer for text, rollout in zip(row, rollouts, strict=True))
        assert row[::2] == row[1::2], "one context per problem"
    assert len({tuple(row) for row in drawn}) == 20
    assert {text for row in drawn for text in row} == {"0", "1", "2", "3"}
    assert drawn[3] == texts(made(config, rollouts, verdicts, step=3))
    assert drawn[3] != texts(made(config, rollouts, verdicts, step=3, seed=1))


def test_wrong_means_another_answer_and_without_answers_another_text():
    config = PrivilegeConfig(kind="wrong", of="solution")
    drawn = {texts(made(config, group(PROBLEMS[0], ["a"]), scores(0.0), step=step))[0] for step in range(80)}
    assert drawn == {f"work {i}" for i in range(12) if i % 4}
    hints = [Problem(str(i), "?", columns={"hint": text}) for i, text in enumerate(("Same", "same ", "other"))]
    config = PrivilegeConfig(kind="wrong", of="hint")
    for step in range(20):
        rollouts = [rollout for problem in hints for rollout in group(problem, ["a"])]
        first, second, _ = texts(made(config, rollouts, scores(0, 0, 0), problems=hints, step=step))
        assert (first, second) == ("other", "other")


def test_other_problem_is_another_problems_true_privilege():
    config = PrivilegeConfig(kind="other_problem", of="solution")
    got = [texts(made(config, group(PROBLEMS[0], ["a"]), scores(0.0), step=step))[0] for step in range(80)]
    assert set(got) == {f"work {i}" for i in range(1, 12)}


def test_a_control_changes_the_query_alone():
    render = renderer(SHOTS)
    [right] = for_problems(PrivilegeConfig(), PROBLEMS[:1], PROBLEMS, render, seed=0, step=0)
    [wrong] = for_problems(control(PrivilegeConfig(), "wrong"), PROBLEMS[:1], PROBLEMS, render, seed=0, step=0)
    assert wrong is not None and wrong.text != PROBLEMS[0].answer
    assert decoded(wrong) == decoded(right).replace("Hint: the answer is 0.", f"Hint: the answer is {wrong.text}.")


def test_a_control_keeps_kind_and_template_of_what_it_controls():
    hint = PrivilegeConfig(kind="hint", column="info.clue", template="<{privilege}>")
    wrong = control(hint, "wrong")
    assert (wrong.kind, wrong.of, wrong.block("x")) == ("wrong", "hint", "<x>")
    assert control(wrong, "right") == hint.model_copy(update={"of": "hint"})
    assert control(PrivilegeConfig(kind="demonstration"), "right").kind == "demonstration"
    [shown] = for_problems(PrivilegeConfig(kind="demonstration"), PROBLEMS[:1], PROBLEMS, renderer(), seed=0, step=0)
    assert shown is not None and shown.text == "work 0"
    feedback = PrivilegeConfig(kind="feedback", template="Said: {privilege}")
    assert control(feedback, "right").block("12") == "Hint: the answer is 12."
    with pytest.raises(ValueError, match="feedback belongs to a rollout"):
        for_problems(feedback, PROBLEMS[:1], PROBLEMS, renderer(), seed=0, step=0)


# Budgets.

LONG = Problem(id="long", prompt="1 + 1", answer="2", solution=" ".join(f"step {i}" for i in range(12)))


def test_evidence_is_cut_at_its_end_marked_and_counted():
    total = len(TOKENIZER(LONG.solution)["input_ids"])
    config = PrivilegeConfig(kind="solution", max_tokens=10)
    [privilege] = made(config, group(LONG, ["a"]), scores(0.0))
    assert privilege is not None and privilege.cut == total - 10
    kept = privilege.text.removesuffix(" [...]")
    assert kept != privilege.text and LONG.solution is not None and LONG.solution.startswith(kept)
    assert len(TOKENIZER(kept)["input_ids"]) == 10
    assert "Question: 1 + 1\n" in decoded(privilege)
    metrics = describe([privilege, None])
    assert metrics["privilege/cut"] == 0.5 and metrics["privilege/cut_tokens"] == total - 10
    with_shots = made(config, group(LONG, ["a"]), scores(0.0), renderer=renderer([LONG]))
    assert with_shots[0] is not None and with_shots[0].cut == 2 * (total - 10), "a shot's evidence has the same budget"


def test_the_privileged_prompt_keeps_its_limit_and_its_question():
    free = made(PrivilegeConfig(kind="solution"), group(LONG, ["a"]), scores(0.0))[0]
    assert free is not None
    full = len(free.prompt.token_ids)
    total, fewest = len(TOKENIZER(LONG.solution)["input_ids"]), 0
    nothing_left = 0
    for limit in range(full + 1, 20, -1):
        config = PrivilegeConfig(kind="solution", max_prompt_length=limit)
        privilege = made(config, group(LONG, ["a"]), scores(0.0))[0]
        if privilege is None:
            nothing_left += 1
            continue
        assert not nothing_left, "once nothing fits, nothing fits below"
        assert len(privilege.prompt.token_ids) <= limit
        assert "Question: 1 + 1\n" in decoded(privilege) and decoded(privilege).endswith("\nAnswer:")
        assert (privilege.cut == 0) is (limit >= full)
        fewest = privilege.cut
        if privilege.cut > 1:
            assert len(privilege.prompt.token_ids) >= limit - 2, "no more is cut than must be"
    assert nothing_left and fewest == total - 1, "the last one that fits keeps a single token"


def test_overflow_is_an_error_or_no_privilege_where_that_is_asked():
    for limits in ({"max_tokens": 10}, {"max_prompt_length": 40}):
        rollouts, verdicts = group(LONG, ["a"]), scores(0.0)
        with pytest.raises(UserError, match=rf"privilege\.{next(iter(limits))}: problem long needs \d+ tokens"):
            made(PrivilegeConfig(kind="solution", on_overflow="error", **limits), rollouts, verdicts)
        assert made(PrivilegeConfig(kind="solution", on_overflow="drop", **limits), rollouts, verdicts) == [None]


# Before any model is loaded.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "answer"}, r"privilege\.kind: 'answer', but no problem has one; name its .*`data\.columns: {answer"),
        ({"kind": "solution"}, r"'solution', but no problem has one"),
        ({"kind": "hint"}, r"'hint', but no problem has one; name it: `privilege.column: NAME` \(columns: clue, level"),
        ({"kind": "hint", "column": "clues"}, r"privilege\.column: .*'clues'; did you mean 'clue'"),
        ({"kind": "wrong"}, r"privilege\.of: 'answer'"),
        ({"kind": "other_problem", "of": "demonstration"}, r"privilege\.of: 'demonstration'"),
    ],
)
def test_a_kind_that_the_data_cannot_give_is_refused(fields: dict[str, Any], message: str):
    bare = [Problem(id=str(i), prompt="?", columns={"clue": "c", "level": i}) for i in range(3)]
    with pytest.raises(UserError, match=message):
        check(PrivilegeConfig(**fields), bare)


def test_controls_need_something_to_draw_from():
    same = [Problem(id=str(i), prompt="?", answer=a) for i, a in enumerate((" 7", "7"))]
    with pytest.raises(UserError, match="all are the same"):
        check(PrivilegeConfig(kind="wrong"), same)
    with pytest.raises(UserError, match="at least two problems"):
        check(PrivilegeConfig(kind="other_problem"), same[:1])
    check(PrivilegeConfig(kind="other_problem"), same)


def test_what_the_data_can_give_passes():
    for fields in ({}, {"kind": "solution"}, {"kind": "hint", "column": "info.clue"}, {"kind": "demonstration"},
                   {"kind": "feedback"}, {"kind": "empty"}, {"kind": "wrong"}, {"kind": "other_problem"}):  # fmt: skip
        check(PrivilegeConfig(**fields), PROBLEMS)
    with pytest.raises(ValidationError, match=r"must contain {privilege}"):
        PrivilegeConfig(template="the answer")
