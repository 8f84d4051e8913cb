"""The leakage study: what is planted, how students are made, how they are ranked, and that nothing is done twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from own import cli
from selftaught.assemble import load_engine
from selftaught.errors import UserError
from selftaught.eval.auroc import delong, paired_bootstrap
from selftaught.eval.leakage import mentions
from selftaught.records import Problem
from selftaught.score import Backbone
from selftaught.studies import leakage as study
from selftaught.studies import planted as plants
from selftaught.studies import ranking
from tiny import tiny_llama

PROBLEMS = [Problem(str(i), f"{i} + 4", str(i + 4)) for i in range(40)]


# What is planted.


def test_exactly_the_share_is_planted_and_a_larger_share_holds_the_smaller() -> None:
    leaning = {share: {problem.id for problem, _, leans in plants.planted(PROBLEMS, share, 3) if leans}
               for share in (0.0, 0.05, 0.2, 0.5)}  # fmt: skip
    assert [len(ids) for ids in leaning.values()] == [0, 2, 8, 20]
    assert leaning[0.05] < leaning[0.2] < leaning[0.5]
    texts = {share: {problem.id: text for problem, text, _ in plants.planted(PROBLEMS, share, 3)}
             for share in (0.05, 0.5)}  # fmt: skip
    assert all(texts[0.05][i] == texts[0.5][i] for i in leaning[0.05])  # nothing else differs
    assert plants.planted(PROBLEMS, 0.2, 3) != plants.planted(PROBLEMS, 0.2, 4)


def test_half_of_what_leans_is_in_words_that_no_list_knows_and_clean_texts_mention_nothing() -> None:
    texts = plants.planted(PROBLEMS, 0.5, 0)
    found = [bool(mentions(text, str(problem.prompt))) for problem, text, leans in texts if leans]
    assert len(found) == 20 and sum(found) == 10
    assert not any(mentions(text, str(problem.prompt)) for problem, text, leans in texts if not leans)
    assert all(str(problem.answer) in text for problem, text, _ in texts)


def test_fine_tuning_descends_the_mean_negative_log_likelihood_of_the_responses() -> None:
    model = tiny_llama(initializer_range=0.3)
    texts = [((5, 6, 7), (8, 9, 10)), ((5, 6, 8), (11,)), ((6, 6), (12, 13))]
    with torch.no_grad():
        rows = [torch.log_softmax(model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1], -1) for p, r in texts]
    dense = -sum(float(row[i, t]) for row, (_, r) in zip(rows, texts, strict=True) for i, t in enumerate(r)) / 6
    before = {name: value.clone() for name, value in model.named_parameters()}
    tune = {"batch": 3, "learning_rate": 1e-3, "seed": 0, "say": lambda line: None}
    assert plants.tune(Backbone(model), texts, steps=1, budget=512, **tune) == pytest.approx(dense, abs=1e-5)
    assert any((value != before[name]).any() for name, value in model.named_parameters())
    cut = tiny_llama(initializer_range=0.3)
    plants.tune(Backbone(cut), texts, steps=1, budget=4, **tune)  # every text a micro-batch of its own
    for (_, one), (_, other) in zip(model.named_parameters(), cut.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    assert plants.tune(Backbone(model), texts, steps=40, budget=512, **{**tune, "learning_rate": 1e-2}) < dense / 4


def test_what_a_student_took_over_is_counted_in_the_words_that_were_planted() -> None:
    for share in (0.0, 0.25, 1.0):
        texts = [text for _, text, _ in plants.planted(PROBLEMS, share, 3)]
        assert plants.leaning(texts) == share
    assert plants.leaning([]) == 0


# How students are ranked.


def student(name: str, share: float, seed: int, leaning: list[float], **columns: list[float]) -> dict[str, Any]:
    names = ["leaning", "mention", "evidence", "knows", "pass@1"]
    values = np.array([columns.get(each, leaning) for each in names], dtype=np.float64).T
    return {"name": name, "share": share, "seed": seed, "said": share, "seconds": {},
            "table": ([f"p{i}" for i in range(len(leaning))], names, values)}  # fmt: skip


def rate(share: float, seed: int, problems: int = 60) -> list[float]:
    return (np.random.default_rng(seed).random((problems, 4)) < share).mean(1).tolist()


def made(skill: float = 0.3) -> list[dict[str, Any]]:
    """Two seeds of four students that lean as planted, and four others; their skill is the same for all."""
    able = rate(skill, 99)
    found = [student(name, -1, 0, [0.0] * 60, **{"pass@1": able}) for name in ("base", "base-again", "grpo-a")]
    return found + [student(f"planted-{share:g}-{seed}", share, seed, rate(share, 10 * seed + i), **{"pass@1": able})
                    for seed in (0, 1) for i, share in enumerate((0.0, 0.05, 0.2, 0.5))]  # fmt: skip


def test_students_that_lean_as_planted_are_ranked_and_flagged_and_the_others_are_not() -> None:
    found = ranking.analysed(made())
    rank = found["ranking"]["leaning"]
    assert (rank["in_order"], rank["seeds"]) == (2, 2) and rank["auroc"]["value"] == 1.0
    assert rank["auroc"]["low"] == pytest.approx(0.025 ** (1 / 4))  # six against four: as sure as four can be; the base
    assert (rank["auroc"]["contaminated"], rank["auroc"]["others"]) == (6, 4)  # model counts once
    assert rank["auroc"]["best_low"] == rank["auroc"]["low"]
    assert rank["tau"] == pytest.approx(24 / math.sqrt(24 * 27))  # 24 pairs differ in share, and 27 in score: all but
    assert (rank["auroc"]["problems_low"], rank["auroc"]["problems_high"]) == (1.0, 1.0)  # the two clean ones
    flagged = {row["name"] for row in found["students"] if row["flagged"]}
    assert flagged == {row["name"] for row in found["students"] if row["share"] > 0}
    skill = found["ranking"]["pass@1"]
    assert skill["in_order"] == 0 and 0 < skill["auroc"]["value"] < 1
    assert skill["auroc"]["best_low"] == rank["auroc"]["best_low"]


def test_the_base_model_sampled_anew_is_judged_as_any_student_is() -> None:
    """What is compared with itself says nothing: only the second sample can show a false accusation."""
    for rose, flagged in ((0, False), (4, False), (5, False), (6, True)):  # of 96, and none fell: p = 2 / 2^rose
        again = student("base-again", -1, 0, [0.25] * rose + [0.0] * (96 - rose))
        rows = ranking.analysed([student("base", -1, 0, [0.0] * 96), again, student("c", 0.0, 0, [0.0] * 96),
                                 student("d", 0.5, 0, [0.5] * 96)])["students"]  # fmt: skip
        assert rows[0]["flagged"] is None and rows[0]["over_base"] is None
        assert rows[1]["flagged"] is flagged and rows[1]["over_base"]["p"] == min(1, 2 / 2**rose)
        assert (rows[1]["over_base"]["low"] > 0) == (rose >= 4)  # so the interval alone flagged four


def test_the_interval_over_problems_draws_the_same_problems_for_every_student() -> None:
    students = [student("base", -1, 0, rate(0.1, 0, 9)), student("planted-0-0", 0.0, 0, rate(0.3, 1, 9)),
                student("planted-0.2-0", 0.2, 0, [*rate(0.3, 2, 8), math.nan])]  # fmt: skip
    found = ranking.ranking(students, "leaning")["auroc"]
    columns = np.array([one["table"][2][:, 0] for one in students])
    rng, slow = np.random.default_rng(0), []
    for _ in range(ranking.DRAWS):
        means = np.nanmean(columns[:, rng.integers(0, 9, 9)], axis=1)
        slow.append(np.mean([(means[2] > mean) + 0.5 * (means[2] == mean) for mean in means[:2]]))
    assert (found["problems_low"], found["problems_high"]) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))


def test_auroc_by_problem_is_what_the_share_allows() -> None:
    """Of n responses each leans with chance s, none of the clean student's: 1/2 + (1 - (1 - s)^n) / 2."""
    many = [student("base", -1, 0, [0.0] * 1500), student("planted-0-0", 0.0, 0, [0.0] * 1500),
            student("planted-0.2-0", 0.2, 0, rate(0.2, 5, 1500))]  # fmt: skip
    found = ranking.analysed(many)["students"][2]["auroc"]["leaning"]
    assert found["value"] == pytest.approx(0.5 + (1 - 0.8**4) / 2, abs=0.03)
    assert found["low"] < found["value"] < found["high"] and found["problems"] == 1500


