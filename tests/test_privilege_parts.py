"""Stage `privilege`: the nearest success, several kinds in one block, and K demonstrations."""

from __future__ import annotations

import difflib
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from own import make_home, recipe_of
from selftaught.assemble import lay_ground, make_batch, privileges_of
from selftaught.data import DataConfig, Renderer
from selftaught.errors import UserError
from selftaught.privilege import (
    PrivilegeConfig,
    block,
    build,
    check,
    control,
    describe,
    for_problems,
    longest,
    pieces,
    similarity,
)
from selftaught.records import Privilege, Problem, Prompt, Rollout, Sampling, Verdict
from selftaught.run import make_run
from test_privilege import PROBLEMS, SHOTS, TOKENIZER, decoded, group, made, renderer, scores, texts


def config(**fields: Any) -> PrivilegeConfig:
    return PrivilegeConfig(**{"kind": "demonstration", **fields})


def all_texts(privilege: Privilege | None) -> list[str]:
    return [] if privilege is None else [privilege.text, *(one.text for one in privilege.others)]


# The nearest success.


def lcs(one: list[str], other: list[str]) -> int:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_likeness_is_the_longest_common_subsequence_of_words():
    draw = random.Random(0)
    for _ in range(300):
        one, other = ([draw.choice("abcd7+") for _ in range(draw.randrange(12))] for _ in range(2))
        expected = 2 * lcs(one, other) / (len(one) + len(other)) if one and other else 0.0
        assert similarity(" ".join(one), " ".join(other)) == expected == similarity(" ".join(other), " ".join(one))
    assert similarity("12+30 = 42", "12 + 30=42") == 1.0
    assert similarity("42", "24") == 0.0
    assert similarity("\u56db\u5341\u4e8c", "\u56db\u5341") == 0.8  # scripts without blanks count signs


def test_the_nearest_success_is_shown_to_each_and_ties_go_to_the_first():
    shown = ["1 + 2 = 4", "three", "1 + 2 = 3", "2 + 1 = 3", "so 3"]
    rollouts, verdicts = group(PROBLEMS[0], shown), scores(0.0, 1.0, 1.0, 1.0, 1.0)
    assert texts(made(config(choose="nearest"), rollouts, verdicts)) == [
        "1 + 2 = 3", "1 + 2 = 3", "2 + 1 = 3", "1 + 2 = 3", "1 + 2 = 3"]  # fmt: skip
    assert texts(made(config(choose="nearest"), rollouts, verdicts))[1] == "1 + 2 = 3", "all are equally far from it"
    thinking = group(PROBLEMS[0], ["<think>so 3</think> three 3", "so 3", "three"])
    assert texts(made(config(choose="nearest"), thinking, scores(0.0, 1.0, 1.0)))[0] == "three"


def test_nearest_never_shows_a_rollout_its_own_text():
    rollouts, verdicts = group(PROBLEMS[0], ["a b", "a b", "a c", "x"]), scores(1.0, 1.0, 1.0, 0.0)
    assert texts(made(config(choose="nearest"), rollouts, verdicts)) == ["a c", "a c", "a b", "a b"]
    itself = made(config(choose="nearest", exclude_self=False), rollouts, verdicts)
    assert texts(itself) == ["a b", "a b", "a c", "a b"]
    assert texts(made(config(choose="nearest"), rollouts[:2], verdicts[:2])) == [None, None]


def test_nearest_is_cheap_on_long_texts():
    draw = random.Random(1)
    one, other = (" ".join(str(draw.randrange(50)) for _ in range(3000)) for _ in range(2))
    assert 0.2 < similarity(one, other) < 0.9
    assert similarity(one, one) == 1.0 and difflib.SequenceMatcher(None, one, one).ratio() == 1.0


# Several kinds in one block.

FULL = Problem(id="f", prompt="9 + 8", answer="17", solution="9 + 8 = 17.", columns={"hint": "count on from 9"})
BARE = Problem(id="b", prompt="1 + 1", answer="2")


def parts(*kinds: Any, **fields: Any) -> PrivilegeConfig:
    return PrivilegeConfig(parts=list(kinds), **fields)


