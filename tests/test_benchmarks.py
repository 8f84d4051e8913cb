"""The benchmarks: what they compare is the work they say, their sums are right, and each runs whole on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import growth
import head_peers
import layout
import methods
import rollouts
import shared
import step
from peer_trl import Sizes, drawn
from selftaught.methods import names
from selftaught.run import load_run
from selftaught.tensors import split_by_budget, split_padded
from tiny import save_tiny

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
HELPERS = {"shared.py", "peer_trl.py", "peer_vllm.py"}
COMMANDS = sorted({path.name for path in BENCHMARKS.glob("*.py")} - HELPERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("script", COMMANDS)
def test_each_benchmark_says_how_it_is_called(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"python benchmarks/{script}" in done.stdout


def test_the_page_lists_every_benchmark() -> None:
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert [script for script in COMMANDS if f"`{script}" not in page] == []


# What is compared.


def batch(sizes: Sizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prompts and responses of a step, no two alike."""
    prompts = [(1000 + row // sizes.generations,) * sizes.prompt_tokens for row in range(sizes.rollouts)]
    return prompts, [(row,) * sizes.new_tokens for row in range(sizes.rollouts)]


def demonstrated(prompts: list[tuple[int, ...]], sizes: Sizes) -> list[tuple[int, ...]]:
    """What SDPO's teacher reads: the first of a group sees another sibling than all the others."""
    return [prompt + (int(row % sizes.generations == 0),) * (sizes.new_tokens + 16)
            for row, prompt in enumerate(prompts)]


def cuts(given: dict[str, Any], contexts: list[list[tuple[int, ...]]], sizes: Sizes) -> set[int]:
    """Rollouts of the micro-batches that a recipe's token budget makes."""
    split = split_padded if given["score"]["layout"] == "plain" else split_by_budget
    return {len(rows) for rows in split(contexts, batch(sizes)[1], given["optim"]["token_budget"])}


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(3, 2, 20, 30), Sizes(2, 8, 512, 8)])
@pytest.mark.parametrize("rows", ["auto", "plain"])
@pytest.mark.parametrize("method", ["grpo", "sdpo"])
def test_a_micro_batch_holds_as_many_rollouts_on_our_side(method: str, rows: str, sizes: Sizes) -> None:
    prompts, _ = batch(sizes)
    contexts = [prompts] if method == "grpo" else [prompts, demonstrated(prompts, sizes)]
    for micro_batch in (1, sizes.generations, sizes.rollouts):
        given = step.recipe(method, "model", "prompts.jsonl", sizes, micro_batch, 4, "out", rows)
        assert cuts(given, contexts, sizes) == {micro_batch}


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(2, 32, 128, 32), Sizes(2, 4, 128, 256), Sizes(2, 4, 512, 32)])
def test_the_growth_of_memory_is_that_of_one_group(sizes: Sizes) -> None:
    prompts, _ = batch(sizes)
    answer = [prompt + (7,) * 12 for prompt in prompts]
    for method, context in (("rlsd", answer), ("opd", prompts), ("sdpo", demonstrated(prompts, sizes))):
        given = growth.recipe(method, "model", "prompts.jsonl", sizes, 3)
        assert cuts(given, [prompts, context], sizes) == {sizes.generations}


@pytest.mark.parametrize("method", names())
def test_every_method_has_a_recipe_to_be_measured_by(method: str, model: Path) -> None:
    assert load_run(methods.recipe(method, str(model), "prompts.jsonl", Sizes())).method.name == method


def test_ours_is_the_divergence_that_peers_are_held_to() -> None:
    found = head_peers.gaps(70, 50, 8)
    assert set(found) == {"ours", *head_peers.installed()}
    assert max(gap for side in found.values() for gap in side.values()) < head_peers.TOLERANCE


# Turns and sums.


def test_sides_take_turns_and_the_first_turn_is_not_counted() -> None:
    order: list[str] = []
    found = shared.turns({side: lambda side=side: order.append(side) for side in "ab"}, 3)
    assert "".join(order) == "abababab"
    assert [len(side["seconds"]) for side in found.values()] == [3, 3]