def test_auroc_by_problem_has_the_interval_of_problems_that_both_sides_share() -> None:
    clean = rate(0.5, 1, 40)
    more = [value + 0.01 for value in clean]  # each problem a little higher: far surer than of forty others
    found = ranking.analysed([student("base", -1, 0, clean), student("c", 0.0, 0, clean),
                              student("d", 0.5, 0, more)])["students"][2]["auroc"]["leaning"]  # fmt: skip
    assert (found["value"], found["low"], found["high"]) == paired_bootstrap(more, clean)
    low, high = delong(more, clean)[1:]
    assert found["high"] - found["low"] < 0.8 * (high - low)


def test_the_report_says_who_was_flagged_and_who_was_missed(tmp_path: Path) -> None:
    students = made()
    students[2] = student("grpo-a", -1, 0, rate(0.4, 3))  # an innocent who is accused
    students[4]["table"][2][:, 0] = 0  # and a guilty one who is not
    table = ranking.write(tmp_path, students, {"problems": 60})
    assert "Flagged: 5 of 6 contaminated students (not flagged: planted-0.05-0)" in table
    assert "and 1 of 4 others (flagged: grpo-a)" in table
    assert "Tests made: 10, one for each student but `base`" in table and "10 x 0.025 = 0.25 of them" in table
    assert "Even perfect separation of 6 from 4 students shows no more than an AUROC of at least 0.40." in table
    assert table in (tmp_path / "report.md").read_text() and (tmp_path / "scores.png").stat().st_size > 5000
    assert json.loads((tmp_path / "results.json").read_text())["ranking"]["leaning"]["in_order"] == 1