def test_parts_stand_in_one_block_in_the_order_given():
    both = parts("answer", {"kind": "hint", "template": "({privilege})"})
    [privilege] = made(both, group(FULL, ["x"]), scores(0.0))
    assert decoded(privilege) == "Question: 9 + 8\nHint: the answer is 17.\n(count on from 9)\nAnswer:"
    assert (privilege.kind, privilege.text, privilege.missing) == ("parts", "17\ncount on from 9", 0)
    [turned] = made(parts("hint", "answer"), group(FULL, ["x"]), scores(0.0))
    assert decoded(turned) == "Question: 9 + 8\nHint: count on from 9\nHint: the answer is 17.\nAnswer:"
    assert block(both, FULL) == "Hint: the answer is 17.\n(count on from 9)"
    one = made(parts("answer"), group(FULL, ["x"]), scores(0.0), renderer=renderer(SHOTS))[0]
    alone = made(PrivilegeConfig(kind="answer"), group(FULL, ["x"]), scores(0.0), renderer=renderer(SHOTS))[0]
    assert one.prompt == alone.prompt


def test_a_missing_part_is_left_out_and_counted_and_without_any_there_is_no_privilege():
    rollouts = [*group(FULL, ["x"]), *group(BARE, ["x"]), *group(Problem(id="n", prompt="?"), ["x"])]
    privileges = made(parts("solution", "answer", "hint"), rollouts, scores(0.0, 0.0, 0.0))
    assert [p and p.missing for p in privileges] == [0, 2, None]
    assert decoded(privileges[1]) == "Question: 1 + 1\nHint: the answer is 2.\nAnswer:"
    metrics = describe(privileges)
    assert metrics["privilege/parts_missing"] == 1.0 and metrics["privilege/missing"] == pytest.approx(1 / 3)


def test_demonstration_and_feedback_are_parts_like_others():
    both = parts("demonstration", "feedback")
    shown = made(both, group(FULL, ["w", "r"]), scores(0.0, 1.0))
    assert texts(shown) == ["r\nfb 0", "fb 1"]
    assert [p.missing for p in shown] == [0, 1]


def test_one_budget_keeps_earlier_parts_first():
    def size(text: str) -> int:
        return len(TOKENIZER(text)["input_ids"])

    answer, solution, hint = size("17"), size("9 + 8 = 17."), size("count on from 9")
    for budget in range(1, answer + solution + hint + 1):
        [p] = made(parts("answer", "solution", "hint", max_tokens=budget), group(FULL, ["x"]), scores(0.0))
        assert p.cut == answer + solution + hint - budget
        shown = [line.removesuffix(" [...]") for line in p.text.split("\n")]
        kept, rest = [size(text) for text in shown], budget
        for whole, mine in itertools.zip_longest((answer, solution, hint), kept, fillvalue=0):
            assert mine == min(whole, rest)
            rest -= mine
        assert p.text.count(" [...]") == (budget not in (answer, answer + solution, answer + solution + hint))
        assert decoded(p).startswith("Question: 9 + 8\n")
    with pytest.raises(UserError, match=r"privilege\.max_tokens: problem f needs"):
        made(parts("answer", "hint", max_tokens=3, on_overflow="error"), group(FULL, ["x"]), scores(0.0))
    assert made(parts("answer", "hint", max_tokens=3, on_overflow="drop"), group(FULL, ["x"]), scores(0.0)) == [None]


def test_a_prompt_limit_cuts_the_last_part_first():
    [free] = made(parts("answer", "solution"), group(FULL, ["x"]), scores(0.0))
    seen = set()
    for limit in range(len(free.prompt.token_ids), 25, -1):
        [p] = made(parts("answer", "solution", max_prompt_length=limit), group(FULL, ["x"]), scores(0.0))
        if p is not None:
            assert len(p.prompt.token_ids) <= limit and "Question: 9 + 8\n" in decoded(p)
            assert p.text.startswith("17") or p.text.count("\n") == 0
            seen.add(p.text.count("\n"))
    assert seen == {0, 1}