SIDE = """
import sys, time
sys.path.append({folder!r})
import shared
def work(given):
    print("noise of a library")
    if given == "die":
        raise SystemExit("died of it")
    time.sleep(given)
    return {{"asked": given}}
shared.serve(lambda: work)
"""


def test_a_side_answers_turns_and_says_why_it_ended(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(SIDE.format(folder=str(BENCHMARKS)))
    side = shared.Side([sys.executable, str(script)], 1, tmp_path / "log")
    try:
        first, second = side.turn(0.25), side.turn(0.0)
        assert (first["asked"], second["asked"]) == (0.25, 0.0)
        assert 0.25 <= first["seconds"] < 5 and second["seconds"] < 0.25
        assert side.error == ""
        assert 0 < first["peak_gb"] < 0.1 < shared.peak_gb()  # its own, and not that of the process that started it
        assert side.turn("die") == {} and side.error == "died of it"
        assert side.turn(0.0) == {}
    finally:
        side.close()


def test_slopes_are_the_exponents_of_a_power() -> None:
    sizes = [32, 64, 256]
    assert growth.slopes(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx((1.5, 1.5))
    whole, last = growth.slopes(sizes, [1.0, 1.0, 16.0])
    assert last == pytest.approx(2.0) and whole == pytest.approx(10 / 7)
    assert all(map(math.isnan, growth.slopes(sizes, [0.0, 1.0, 2.0])))


def test_update_is_what_a_step_does_but_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"steps_s": [9.0, 3.0, 5.0], "sample_s": [5.0, 1.0, 2.0], "mean_new_tokens": [8, 8, 8], "peak_gb": 1.0}
    monkeypatch.setattr(step, "child", lambda command, threads: found)
    result = step.pooled([step.run([], 1, [8, 8, 8])])
    assert (result["median_s"], result["median_sample_s"], result["median_update_s"]) == (4.0, 1.5, 2.5)
    assert "error" in step.run([], 1, [8, 8, 7])


def counted(seconds: list[float], update: float, peak: float = 2.0) -> dict[str, Any]:
    return {"counted": {"": seconds, "_sample": [1.0], "_update": [update]}, "peak_gb": peak}


def test_medians_are_of_the_counted_steps_of_all_rounds() -> None:
    found = step.pooled([counted([1.0, 9.0], 3.0), counted([2.0, 3.0], 5.0, peak=4.0)])
    assert (found["median_s"], found["median_update_s"], found["peak_gb"]) == (2.5, 4.0, 4.0)
    failed = step.pooled([counted([1.0], 3.0), {"error": "out of memory"}])
    assert failed["error"] == "out of memory" and len(failed["rounds"]) == 2


def test_ratios_are_to_the_first_side() -> None:
    def side(*rounds: float, update: float) -> dict[str, Any]:
        return step.pooled([counted([seconds], update) for seconds in rounds])

    lines = step.table({"ours": {"4": side(4.0, 4.0, update=3.0), "8": side(1.0, 3.0, update=1.0)},
                        "trl": {"4": side(4.0, 8.0, update=6.0), "8": {"error": "out of memory"}}}).splitlines()
    assert [[cell.strip() for cell in line.split("|")] for line in lines[1:4]] == [
        ["4", "ours", "4.00", "1.00", "1.00", "3.00", "1.00", "2.00"],
        ["4", "trl", "6.00", "1.50", "1.00", "6.00", "2.00", "2.00"],
        ["8", "ours", "2.00", "1.00", "1.00", "1.00", "1.00", "2.00"]]
    assert "out of memory" in lines[4] and "3.00 times" in lines[5] and "(of each round: 4.0, 2.67)" in lines[5]


def test_sides_take_turns_and_every_other_round_is_reversed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step, "write_model", lambda *_: None)
    monkeypatch.setattr(step, "write_prompts", lambda *_: None)
    ran: list[str] = []

    def run(command: list[str], threads: int, lengths: list[float]) -> dict[str, Any]:
        ran.append(command[command.index("--one") + 1])
        return counted([float(len(ran))], 1.0)

    monkeypatch.setattr(step, "run", run)
    args = Namespace(model="m", steps=2, method="grpo", lengths="all", sides=["ours", "plain"], micro_batch=[4],
                     rounds=2, threads=1, peer_python=None)  # fmt: skip
    found = step.measure(args, Sizes(), tmp_path)
    assert ran == ["ours", "plain", "plain", "ours"]
    assert [found[side]["4"]["median_s"] for side in ("ours", "plain")] == [2.5, 2.5]
    assert step.ratios(found["plain"]["4"], found["ours"]["4"]) == [2.0, 0.75]


