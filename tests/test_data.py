"""Stage `data`: what is read, inferred, split, ordered and rendered, and what is refused with one message."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selftaught.data import Cursor, DataConfig, Dataset, Part, Renderer, fit, load
from selftaught.errors import UserError
from selftaught.records import Problem
from tiny import tiny_tokenizer

SUMS = "gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=2&bare=true"


def quiet(_: str) -> None:
    """Nobody listens."""


def ids(problems: Any) -> list[str]:
    return [problem.id for problem in problems]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(n: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} times 3?", "answer": str(3 * i), "level": i % 5} for i in range(n)]


def everything(source: str, **fields: Any) -> Dataset:
    return load(DataConfig(source=source, heldout=0, **fields), seed=0, say=quiet)


def only(tmp_path: Path, row: dict[str, Any], **fields: Any) -> Problem:
    return everything(write(tmp_path / "one.jsonl", [row]), **fields).train[0]


# Reading.


def as_json(path: Path, data: list[dict[str, Any]]) -> str:
    path.with_suffix(".json").write_text(json.dumps(data))
    return str(path.with_suffix(".json"))


def as_csv(path: Path, data: list[dict[str, Any]]) -> str:
    import csv

    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(data[0]))
        writer.writeheader()
        writer.writerows(data)
    return str(path.with_suffix(".csv"))


def as_parquet(path: Path, data: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


def as_folder(path: Path, data: list[dict[str, Any]]) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(data).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("save", [as_json, as_csv, as_parquet, as_folder])
def test_every_format_gives_what_the_jsonl_gives(save: Callable[[Path, list[dict[str, Any]]], str], tmp_path: Path):
    data = [*rows(12), {"question": 'Commas, "quotes"\nand lines?', "answer": "yes, \u2028", "level": 7}]
    expected = everything(write(tmp_path / "a.jsonl", data))
    got = everything(save(tmp_path / "b", data))
    assert [(p.id, p.prompt, p.answer) for p in got.train] == [(p.id, p.prompt, p.answer) for p in expected.train]
    assert {str(p.columns["level"]) for p in got.train} == {"0", "1", "2", "3", "4", "7"}
    assert got.columns == {"prompt": "question", "answer": "answer"}


def test_a_saved_dict_of_splits_asks_for_one_that_is_there(tmp_path: Path):
    import datasets

    datasets.disable_progress_bars()
    parts = {"train": datasets.Dataset.from_list(rows(3)), "test": datasets.Dataset.from_list(rows(7))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert len(everything(str(tmp_path / "d"), split="test").train) == 7
    with pytest.raises(UserError, match=r"no split 'tests'; did you mean 'test'"):
        everything(str(tmp_path / "d"), split="tests")


def test_a_hub_name_goes_to_datasets_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch):
    import datasets

    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        return rows(3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(everything("openai/gsm8k:main", split="test").train) == 3
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither a file here nor a dataset.*no route$"):
        everything("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.json", "", "has no rows"),
        ("a.csv", "question,answer\n", "has no rows"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ' + "9" * 5000 + "}\n", "line 2 is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n[1, 2]\n', "line 2: expected an object"),
        ("a.json", '{"prompt": "a"}', "expected a list of objects"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', r"name it \.jsonl"),
        ("a.csv", "question,answer\nwhat, now?,3\n", "line 2 has 3 cells under 2"),
        ("a.txt", "hello", r"extension '\.txt'; known: \.jsonl"),
        ("a.parquet", "no", "not a readable Parquet file"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', r"line 2: the prompt \(column 'prompt'\) is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"answer": "3"}\n', r"line 2: the prompt \(column 'prompt'\) is empty"),
        ("a.jsonl", '{"text": "a", "gold": 2}\n', r"no prompt column .*columns: gold, text.*prompt: NAME"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1: the prompt is not valid Unicode"),
        ("a.jsonl", '{"prompt": [1, 2]}\n', "not one of chat messages"),
        ("a.jsonl", '{"messages": [{"role": "system", "content": "x"}]}\n', "line 1: no user message"),
    ],
)
def test_bad_files_are_refused_with_their_place(name: str, content: str, message: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        everything(str(tmp_path / name))


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"not UTF-8 text \(line 2\)"):
        everything(str(tmp_path / "a.jsonl"))


def test_missing_files_foreign_folders_and_splits_of_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no file"):
        everything(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="no file"):
        everything("none.jsonl")
    with pytest.raises(UserError, match="not one written by"):
        everything(str(tmp_path))
    with pytest.raises(UserError, match=r"data\.split: 'test' was given"):
        everything(write(tmp_path / "a.jsonl", rows(2)), split="test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "Q: question"}, "must contain {question}"),
        ({"columns": {"promt": "text"}}, "unknown name 'promt'"),
        ({"source": []}, "at least one source"),
        ({"trian": 3}, "Extra inputs"),
    ],
)
def test_a_wrong_section_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{"source": "a.jsonl", **fields})


# Columns.


def test_columns_are_inferred_in_order_and_said_in_one_line(tmp_path: Path):
    said: list[str] = []
    row = {"query": "q", "problem": "p", "reward_model": {"ground_truth": 7}, "data_source": "x", "index": 4}
    source = write(tmp_path / "verl.jsonl", [row])
    data = load(DataConfig(source=source, heldout=0), seed=0, say=said.append)
    assert (data.train[0].prompt, data.train[0].answer, data.train[0].solution) == ("p", "7", None)
    assert data.train[0].columns == row, "every column reaches the reward, by the source's own names"
    assert said[0].endswith("1 rows, prompt <- problem, answer <- reward_model.ground_truth, solution <- none")
    assert data.notes == tuple(said)


def test_columns_can_be_said_and_a_wrong_name_names_the_nearest(tmp_path: Path):
    row = {"prompt": "no", "info": {"text": "yes"}, "gold": 1.5}
    problem = only(tmp_path, row, columns={"prompt": "info.text", "answer": "gold"})
    assert (problem.prompt, problem.answer) == ("yes", "1.5")
    with pytest.raises(UserError, match=r"data\.columns\.answer.*'golds'; did you mean 'gold'"):
        only(tmp_path, row, columns={"answer": "golds"})


def test_a_solution_is_the_answer_where_there_is_no_answer(tmp_path: Path):
    problem = only(tmp_path, {"prompt": "a", "solution": "$x$"})
    assert (problem.answer, problem.solution) == ("$x$", "$x$")


def test_gsm8k_answers_are_taken_apart(tmp_path: Path):
    text = "48/2 = 24 clips.\n48+24 = 72.\n#### 72"
    problem = only(tmp_path, {"question": "How many?", "answer": text})
    assert (problem.answer, problem.solution) == ("72", text)


def test_chat_messages_lose_the_trailing_answer_and_nothing_else(tmp_path: Path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "2?"}]},
    ]
    problem = only(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "two"}]})
    assert problem.answer == "two"
    assert [dict(m) for m in problem.prompt if isinstance(m, dict)] == [*turns[:3], {"role": "user", "content": "2?"}]
    assert problem.id == only(tmp_path, {"prompt": turns}).id


# The split.


def test_the_split_has_no_overlap_and_does_not_know_the_order_of_the_file(tmp_path: Path):
    data = rows(60)
    first = write(tmp_path / "a.jsonl", data)
    random.Random(3).shuffle(data)
    second = write(tmp_path / "b.jsonl", data)
    a, b = (load(DataConfig(source=s, heldout=20, shots=4), seed=5, say=quiet) for s in (first, second))
    assert (ids(a.train), ids(a.heldout), ids(a.shots)) == (ids(b.train), ids(b.heldout), ids(b.shots))
    assert (len(a.train), len(a.heldout), len(a.shots)) == (36, 20, 4)
    assert len({*ids(a.train), *ids(a.heldout), *ids(a.shots)}) == 60
    other = load(DataConfig(source=first, heldout=20, shots=4), seed=6, say=quiet)
    assert set(ids(other.heldout)) != set(ids(a.heldout))
    fewer = load(DataConfig(source=first, heldout=20, shots=4, train=5), seed=5, say=quiet)
    assert (ids(fewer.heldout), ids(fewer.train)) == (ids(a.heldout), ids(a.train)[:5])


def test_duplicates_collapse_aloud_and_the_one_kept_does_not_depend_on_the_order(tmp_path: Path):
    data = [*rows(10), {"question": "What is  3 times 3?\n", "answer": "nine"}]
    said: list[str] = []
    kept = []
    for name, order in (("a", data), ("b", data[::-1])):
        source = write(tmp_path / f"{name}.jsonl", order)
        problems = load(DataConfig(source=source, heldout=2), seed=0, say=said.append)
        every = [*problems.train, *problems.heldout]
        assert len(every) == 10
        kept.append({problem.id: problem.answer for problem in every})
    assert kept[0] == kept[1]
    assert "1 duplicates collapsed, 1 of these problems had several answers" in said[0]


def test_more_problems_than_there_are_is_refused_with_the_numbers(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", rows(30))
    with pytest.raises(UserError, match=r"30 distinct problems, but 20 train \+ 10 held-out \+ 1 shots = 31"):
        load(DataConfig(source=source, train=20, heldout=10, shots=1), seed=0, say=quiet)
    with pytest.raises(UserError, match="30 distinct problems, but 1 train"):
        load(DataConfig(source=source, heldout=30), seed=0, say=quiet)


def test_a_mixture_follows_its_weights_and_tags_its_parts(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", rows(40))
    shared = {"q": rows(1)[0]["question"]}
    b = write(tmp_path / "b.jsonl", [{"q": f"spell {i}", "source": "web"} for i in range(90)] + [shared])
    parts = (Part(source=a, weight=1), Part(source=b, weight=3, columns={"prompt": "q"}))
    data = load(DataConfig(source=parts, train=80, heldout=8, shots=4), seed=0, say=quiet)
    assert Counter(p.columns["source"] for p in data.train) == {a: 20, b: 60}
    assert Counter(p.columns["source"] for p in data.heldout) == {a: 2, b: 6}
    for start in range(0, 80, 8):
        assert Counter(p.columns["source"] for p in data.train[start : start + 8]) == {a: 2, b: 6}
    assert {p.columns.get("source_column") for p in data.train if p.columns["source"] == b} == {"web"}
    assert data.columns == {"prompt": "question | q", "answer": "answer"}
    everything_left = load(DataConfig(source=parts, heldout=0), seed=0, say=quiet)
    assert Counter(p.columns["source"] for p in everything_left.train) == {a: 30, b: 90}, "the scarcest part decides"


# reasoning-gym.


def test_gym_problems_are_distinct_up_to_the_order_of_a_sum_and_scorable():
    import reasoning_gym

    data = load(DataConfig(source=SUMS + "&worked=true", train=400, heldout=64, shots=4), seed=0, say=quiet)
    every = [*data.train, *data.heldout, *data.shots]
    assert (len(data.train), len(data.heldout), len(data.shots)) == (400, 64, 4)

    def canonical(expression: str) -> tuple[int, ...]:
        terms = expression.replace("- ", "-").replace("+ ", "").split(" ")
        return tuple(sorted(int(term) for term in terms))

    assert len({canonical(str(p.prompt)) for p in every}) == 468
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for problem in every[:50]:
        entry = json.loads(json.dumps(problem.columns["entry"]))
        assert entry["metadata"]["source_dataset"] == "chain_sum"
        assert entry["metadata"]["expression"] == problem.prompt
        assert score(problem.answer, entry) == 1.0
        assert score("x", entry) == 0.0
        assert problem.solution is not None and problem.solution.endswith(f"The answer is {problem.answer}.")


def test_the_working_of_a_sum_is_right():
    from selftaught.data.gym import WORKED

    assert WORKED["chain_sum"]("7 + 1 + 9") == "7 + 1 = 8, 8 + 9 = 17. The answer is 17."
    assert WORKED["chain_sum"]("3 - 8 - -2") == "3 - 8 = -5, -5 - -2 = -3. The answer is -3."


@pytest.mark.parametrize(
    ("name", "metadata", "other", "equal"),
    [
        ("chain_sum", {"expression": "3 + 8"}, {"expression": "8 + 3"}, True),
        ("chain_sum", {"expression": "3 - 8"}, {"expression": "-8 + 3"}, True),
        ("chain_sum", {"expression": "3 - -8"}, {"expression": "8 + 3"}, True),
        ("chain_sum", {"expression": "3 - 8"}, {"expression": "8 - 3"}, False),
        ("chain_sum", {"expression": "1 + 38"}, {"expression": "13 + 8"}, False),
        ("products", {"expression": "3 * 8"}, {"expression": "8 * 3"}, True),
        ("basic_arithmetic", {"expression": "3 * 8 + 1"}, {"expression": "8 * 3 + 2"}, False),
        ("lcm", {"numbers": [4, 6]}, {"numbers": [6, 4]}, True),
        ("gcd", {"numbers": [4, 6]}, {"numbers": [46]}, False),
    ],
)
def test_canonical_content(name: str, metadata: dict[str, Any], other: dict[str, Any], equal: bool):
    from selftaught.data.gym import _canonical

    assert (_canonical(name, {"metadata": metadata}) == _canonical(name, {"metadata": other})) is equal


def test_gym_is_the_same_for_a_seed_and_nearly_new_for_the_next():
    def problems(seed: int, source: str = "gym:chain_sum?min_digits=3&bare=true") -> set[str]:
        data = load(DataConfig(source=source, train=200, heldout=20), seed=seed, say=quiet)
        return set(ids([*data.train, *data.heldout]))

    assert problems(0) == problems(0)
    assert len(problems(0) & problems(1)) < 5, "entry i of seed s is entry i - 1 of seed s + 1 in reasoning-gym itself"
    assert problems(0) == problems(0, "gym:chain_sum?min_digits=3"), "bare changes the words, not the problems"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gym:chain_sm", "no task 'chain_sm'; did you mean 'chain_sum'"),
        ("gym:chain_sum?min_term=2", "no parameter 'min_term'; did you mean 'min_terms'"),
        ("gym:chain_sum?min_terms=two", "expected int, such as 2"),
        ("gym:chain_sum?min_terms=2.5", "expected int"),
        ("gym:chain_sum?allow_negation=3", "expected bool"),
        ("gym:chain_sum?min_terms", "has no value"),
        ("gym:chain_sum?seed=3", "set by the recipe's `seed`"),
        ("gym:chain_sum?min_terms=5&max_terms=2", "max_terms must be >= min_terms"),
        ("gym:gcd?worked=true", "known for chain_sum alone"),
        ("gym:gcd?bare=true", "no expression"),
        ("gym:arc_agi", "cannot be scored from a saved entry"),
        ("gym:chain_sum?max_terms=2&max_digits=1", "145 distinct problems in .* and 2256 are needed"),
    ],
)
def test_gym_mistakes_are_refused_by_name(source: str, message: str):
    with pytest.raises(UserError, match=message):
        load(DataConfig(source=source), seed=0, say=quiet)


def test_a_mixture_of_gym_tasks_has_no_problem_twice():
    one = "gym:chain_sum?max_terms=2&max_digits=1"
    parts = (Part(source=one), Part(source=one + "&bare=true"))
    data = load(DataConfig(source=parts, train=100, heldout=20), seed=0, say=quiet)
    assert len({*ids(data.train), *ids(data.heldout)}) == 120


# The cursor.


def problems(n: int) -> list[Problem]:
    return [Problem(id=f"{i:03d}", prompt=f"p{i}", answer=str(i)) for i in range(n)]


def test_an_epoch_holds_every_problem_once_in_a_fresh_order():
    cursor = Cursor(problems(12), seed=0)
    epochs = [[p.id for _ in range(3) for p in cursor.next(4)] for _ in range(3)]
    assert all(sorted(epoch) == ids(problems(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ids(Cursor(problems(12)[::-1], seed=0).next(12)) == epochs[0], "the order of the list does not matter"
    assert ids(Cursor(problems(12), seed=1).next(12)) != epochs[0]


@pytest.mark.parametrize(("count", "n"), [(5, 3), (7, 4), (3, 3), (10, 7), (3, 2)])
def test_no_step_holds_a_problem_twice_and_all_come_equally_often(count: int, n: int):
    cursor = Cursor(problems(count), seed=2)
    seen: list[str] = []
    for _ in range(count * 6):
        step = ids(cursor.next(n))
        assert len(set(step)) == n
        seen += step
    assert set(Counter(seen).values()) == {6 * n}
    assert all(sorted(seen[i : i + count]) == ids(problems(count)) for i in range(0, len(seen), count))


@pytest.mark.parametrize("before", range(6))
def test_resume_is_exact_from_any_step(before: int):
    straight, saved = Cursor(problems(7), seed=4), Cursor(problems(7), seed=4)
    for _ in range(before):
        straight.next(3)
        saved.next(3)
    resumed = Cursor(problems(7), seed=4)
    resumed.load_state(json.loads(json.dumps(saved.state())))
    assert [ids(resumed.next(3)) for _ in range(9)] == [ids(straight.next(3)) for _ in range(9)]


def test_other_data_or_too_few_problems_are_refused():
    state = Cursor(problems(7), seed=4).state()
    with pytest.raises(UserError, match="not those of the saved run"):
        Cursor(problems(8), seed=4).load_state(state)
    with pytest.raises(UserError, match="not those of the saved run"):
        Cursor(problems(7), seed=5).load_state(state)
    with pytest.raises(UserError, match="9 problems a step, but there are only 8"):
        Cursor(problems(8), seed=4).next(9)


# Prompts.

SHOTS = (
    Problem(id="s1", prompt="7 + 1 + 9", answer="17", solution="7 + 1 = 8, 8 + 9 = 17. The answer is 17."),
    Problem(id="s2", prompt="2 + 2", answer="4"),
)
QUERY = Problem(id="q", prompt="5 + 6 {question}", answer="11")


def renderer(chat: bool, shots: tuple[Problem, ...] = SHOTS, tokenizer: Any = None, **fields: Any) -> tuple[Any, Any]:
    tokenizer = tokenizer or tiny_tokenizer(chat=chat)
    return Renderer(tokenizer, DataConfig(source="x.jsonl", **fields), shots), tokenizer


def text(tokenizer: Any, prompt: Any) -> str:
    return str(tokenizer.decode(list(prompt.token_ids)))


def test_the_completion_is_spelt_as_documented():
    render, tokenizer = renderer(chat=False)
    plain = (
        "Question: 7 + 1 + 9\nAnswer: 7 + 1 = 8, 8 + 9 = 17. The answer is 17.\n\n"
        "Question: 2 + 2\nAnswer: 4\n\nQuestion: 5 + 6 {question}\nAnswer:"
    )
    assert text(tokenizer, render.prompt(QUERY)) == plain
    assert list(render.prompt(QUERY).token_ids) == tokenizer(plain)["input_ids"], "tokenised once and whole"
    assert text(tokenizer, render.privileged(QUERY, "Hint: 11.", ["Hint: 17.\n", ""])) == (
        "Question: 7 + 1 + 9\nHint: 17.\nAnswer: 7 + 1 = 8, 8 + 9 = 17. The answer is 17.\n\n"
        "Question: 2 + 2\nAnswer: 4\n\nQuestion: 5 + 6 {question}\nHint: 11.\nAnswer:"
    )
    assert render.seam(QUERY, "Hint: 11.", ["", ""]).endswith("{question}\n[[+ Hint: 11.\n +]]Answer:")


def test_the_chat_is_what_apply_chat_template_makes():
    render, tokenizer = renderer(chat=True, system_prompt="Be brief.")
    turns = [
        ("system", "Be brief."),
        ("user", "7 + 1 + 9"),
        ("assistant", "7 + 1 = 8, 8 + 9 = 17. The answer is 17."),
        ("user", "2 + 2"),
        ("assistant", "4"),
        ("user", "5 + 6 {question}"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(render.prompt(QUERY).token_ids) == expected
    messages[3]["content"] += "\n\nHint: 4."
    messages[5]["content"] += "\n\nHint: 11."
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(render.privileged(QUERY, "Hint: 11.\n", ["", "Hint: 4."]).token_ids) == expected
    seam = render.seam(QUERY, "Hint: 11.", ["", ""])
    assert seam.endswith("{question}[[+ \n\nHint: 11. +]]<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_block_is_the_students_prompt_and_another_is_only_inserted(chat: bool, bos: bool):
    render, tokenizer = renderer(chat, tokenizer=tiny_tokenizer(chat=chat, bos=bos))
    odd = Problem(id="odd", prompt="A line\n\n \ue000[[+ 4 +]]\ue001  \n", answer="1")
    for problem in (QUERY, odd):
        assert render.privileged(problem, "", ["", " \n"]) == render.prompt(problem)
        blocks = ("1st é\ue000", "2nd", "3rd\n\n")
        teacher = text(tokenizer, render.privileged(problem, blocks[2], blocks[:2]))
        for block in blocks:
            inserted = f"\n\n{block.strip()}" if chat else f"{block.strip()}\n"
            assert teacher.count(inserted) == 1
            teacher = teacher.replace(inserted, "")
        assert teacher == text(tokenizer, render.prompt(problem))
    assert (render.prompt(QUERY).token_ids[0] == tokenizer.bos_token_id) is (bos and not chat)


def test_thinking_is_passed_only_where_it_is_said():
    plain, tokenizer = renderer(chat=True)
    off, _ = renderer(chat=True, thinking=False)
    assert text(tokenizer, off.prompt(QUERY)) == text(tokenizer, plain.prompt(QUERY)) + "<think>\n\n</think>\n\n"


def test_messages_are_used_as_they_are_and_the_last_user_turn_carries_the_block():
    turns = ({"role": "system", "content": "S"}, {"role": "user", "content": "A"},
             {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"})  # fmt: skip
    problem = Problem(id="m", prompt=turns, answer="D")
    render, tokenizer = renderer(chat=True, shots=(), system_prompt="not this one")
    expected = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False)
    assert list(render.prompt(problem).token_ids) == expected
    teacher = text(tokenizer, render.privileged(problem, "H", []))
    assert teacher == text(tokenizer, render.prompt(problem)).replace("user\nC", "user\nC\n\nH")
    completion, _ = renderer(chat=False, shots=())
    with pytest.raises(UserError, match="conversation of 4 messages"):
        completion.prompt(problem)


def test_template_chat_needs_a_chat_template_and_auto_takes_what_is_there():
    with pytest.raises(UserError, match="no chat template; use 'completion'"):
        renderer(chat=False, template="chat")
    assert renderer(chat=True)[0].chat and not renderer(chat=False)[0].chat
    assert not renderer(chat=True, template="completion")[0].chat


def test_a_template_that_moves_other_text_when_a_block_is_inserted_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] | length }}:{{ messages[-1]['content'] }}"
    render, _ = renderer(chat=True, shots=(), tokenizer=tokenizer)
    with pytest.raises(UserError, match="changes the prompt elsewhere"):
        render.privileged(QUERY, "H", [])


def test_a_template_that_refuses_a_role_is_told_in_one_message():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else 'x' }}"
    render, _ = renderer(chat=True, shots=(), tokenizer=tokenizer, system_prompt="S")
    with pytest.raises(UserError, match="refuses problem q: no system role"):
        render.prompt(QUERY)


def dataset(*lengths: int) -> Dataset:
    made = [Problem(id=f"p{i}", prompt="x" * n, answer="1") for i, n in enumerate(lengths)]
    return Dataset(tuple(made[1:]), (made[0],), SHOTS)


def test_trim_drops_shots_before_the_question_for_student_and_teacher_alike():
    lengths = {}
    for kept in (0, 1, 2):
        lengths[kept] = len(renderer(chat=False, shots=SHOTS[:kept])[0].prompt(QUERY).token_ids)
    for limit, kept in ((lengths[2], 2), (lengths[2] - 1, 1), (lengths[1], 1), (lengths[1] - 1, 0), (lengths[0], 0)):
        trimmed, _ = renderer(chat=False, max_prompt_length=limit, on_overflow="trim")
        alone, _ = renderer(chat=False, shots=SHOTS[:kept])
        assert trimmed.prompt(QUERY) == alone.prompt(QUERY)
        assert trimmed.privileged(QUERY, "H", ["a", "b"]) == alone.privileged(QUERY, "H", ["a", "b"][:kept])
        assert trimmed.counts() == {"prompts_trimmed": int(kept < 2), "shots_trimmed": 2 - kept}
    too_small, _ = renderer(chat=False, max_prompt_length=lengths[0] - 1, on_overflow="trim")
    with pytest.raises(UserError, match=rf"problem q .* has {lengths[0]} tokens without any shot"):
        too_small.prompt(QUERY)


def test_overflow_is_an_error_or_a_counted_drop():
    strict, _ = renderer(chat=False, max_prompt_length=150)
    with pytest.raises(UserError, match=r"max_prompt_length: the prompt of problem p2 .* the limit is 150"):
        fit(dataset(5, 6, 300, 7), strict, say=quiet)
    said: list[str] = []
    loose, _ = renderer(chat=False, max_prompt_length=150, on_overflow="drop")
    kept = fit(dataset(5, 6, 300, 7, 400), loose, say=said.append)
    assert ids(kept.train) == ["p1", "p3"] and ids(kept.heldout) == ["p0"]
    assert said == ["data: 2 problems left out, their prompts are over max_prompt_length"] and kept.notes == tuple(said)
    with pytest.raises(UserError, match="every training or held-out problem"):
        fit(dataset(300, 5), renderer(chat=False, max_prompt_length=150, on_overflow="drop")[0], say=quiet)
    unlimited, _ = renderer(chat=False)
    assert fit(dataset(5, 6, 300), unlimited, say=said.append) == dataset(5, 6, 300)


def test_cut_keeps_whole_tokens_and_counts_the_rest():
    render, tokenizer = renderer(chat=False)
    long = "Hint: the answer is 12, é and 日本. "
    total = len(tokenizer(long)["input_ids"])
    for keep in range(total + 2):
        kept, cut = render.cut(long, keep)
        assert long.startswith(kept) and cut == max(0, total - keep)
        assert len(tokenizer(kept)["input_ids"]) <= keep + 2, "a token inside a character keeps that character whole"
    assert render.cut(long, total) == (long, 0)


def test_a_shot_with_nothing_to_show_is_refused():
    with pytest.raises(UserError, match="neither solution nor answer"):
        renderer(chat=False, shots=(Problem(id="s", prompt="1 + 1"),))