def test_controls_of_a_composition():
    both = parts("solution", "answer", "feedback")
    wrong = control(both, "wrong")
    [p] = made(wrong, group(PROBLEMS[3], ["x"]), scores(0.0))
    number = p.text.split("\n")[0].removeprefix("work ")
    assert p.text == f"work {number}\n{int(number) % 4}" and int(number) % 4 != 3
    [empty] = made(control(both, "empty"), group(PROBLEMS[3], ["x"]), scores(0.0))
    assert empty.prompt == renderer().prompt(PROBLEMS[3])
    [right] = for_problems(control(both, "right"), PROBLEMS[3:4], PROBLEMS, renderer(), seed=0, step=0)
    assert right is not None and right.text == "work 3\n3"
    assert control(control(both, "wrong"), "right").parts == control(both, "right").parts
    only = control(parts("feedback"), "right")
    assert (only.kind, only.parts) == ("answer", ())
    again = PrivilegeConfig(kind="wrong", parts=["solution", "answer"])
    assert again == PrivilegeConfig(**again.model_dump()) and again.of == "parts"
    assert PrivilegeConfig(**both.model_dump()) == both


def test_wrong_differs_in_every_part():
    pool = [Problem(str(i), "?", answer=str(i), columns={"hint": "same" if i < 3 else "other"}) for i in range(4)]
    for step in range(20):
        [p] = made(control(parts("answer", "hint"), "wrong"), group(pool[0], ["x"]), scores(0.0), problems=pool,
                   step=step)  # fmt: skip
        assert p.text == "3\nother"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parts": ["answer"], "kind": "hint"}, r"privilege\.kind = 'hint': with parts, .*leave kind out"),
        ({"kind": "parts"}, r"privilege\.parts: there are none; give some"),
        ({"parts": ["answer"], "choose": "nearest"}, r"privilege\.choose: with parts, it belongs into the part"),
        ({"parts": ["wrong"]}, r"privilege\.parts\.0\.kind = 'wrong'"),
        ({"kind": "answer", "count": 3}, r"privilege\.count = 3: only demonstrations are several"),
        ({"parts": ["answer", "feedback"], "count": 2}, r"privilege\.count = 2: only demonstrations"),
        ({"kind": "demonstration", "count": 2, "combine": "sum"}, r"privilege\.combine = 'sum'"),
        ({"kind": "demonstration", "count": 0}, r"privilege\.count = 0"),
        ({"parts": [{"kind": "answer", "colum": "x"}]}, r"unknown key 'privilege\.parts\.0\.colum'.*'column'"),
    ],
)
def test_contradictions_are_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        make_run({"model": "m", "data": "x.jsonl", "reward": "numeric", "method": "opsd", "privilege": fields})


def test_a_part_that_no_problem_has_is_refused_by_its_place():
    with pytest.raises(UserError, match=r"privilege\.parts\.1\.kind: 'hint', but no problem has one"):
        check(parts("answer", "hint"), PROBLEMS)
    with pytest.raises(UserError, match=r"privilege\.parts\.1\.column: .*'info.clu'"):
        check(parts("answer", {"kind": "hint", "column": "info.clu"}), PROBLEMS)
    check(parts("answer", {"kind": "hint", "column": "info.clue"}, "feedback", "demonstration"), PROBLEMS)
    with pytest.raises(UserError, match="of feedback, which only a rollout has"):
        check(PrivilegeConfig(kind="wrong", parts=["feedback"]), PROBLEMS)


# K demonstrations.


def test_k_demonstrations_are_different_others_and_as_many_as_there_are():
    rollouts = group(PROBLEMS[0], ["w", "r1", "r2", "r1", "r3"])
    verdicts = scores(0.0, 1.0, 1.0, 1.0, 1.0)
    shown = made(config(count=3), rollouts, verdicts)
    assert [all_texts(p) for p in shown] == [
        ["r1", "r2", "r3"], ["r2", "r1", "r3"], ["r1", "r3"], ["r1", "r2", "r3"], ["r1", "r2"]]  # fmt: skip
    assert all_texts(made(config(count=2), rollouts, verdicts)[0]) == ["r1", "r2"]
    assert [all_texts(p) for p in made(config(count=9), rollouts[:2], verdicts[:2])] == [["r1"], []]
    metrics = describe(shown)
    assert metrics["privilege/teachers"] == 13 / 5 and metrics["privilege/contexts"] == 3
    near = made(config(count=2, choose="nearest"), group(PROBLEMS[0], ["a b c", "a b x", "z", "a z"]),
                scores(0.0, 1.0, 1.0, 1.0))  # fmt: skip
    assert all_texts(near[0]) == ["a b x", "a z"]


