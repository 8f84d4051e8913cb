"""The science study: its arms, its recipes and their sources, a real step of each method, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from own import cli, lines
from science_rows import gpqa_row, sciknoweval_row, write_csv, write_jsonl
from selftaught.errors import UserError
from selftaught.recipe import RECIPES
from selftaught.run import load_run
from selftaught.studies import science as study
from test_recipes import Made, save_model, unsourced

RECIPE_NAMES = (*study.METHODS.values(), "science/gpqa")
# What the recipes say is the paper's or the code's, typed from them: arXiv 2606.26091 section 5, SDPO's scripts.
FACTS: dict[str, dict[str, Any]] = {
    "all": {"rollout.num_generations": 8, "rollout.prompts_per_step": 32, "rollout.temperature": 1.0,
            "rollout.max_completion_length": 8192, "data.max_prompt_length": 2048, "data.heldout": 210,
            "loss.sampler_cap": 2.0, "optim.steps": 30 * (1890 // 32), "optim.warmup_steps": 10,
            "optim.weight_decay": 0.01, "eval.samples": 16, "eval.k": [1, 2, 4, 8, 16], "eval.temperature": 0.6,
            "eval.top_p": 0.95},
    "science/grpo": {"method.eps_high": 0.28, "optim.learning_rate": 1e-6, "optim.minibatches": 32 // 8},
    "science/sdsd": {"method.top_k": 100, "method.is_cap": 2.0, "method.teacher.rate": 0.05, "privilege.threshold": 0.5,
                     "privilege.max_prompt_length": 10240, "optim.learning_rate": 1e-5},
    "science/gpqa": {"data.max_prompt_length": 2048, "eval.samples": 16, "eval.temperature": 0.7},
}  # fmt: skip
FACTS["science/sdsd-3"] = {**FACTS["science/sdsd"], "privilege.count": 3}
SAYS = ("<answer>A</answer>", "<answer>B</answer>", "<answer>C</answer>", "<answer>D</answer>")
TINY = ("rollout.num_generations=4", "rollout.prompts_per_step=4", "rollout.max_completion_length=4",
        "reward.workers=1",
        "optim.steps=1", "optim.warmup_steps=0", "optim.token_budget=6000", "optim.dtype=float32", "device=cpu",
        "data.heldout=5", "data.max_prompt_length=700", "eval.every=null", "eval.samples=2", "eval.k=[1,2]",
        "eval.controls=false", "report.to=[]", "report.html=false")  # fmt: skip


def facts(name: str) -> dict[str, Any]:
    return {**(FACTS["all"] if name != "science/gpqa" else {}), **FACTS[name]}


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_says_what_paper_and_code_say_and_names_the_source_of_each_number(name: str) -> None:
    text = (Path(str(RECIPES)) / f"{name}.yaml").read_text(encoding="utf-8")
    assert unsourced(text, set(facts(name))) == []
    tree = load_run(name).resolved()
    for field, value in facts(name).items():
        node: Any = tree
        for key in field.split("."):
            node = node[key]
        assert node == value, field


def test_the_recipes_differ_only_in_what_the_study_compares() -> None:
    grpo, one, three = (load_run(name).resolved() for name in study.METHODS.values())
    assert {key for key in one if one[key] != three[key]} == {"privilege", "optim", "out"}
    assert three["privilege"] == {**one["privilege"], "count": 3} and three["privilege"]["combine"] == "average"
    assert three["optim"] == {**one["optim"], "token_budget": three["optim"]["token_budget"]}
    assert {key for key in one if one[key] != grpo[key]} == {"privilege", "optim", "method", "out"}


@pytest.mark.parametrize("arm", study.arms((), (0,)), ids=lambda arm: arm.name)
def test_every_arm_of_the_papers_models_is_a_run_on_its_domain_and_split(arm: study.Arm) -> None:
    trained, heldout = {"biology": (450, 50), "chemistry": (1890, 210), "material": (841, 94),
                        "physics": (720, 80)}[arm.domain]  # fmt: skip
    for model in ("Qwen/Qwen3-8B", "allenai/Olmo-3-7B-Instruct"):
        run = load_run(study.METHODS[arm.method], [f"model={model}", *study.changes(arm)])
        assert (run.model, run.data.heldout, run.data.train) == (model, heldout, None)
        assert run.optim.steps == 30 * (trained // 32) and f"domain={arm.domain.capitalize()}&" in str(run.data.source)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_dry_run_resolves_the_recipe_without_the_hub(name: str) -> None:
    said = cli("train", name, "--dry-run", "model=allenai/Olmo-3-7B-Instruct")
    assert said.code == 0, said.err
    assert load_run(yaml.safe_load(said.out)) == load_run(name, ["model=allenai/Olmo-3-7B-Instruct"])
    assert "# not looked at" in said.out


def test_arms_are_chosen_by_domain_method_or_both() -> None:
    def names(*only: str) -> list[str]:
        return [arm.name for arm in study.arms(only, (7,))]

    assert len(names()) == 12 and len(study.arms((), (0, 1, 2))) == 36
    assert names("physics") == ["physics-grpo-7", "physics-sdsd-7", "physics-sdsd-3-7"]
    assert names("sdsd-3", "biology") == ["biology-sdsd-3-7"]
    assert names("material-grpo", "physics-sdsd-3") == ["material-grpo-7", "physics-sdsd-3-7"]
    with pytest.raises(UserError, match="no arm 'phisics'; did you mean 'physics'"):
        names("phisics")


def test_the_study_trains_asks_gpqa_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    made = Made("qwen3", lambda number: {}, SAYS, ())
    model = save_model(tmp_path / "model", made)
    others = [sciknoweval_row(99, domain="Biology"), sciknoweval_row(98, level="L1")]
    source = write_jsonl(tmp_path / "sci.jsonl", [*(sciknoweval_row(n) for n in range(13)), *others])
    gpqa = write_csv(tmp_path / "gpqa.csv", [gpqa_row(number) for number in range(9)])
    extra = [f"model={model}", f"data.source={source}", f"gpqa={gpqa}", *TINY]
    said: list[str] = []
    out = tmp_path / "study"
    asked: dict[str, Any] = {"only": ("physics-sdsd-3",), "seeds": (0,), "overrides": extra}
    table = study.run(out, said.append, **asked)
    rows = json.loads((out / "table.json").read_text())
    assert [row["method"] for row in rows] == ["sdsd-3"]
    for row in rows:
        assert row["last"]["problems"] == 5 and row["last"]["k"] == 2 and row["outside"]["problems"] == 5
        (step,) = (line for line in lines(out / f"physics-{row['method']}-0" / "metrics.jsonl") if line["step"] == 1)
        assert step["grad_norm"] > 0, row["method"]
        ids = {line["reference"] for line in lines(out / f"physics-{row['method']}-0" / "completions.jsonl")}
        assert ids <= set("ABCD")
    shown = yaml.safe_load((out / "physics-sdsd-3-0" / "run.yaml").read_text())
    assert shown["privilege"]["count"] == 3 and shown["data"]["heldout"] == 5
    assert table.count("\n") == 2 and "| physics | sdsd-3 | 1 |" in table
    first = sorted(said)
    said.clear()
    asked_file = out / "physics-sdsd-3-0" / "gpqa" / "completions.jsonl"  # as if it had been stopped half-way
    whole = asked_file.read_text()
    asked_file.write_text("".join(whole.splitlines(keepends=True)[:3]))
    (out / "physics-sdsd-3-0" / "gpqa" / "done").unlink()
    assert study.run(out, said.append, **asked) == table
    assert [line for line in said if line.startswith("completions:")] == [
        f"completions: {out / 'physics-sdsd-3-0' / 'gpqa' / 'completions.jsonl'}"]
    assert any(line.startswith("3 of 10 completions are there") for line in said)
    assert sorted(asked_file.read_text().splitlines()) == sorted(whole.splitlines())
    assert not any("started" in line for line in said) and any("started" in line for line in first)


def test_the_table_shows_means_and_ranges_over_seeds_or_one_seeds_interval() -> None:
    def measure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    def row(seed: int, value: float, **more: Any) -> dict[str, Any]:
        side = {"pass@1": measure(value), "pass@16": measure(value + 0.2), "k": 16, "distinct": measure(3.0)}
        return {"domain": "physics", "method": "grpo", "seed": seed, "before": side, "last": side, "best": side, **more}

    head, _, only = study.lines([row(0, 0.5)])
    assert "last: pass@1, pass@16" in head and "0.500 [0.400, 0.600], 0.700 [0.600, 0.800]" in only
    *_, many = study.lines([row(0, 0.5), row(1, 0.7), row(2, 0.3)])
    assert "| 3 |" in many and "0.500 (0.300 to 0.700), 0.700 (0.500 to 0.900)" in many
