"""Science questions as published: what is read, that the right letter stays the right option, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from science_rows import gpqa_row, right_text, sciknoweval_row, write_csv, write_jsonl
from selftaught.data import DataConfig, Dataset, load
from selftaught.errors import UserError
from selftaught.records import Problem

FOUR = tuple(sciknoweval_row(number) for number in range(40))


def loaded(source: str, *, seed: int = 0, heldout: int = 0, **fields: Any) -> tuple[Dataset, list[str]]:
    said: list[str] = []
    return load(DataConfig(source=source, heldout=heldout, **fields), seed=seed, say=said.append), said


def options(problem: Problem) -> dict[str, str]:
    """Letter -> text, as the prompt lists them."""
    assert isinstance(problem.prompt, str)
    return dict(re.findall(r"^([A-J]): (.*)$", problem.prompt.partition("\n\n")[2], re.M))


def number_of(problem: Problem) -> int:
    assert isinstance(problem.prompt, str)
    found = re.search(r"has (\d+) joules", problem.prompt)
    assert found
    return int(found[1])


def test_every_letter_stays_true_and_the_order_depends_on_seed_and_problem_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", FOUR)
    backwards = write_jsonl(tmp_path / "b.jsonl", reversed(FOUR))
    orders: dict[int, dict[str, list[str]]] = {}
    for seed in range(3):
        dataset, _ = loaded(f"sciknoweval:{path}?domain=Physics&level=L3", seed=seed)
        assert len(dataset.train) == 40
        for problem in dataset.train:
            assert options(problem)[problem.answer or ""] == right_text(number_of(problem))
            row = FOUR[number_of(problem)]
            assert sorted(options(problem).values()) == sorted(row["choices"]["text"])
            assert problem.columns["details"] == row["details"]
        orders[seed] = {problem.id: list(options(problem).values()) for problem in dataset.train}
        again, _ = loaded(f"sciknoweval:{backwards}?domain=Physics", seed=seed)
        assert {problem.id: list(options(problem).values()) for problem in again.train} == orders[seed]
    assert orders[0].keys() == orders[1].keys() == orders[2].keys()  # the id is not of the order
    differ = [sum(orders[a][p] != orders[b][p] for p in orders[0]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert all(count > 25 for count in differ)  # 23 of 24 orders are other ones: 38 of 40 expected


def test_all_orders_of_the_options_are_as_likely(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", (sciknoweval_row(number) for number in range(2400)))
    dataset, _ = loaded(f"sciknoweval:{path}")
    ranks: Counter[tuple[int, ...]] = Counter()
    for problem in dataset.train:
        texts = sciknoweval_row(number_of(problem))["choices"]["text"]
        ranks[tuple(texts.index(text) for text in options(problem).values())] += 1
    assert len(ranks) == 24
    chi_squared = sum((count - 100) ** 2 / 100 for count in ranks.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001
    letters = Counter(problem.answer for problem in dataset.train)
    assert all(abs(count - 600) < 80 for count in letters.values())


def test_gpqa_has_its_right_option_anywhere_its_explanation_as_solution_and_its_domains(tmp_path: Path) -> None:
    rows = [*(gpqa_row(number) for number in range(40)), *(gpqa_row(number, "Biology") for number in range(40, 50))]
    path = write_csv(tmp_path / "gpqa_extended.csv", rows)
    dataset, said = loaded(f"gpqa:{path}?domain=Physics")
    assert len(dataset.train) == 40 and "40 of 50 rows of gpqa (domain Physics)" in said[0]
    letters = Counter(problem.answer for problem in dataset.train)
    assert set(letters) == set("ABCD") and max(letters.values()) < 20
    for problem in dataset.train:
        number = number_of(problem)
        assert options(problem)[problem.answer or ""] == right_text(number)
        assert problem.solution == f"{number} and one is {number + 1}."
    only, _ = loaded(f"gpqa:{path}?subdomain=Biology (general)")
    assert sorted(map(number_of, only.train)) == list(range(40, 50))


def test_only_multiple_choice_of_the_level_and_domain_is_read(tmp_path: Path) -> None:
    rows = [sciknoweval_row(0), sciknoweval_row(1, kind="mcq-2-choices"), sciknoweval_row(2, level="L1"),
            sciknoweval_row(3, domain="Material"), sciknoweval_row(4, kind="open-ended-qa"),
            sciknoweval_row(5, kind="true_or_false")]  # fmt: skip
    path = write_jsonl(tmp_path / "q.jsonl", rows)

    def numbers(query: str) -> list[int]:
        return sorted(map(number_of, loaded(f"sciknoweval:{path}{query}")[0].train))

    assert numbers("?domain=physics&level=L3") == [0, 1] == numbers("?domain=Physics&level=l3")
    assert numbers("") == [0, 1, 2, 3]
    assert numbers("?type=mcq-2-choices") == [1] and numbers("?domain=Materials") == [3]
    assert numbers("?domain=Physics,Material&level=L3") == [0, 1, 3] and numbers("?subtask=plus one&level=L1") == [2]


def test_the_level_may_stand_at_the_top_and_choices_may_be_a_list_or_json(tmp_path: Path) -> None:
    pairs = [{"label": label, "text": text} for label, text in zip("ABCD", FOUR[1]["choices"]["text"], strict=True)]
    rows = [{**sciknoweval_row(0), "level": "L3", "details": None}, sciknoweval_row(1, choices=pairs),
            sciknoweval_row(2, choices=json.dumps(FOUR[2]["choices"]), answerKey=" c ")]  # fmt: skip
    dataset, _ = loaded(f"sciknoweval:{write_jsonl(tmp_path / 'q.jsonl', rows)}?level=L3")
    assert sorted(map(number_of, dataset.train)) == [0, 1, 2]
    assert all(options(p)[p.answer or ""] == right_text(number_of(p)) for p in dataset.train)


def test_damaged_rows_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    four = FOUR[0]["choices"]["text"]
    rows = [sciknoweval_row(0), sciknoweval_row(1, choices={"text": four, "label": ["A", "B"]}),
            sciknoweval_row(2, answerKey="E"), sciknoweval_row(3, choices=None), sciknoweval_row(4, question=" "),
            sciknoweval_row(5, choices={"text": ["x", "x", "y"], "label": list("ABC")}, answerKey="A"),
            sciknoweval_row(6, choices={"text": ["x", ""], "label": list("AB")}, answerKey="A"), sciknoweval_row(7)]
    dataset, said = loaded(f"sciknoweval:{write_jsonl(tmp_path / 'q.jsonl', rows)}")
    assert sorted(map(number_of, dataset.train)) == [0, 7]
    assert "2 of 8 rows" in said[0] and "6 left out: line 2 has 4 options under 2 labels; line 3" in said[0]
    assert "'E' among the labels A, B, C, D" in said[0]


def test_one_question_with_its_options_in_two_orders_is_one_problem(tmp_path: Path) -> None:
    turned = {"text": FOUR[3]["choices"]["text"][::-1], "label": list("ABCD")}
    rows = [*FOUR, {**FOUR[3], "choices": turned, "answerKey": "A"}]  # line 4 has its right option last
    dataset, said = loaded(f"sciknoweval:{write_jsonl(tmp_path / 'q.jsonl', rows)}")
    assert len(dataset.train) == 40 and "1 duplicates collapsed" in said[1] and "several answers" not in said[1]


def test_options_that_point_at_others_keep_their_order_and_the_above_stays_last(tmp_path: Path) -> None:
    def choices(*texts: str) -> dict[str, Any]:
        return {"text": list(texts), "label": list("ABCD"[: len(texts)])}

    rows = [sciknoweval_row(number, choices=choices("iron", "gold", "lead", "None of the above"), answerKey="B")
            for number in range(20)]  # fmt: skip
    rows += [sciknoweval_row(number, choices=choices("iron", "gold", "Both A and B", "lead"), answerKey="C")
             for number in range(20, 30)]  # fmt: skip
    rows += [sciknoweval_row(number, choices=choices("iron", "all of the above", "gold"), answerKey="B")
             for number in range(30, 40)]  # fmt: skip
    dataset, said = loaded(f"sciknoweval:{write_jsonl(tmp_path / 'q.jsonl', rows)}")
    assert "20 keep the order of their options" in said[0]
    shown = {number_of(problem): (list(options(problem).values()), problem.answer) for problem in dataset.train}
    assert all(shown[n] == (["iron", "gold", "Both A and B", "lead"], "C") for n in range(20, 30))
    assert all(shown[n] == (["iron", "all of the above", "gold"], "B") for n in range(30, 40))
    assert {tuple(shown[n][0][3:]) for n in range(20)} == {("None of the above",)}
    assert {shown[n][1] for n in range(20)} == {"A", "B", "C"}
    in_order, _ = loaded(f"sciknoweval:{tmp_path / 'q.jsonl'}?shuffle=false")
    assert all(options(p)["A"] == "iron" for p in in_order.train)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?domian=Physics", "no key 'domian'.*did you mean 'domain'"),
        ("?domain=Geology", r"has the domain 'Geology'; there are Physics \(40 rows\)"),
        ("?domain=Physics,Geology", "has the domain 'Geology'"),
        ("?domain=", "has no value"),
        ("?shuffle=no", "it is true or false"),
        ("?type=essay", "has the type 'essay'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(query: str, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", FOUR)
    with pytest.raises(UserError, match=message):
        loaded(f"sciknoweval:{path}{query}")


@pytest.mark.parametrize("missing", ["question", "choices", "answerKey", "type"])
def test_a_missing_column_is_named(missing: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{k: v for k, v in row.items() if k != missing} for row in FOUR])
    with pytest.raises(UserError, match=rf"has no column '{missing}' \(columns: .*details"):
        loaded(f"sciknoweval:{path}")


def test_a_missing_column_of_gpqa_is_named_and_its_order_must_be_drawn(tmp_path: Path) -> None:
    rows = [gpqa_row(number) for number in range(4)]
    renamed = [{("Wrong 2" if k == "Incorrect Answer 2" else k): v for k, v in row.items()} for row in rows]
    with pytest.raises(UserError, match=r"has no column 'Incorrect Answer 2' \(columns: .*Wrong 2"):
        loaded(f"gpqa:{write_csv(tmp_path / 'a.csv', renamed)}")
    with pytest.raises(UserError, match="always lists the right one first"):
        loaded(f"gpqa:{write_csv(tmp_path / 'b.csv', rows)}?shuffle=false")
    with pytest.raises(UserError, match="but not where they are"):
        loaded("gpqa:?domain=Physics")
    with pytest.raises(UserError, match="leave `columns` out"):
        loaded(f"gpqa:{tmp_path / 'b.csv'}", columns={"prompt": "Question"})


def test_the_only_split_of_the_hub_is_asked_for_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def gives(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return list(FOUR) if "Sci" in name else [gpqa_row(number) for number in range(8)]

    monkeypatch.setattr(datasets, "load_dataset", gives)
    loaded("sciknoweval:owner/SciKnowEval?domain=Physics")
    loaded("sciknoweval:owner/SciKnowEval:v2", split="dev")
    loaded("gpqa:owner/gpqa:gpqa_extended")
    assert asked == [("owner/SciKnowEval", None, "test"), ("owner/SciKnowEval", "v2", "dev"),
                     ("owner/gpqa", "gpqa_extended", "train")]  # fmt: skip