@pytest.mark.parametrize("words", [["--steps", "1"], ["--rounds", "0"]])
def test_a_step_without_a_counted_one_is_refused(
        words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["step", *words])
    with pytest.raises(SystemExit):
        step.arguments()
    assert " ".join(words) in capsys.readouterr().err


# Each whole, on a tiny model.


@pytest.fixture
def benchmark(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a benchmark's command in this process, what it measures in others; returns what it wrote."""

    def command(module: ModuleType, *words: Any) -> Any:
        out = tmp_path / "out.json"
        given = [module.__name__, "--model", model, *words, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(word) for word in given])
        module.main()
        return json.loads(out.read_text())

    return command


def test_rollouts_runs(benchmark: Callable[..., Any]) -> None:
    rows = benchmark(rollouts, "--rows", 4, "--group", 2, "--prompt", 9, "--tokens", 5, "--runs", 2, "--threads", 1)
    assert [row.get("error") or row["side"] for row in rows["results"]] == ["ours", "generate", "batching"]
    assert all(row["median_s"] > 0 and len(row["seconds"]) == 2 and row["peak_gb"] > 0 for row in rows["results"])


def test_a_side_that_did_other_work_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        error = ""

        def __init__(self, *_: Any) -> None: ...

        def turn(self, prompts: list[list[int]]) -> dict[str, Any]:
            assert [len(ids) for ids in prompts] == [9, 9]
            return {"lengths": [5, 5, 5, 4], "seconds": 1.0, "peak_gb": 1.0}

        def close(self) -> None: ...

    monkeypatch.setattr(rollouts, "Side", Short)
    args = Namespace(dtype="float32", group=2, sides=["ours"], threads=1, runs=1, vocabulary=10, vllm_python=None)
    assert rollouts.case(args, tmp_path, 4, 9, 5) == {"ours": {"error": "wrote 19 tokens in 4 rows"}}


def test_growth_runs(benchmark: Callable[..., Any]) -> None:
    found = benchmark(growth, "--axes", "group", "vocabulary", "--response", 4, "--prompt", 24, "--group", 2,
                      "--vocabulary", 300, "--steps", 1, "--threads", 1)["results"]
    points = [point for axis in found.values() for point in axis["points"]]
    assert [point.get("error") or (point["axis"], point["size"]) for point in points] == [("group", 2),
                                                                                          ("vocabulary", 300)]
    assert all(point[cost] > 0 for point in points for cost in growth.COSTS)


def test_step_runs_in_the_plain_layout_with_drawn_lengths(benchmark: Callable[..., Any]) -> None:
    found = benchmark(step, "--sides", "plain", "--lengths", "drawn", "--sizes", 2, 2, 24, 16, "--steps", 2,
                      "--micro-batch", 2, "--threads", 1)["results"]["plain"]["2"]
    assert found.get("error") is None
    assert found["rounds"][0]["mean_new_tokens"] == [sum(drawn(number, Sizes(2, 2, 24, 16))) / 4 for number in range(2)]


def test_layout_runs(benchmark: Callable[..., Any]) -> None:
    found = benchmark(layout, "--prompts", 2, "--group", 2, "--prompt-tokens", 9, "--new-tokens", 5, "--runs", 1)
    assert all(side["median_s"] > 0 for work in ("score", "backward") for side in found["results"][work].values())


def test_an_update_of_a_method_is_measured(model: Path, tmp_path: Path) -> None:
    shared.write_prompts(model, tmp_path / "prompts.jsonl")
    found = methods.updates("gspo", str(model), str(tmp_path / "prompts.jsonl"), 4, 1)
    assert len(found["seconds"]) == 1 and 0 < found["tokens"] <= 64