def test_together_they_stand_in_one_prompt_under_one_budget():
    rollouts, verdicts = group(PROBLEMS[0], ["w", "first one", "second one"]), scores(0.0, 1.0, 1.0)
    one = made(config(count=2, combine="together"), rollouts, verdicts)[0]
    assert decoded(one) == ("Question: 0 + 1\nA correct solution: first one\nA correct solution: second one\nAnswer:")
    assert not one.others
    budget = len(TOKENIZER("first one")["input_ids"]) + 1
    cut = made(config(count=2, combine="together", max_tokens=budget), rollouts, verdicts)[0]
    assert cut.text.startswith("first one\ns") and cut.text.endswith(" [...]") and cut.cut > 0


def test_other_parts_stand_beside_each_demonstration():
    rollouts, verdicts = group(PROBLEMS[3], ["w", "r1", "r2"]), scores(0.0, 1.0, 1.0)
    shown = made(parts("answer", "demonstration", count=2), rollouts, verdicts)
    assert [all_texts(p) for p in shown] == [["3\nr1", "3\nr2"], ["3\nr2"], ["3\nr1"]]
    nobody = made(parts("answer", "demonstration", count=2), rollouts, scores(0.0, 0.0, 0.0))
    assert [all_texts(p) for p in nobody] == [["3"]] * 3 and nobody[0].missing == 1


def test_two_that_are_the_same_once_cut_count_once():
    rollouts, verdicts = group(PROBLEMS[0], ["w", "one two three four", "one two three five"]), scores(0.0, 1.0, 1.0)
    assert [len(all_texts(p)) for p in made(config(count=2, max_tokens=3), rollouts, verdicts)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["wrong", "other_problem", "empty"])
def test_the_resolved_form_of_a_composition_becomes_its_control_by_its_kind_alone(kind: str):
    whole = parts("answer", {"kind": "hint", "template": "({privilege})"})
    changed = PrivilegeConfig(**{**whole.model_dump(), "kind": kind})
    assert changed.parts == whole.parts and pieces(changed) == ((), whole.parts)[kind != "empty"]
    assert PrivilegeConfig(**changed.model_dump()) == changed
    assert PrivilegeConfig(**{**changed.model_dump(), "kind": "parts"}).parts == whole.parts


def test_controls_draw_k_others():
    wrong = PrivilegeConfig(kind="wrong", of="demonstration", count=3)
    p = made(wrong, group(PROBLEMS[0], ["x", "y"]), scores(0.0, 1.0))[0]
    drawn = all_texts(p)
    assert len(set(drawn)) == 3 and all(int(text.removeprefix("work ")) % 4 for text in drawn)
    none = made(control(wrong, "empty"), group(PROBLEMS[0], ["x", "y"]), scores(0.0, 1.0))[0]
    assert none.prompt == renderer().prompt(PROBLEMS[0]) and not none.others


@pytest.mark.parametrize("kind", ["wrong", "other_problem", "empty"])
def test_a_control_of_demonstrations_leaves_those_without_a_teacher_whom_demonstrations_leave(kind: Any):
    """Else a control would differ in whom it teaches too, and say nothing of what was shown."""
    every = [scores(0.0, 0.0, 1.0), scores(0.0, 0.0, 0.0), scores(1.0, 1.0, 0.0)]
    rollouts = [rollout for problem in PROBLEMS[:3] for rollout in group(problem, ["x", "y", "z"])]
    verdicts = [verdict for each in every for verdict in each]
    shown = made(config(), rollouts, verdicts)
    controlled = made(config(kind=kind, of="demonstration"), rollouts, verdicts)
    assert [one is None for one in controlled] == [one is None for one in shown]
    assert [one is None for one in shown] == [False, False, True, True, True, True, False, False, False]
    assert None not in made(config(kind=kind, of="answer"), rollouts, verdicts)