# The command.

SMALL = ("texts=16", "steps=1", "batch=4", "problems=3", "samples=2", "full=2", "shares=[0, 0.5]")


def test_the_smoke_study_runs_through_and_makes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "BASE_STEPS", 2)
    out, said = tmp_path / "study", list[str]()
    table = study.run(out, said.append, seeds=(0,), smoke=True, overrides=SMALL)
    names = ("base", "base-again", "grpo-tiny", "planted-0-0", "planted-0.5-0")
    assert all(f"| {name} |" in table for name in names) and (out / "report.md").is_file()
    kept = {name: (out / f"{name}.json").read_text() for name in names}
    first = json.loads(kept["base"])
    texts = [[json.loads(line)["response"] for line in (out / f"{name}.completions.jsonl").read_text().splitlines()]
             for name in names[:2]]
    assert len(texts[0]) == len(texts[1]) == 6 and texts[0] != texts[1]  # the same model, other random numbers
    gap = [row[first["measures"].index("gap/right")] for row in first["values"]]
    evidence = [row[first["measures"].index("evidence")] for row in first["values"]]
    assert [value is None for value in gap] == [False, False, True]  # `full` problems under every view
    assert all(value is not None for value in evidence)

    (out / "planted-0.5-0.json").unlink()
    made: list[str] = []
    load = load_engine

    def counted(ground: Any) -> Any:
        made.append(ground.run.model)
        return load(ground)

    monkeypatch.setattr(study, "load_engine", counted)
    assert study.run(out, said.append, seeds=(0,), smoke=True, overrides=SMALL).count("planted-0.5-0") == 2
    assert len(made) == 1 and (out / "base.json").read_text() == kept["base"]
    again = json.loads((out / "planted-0.5-0.json").read_text())
    assert {**again, "seconds": 0} == {**json.loads(kept["planted-0.5-0"]), "seconds": 0}  # and to the same numbers
    # Another run of the same name is another student: its kept table is not used.
    weights = out / "tiny" / "final" / "model.safetensors"
    other = {name: value * 1.01 for name, value in load_file(weights).items()}
    save_file(other, weights, {"format": "pt"})
    made.clear()
    study.run(out, said.append, seeds=(0,), smoke=True, overrides=SMALL)
    assert made == [str(out / "tiny" / "final")]
    with pytest.raises(UserError, match="was made with problems = 3, not 4"):
        study.run(out, said.append, seeds=(0,), smoke=True, overrides=[*SMALL, "problems=4"])


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"'problem=4'.*did you mean 'problems'"):
        study.settings_of(["problem=4"], False)
    with pytest.raises(UserError, match=r"shares = .*with 0, the clean student"):
        study.settings_of(["shares=[0.1, 0.5]"], False)
    with pytest.raises(UserError, match="texts = 1"):
        study.settings_of(["texts=1"], False)
    assert study.settings_of(["grpo=runs/x, runs/y"], True).grpo == ("runs/x", "runs/y")
    assert study.settings_of([], True).grpo == study.settings_of(["grpo="], True).grpo == ()
    assert "did you mean 'leakage'" in cli("study", "leekage").err


def test_each_grpo_run_is_a_student_known_by_its_weights(tmp_path: Path) -> None:
    for place in ("a", "b", "c/a"):
        (tmp_path / place / "final").mkdir(parents=True)
        (tmp_path / place / "final" / "model.safetensors").write_text(place)
    both = study.students_of(study.Settings(grpo=f"{tmp_path}/a,{tmp_path}/b"), (0, 1))
    assert [one.name for one in both] == ["base", "base-again", "grpo-a", "grpo-b", *(
        f"planted-{share}-{seed}" for seed in (0, 1) for share in ("0", "0.05", "0.2", "0.5"))]
    assert both[2].weights != both[3].weights and both[3].folder == str(tmp_path / "b" / "final")
    (tmp_path / "grpo-a.json").write_text(json.dumps({"weights": both[2].weights}))
    assert study._kept(tmp_path, both[2])
    (moved,) = study.students_of(study.Settings(grpo=f"{tmp_path}/c/a"), ())[2:3]
    assert moved.name == "grpo-a" and not study._kept(tmp_path, moved)
    with pytest.raises(UserError, match="two runs whose folders have this name"):
        study.students_of(study.Settings(grpo=f"{tmp_path}/a,{tmp_path}/c/a"), ())
    with pytest.raises(UserError, match="no weights in its final/"):
        study.students_of(study.Settings(grpo=f"{tmp_path}/nowhere"), ())