def test_siblings_with_one_text_are_one_or_count_each():
    rollouts, verdicts = group(PROBLEMS[0], ["a", "a", "b", "a", "x"]), scores(1.0, 1.0, 1.0, 1.0, 0.0)
    one = made(config(count=4), rollouts, verdicts)
    assert [sorted(all_texts(p)) for p in one] == [["a", "b"]] * 2 + [["a"]] + [["a", "b"]] * 2
    each = made(config(count=4, distinct=False), rollouts, verdicts)
    assert [sorted(all_texts(p)) for p in each] == [["a", "a", "b"]] * 2 + [["a"] * 3] + [["a", "a", "b"]] + [
        ["a", "a", "a", "b"]]  # fmt: skip
    near = made(config(choose="nearest", distinct=False), rollouts, verdicts)
    assert texts(near) == ["a", "a", "a", "a", "a"], "another that wrote the same is the nearest"
    alone = made(config(choose="nearest", distinct=False), rollouts[2:3], verdicts[2:3])
    assert texts(alone) == [None], "but never the rollout itself"
    shares = {k: 0 for k in "ab"}
    for problem in PROBLEMS:
        drawn = made(config(choose="random", distinct=False), group(problem, ["a", "a", "a", "b", "x"]), verdicts)
        shares[texts(drawn)[4]] += 1
    assert shares["a"] > shares["b"] > 0


def test_the_longest_prompt_counts_what_rollouts_will_write():
    def size(config: PrivilegeConfig, written: str) -> int:
        rollouts = group(PROBLEMS[3], ["w", *(f"{written} {written}" + "!" * i for i in range(3))])
        found = [p for p in made(config, rollouts, scores(0.0, 1.0, 1.0, 1.0)) if p is not None]
        return max(len(one.prompt.token_ids) for p in found for one in (p, *p.others))

    text = "the quick brown fox"
    tokens = len(TOKENIZER(f"{text} {text}!!")["input_ids"])
    for one in (config(), config(count=3), config(count=3, combine="together"), parts("answer", "demonstration"),
                parts("answer", "demonstration", count=3, combine="together"), config(max_tokens=5),
                parts("answer", "demonstration", max_tokens=6), config(max_prompt_length=30)):  # fmt: skip
        bound = longest(one, PROBLEMS[3:4], PROBLEMS, renderer(), seed=0, written=tokens)
        assert size(one, text) <= bound <= size(one, text) + 8, one
    assert longest(parts("feedback"), PROBLEMS, PROBLEMS, renderer(), seed=0, written=None) == max(
        len(p.prompt.token_ids) for p in made(PrivilegeConfig(), [r for q in PROBLEMS for r in group(q, ["x"])],
                                              scores(*[0.0] * 12)))  # fmt: skip


@pytest.mark.parametrize("kind", ["wrong", "other_problem"])
@pytest.mark.parametrize("fields", [
    {"of": "demonstration", "count": 4, "combine": "together"}, {"of": "demonstration", "count": 4}, {"of": "solution"},
    {"parts": ["answer", "demonstration"], "count": 3, "combine": "together"}, {"of": "solution", "max_tokens": 3},
], ids=str)  # fmt: skip
def test_the_longest_prompt_of_a_control_is_that_of_whom_it_may_draw(kind: str, fields: dict[str, Any]):
    problems = [replace(p, solution="work " * i + str(i)) for i, p in enumerate(PROBLEMS)]
    one = PrivilegeConfig(kind=kind, **fields)
    found = [p for step in range(12) for p in for_problems(one, problems[:6], problems, renderer(), seed=0, step=step)]
    drawn = max(len(each.prompt.token_ids) for p in found if p is not None for each in (p, *p.others))
    bound = longest(one, problems[:6], problems, renderer(), seed=0, written=1)
    assert drawn <= bound <= drawn + 12


def test_an_empty_control_is_measured_as_it_is():
    plain = max(len(renderer().prompt(problem).token_ids) for problem in PROBLEMS)
    assert longest(PrivilegeConfig(kind="empty"), PROBLEMS, PROBLEMS, renderer(), seed=0, written=1) == plain


def test_evidence_is_cut_to_the_room_that_the_context_leaves():
    rollouts, verdicts = group(PROBLEMS[0], ["x"]), [Verdict(0.0, feedback="again and again " * 50)]
    for fields, room, fits in (({}, None, False), ({}, 90, True), ({"max_prompt_length": 80}, 90, True),
                               ({"max_prompt_length": 120}, 90, True)):  # fmt: skip
        one = PrivilegeConfig(kind="feedback", **fields)
        [privilege] = build(one, rollouts, verdicts, PROBLEMS, renderer(), seed=0, step=0, room=room)
        assert privilege is not None
        most = min(fields.get("max_prompt_length", 90), room or 90)
        assert (most - 3 <= len(privilege.prompt.token_ids) <= most) == fits == (privilege.cut > 0)
    drop = PrivilegeConfig(kind="feedback", on_overflow="drop")
    assert build(drop, rollouts, verdicts, PROBLEMS, renderer(), seed=0, step=0, room=90) == [None]
    stop = PrivilegeConfig(kind="feedback", on_overflow="error")
    with pytest.raises(UserError, match=r"the limit is 90; the context and optim\.token_budget leave no more beside a"):
        build(stop, rollouts, verdicts, PROBLEMS, renderer(), seed=0, step=0, room=90)


def test_feedback_of_any_length_stays_within_the_models_context(tmp_path: Path):
    home = make_home(tmp_path)
    recipe = recipe_of(home, method={"name": "opsd"}, privilege={"kind": "feedback"},
                       optim={"token_budget": 4000}, rollout={"max_completion_length": 10})  # fmt: skip
    ground = lay_ground(make_run(recipe), lambda line: None)
    assert ground.rewarder is not None
    ground.rewarder.close()
    rollouts = group(ground.dataset.train[0], ["x"])
    [privilege] = privileges_of(ground, rollouts, [Verdict(0.0, feedback="quite wrong, " * 400)], 0)
    assert privilege is not None and privilege.cut > 0
    assert 480 < len(privilege.prompt.token_ids) <= 512 - 10


def test_a_batch_holds_the_prompts_of_every_teacher():
    rollouts = [Rollout(PROBLEMS[0], i, Prompt((1,)), (7,), (0.0,), text, "stop", Sampling(), 0, 0)
                for i, text in enumerate(["w", "r1", "r2"])]  # fmt: skip
    verdicts = [Verdict(0.0), Verdict(1.0, "right"), Verdict(1.0, "right")]
    privileges = made(config(count=4), rollouts, verdicts)
    batch = make_batch(rollouts, verdicts, privileges, 0)
    assert batch.tokens.privileges is not None and batch.tokens.privileges.tolist() == [2, 1, 1]
    assert set(batch.contexts) == {"plain", "privileged", "privileged.1"}
    assert batch.contexts["privileged.1"] == (privileges[0].others[0].prompt.token_ids, (), ())


# The thinking switch.


def test_the_teacher_may_think_where_the_student_does_not():
    off = Renderer(TOKENIZER, DataConfig(source="x.jsonl", template="chat", thinking=False), SHOTS)  # type: ignore[arg-type]
    on = Renderer(TOKENIZER, DataConfig(source="x.jsonl", template="chat", thinking=True), SHOTS)  # type: ignore[arg-type]
    closed = "<think>\n\n</think>\n\n"
    [thinks] = made(PrivilegeConfig(thinking=True), group(FULL, ["x"]), scores(0.0), renderer=off)
    [alike] = made(PrivilegeConfig(), group(FULL, ["x"]), scores(0.0), renderer=on)
    assert thinks.prompt == alike.prompt and closed not in decoded(thinks)
    [same] = made(PrivilegeConfig(), group(FULL, ["x"]), scores(0.0), renderer=off)
    assert decoded(same) == decoded(thinks) + closed
    [empty] = made(PrivilegeConfig(kind="empty", thinking=True), group(FULL, ["x"]), scores(0.0), renderer=off)
    assert empty.prompt == on.prompt(FULL) != off.prompt(FULL)
    assert off.has_thinking_switch(FULL)
    assert not renderer().has_thinking_switch(FULL), "a completion has none"
    assert off.seam(FULL, "b", ["", ""], True).endswith("assistant\n")


def test_a_template_without_the_switch_is_refused_on_the_ground(tmp_path: Path):
    home = make_home(tmp_path)
    recipe = recipe_of(home, method={"name": "opsd"}, privilege={"thinking": False})
    with pytest.raises(UserError, match=r"privilege\.thinking = false: the prompt has no such switch"):
        lay_ground(make_run(recipe), lambda line: None)
