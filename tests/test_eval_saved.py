"""Evaluations that were killed and go on, and saved completions that are measured, compared and scored again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from own import Said, cli, command, forked, lines, make_home, write_recipe
from selftaught.eval import append_rows, read_rows
from selftaught.eval.rows import KEYS
from selftaught.records import Rollout
from selftaught.rollout import TransformersEngine
from tiny import save_tiny

SOURCES = Path(__file__).resolve().parent.parent / "src"
PROBLEMS, SAMPLES, ROWS = 6, 4, 4  # a batch of the engine is the four samples of one problem
REWARDS = '''\
import os, time

def slow(completions, gold, **kwargs):
    time.sleep(0.15 * len(completions))
    return [float(answer in text) for text, answer in zip(completions, gold)]

def logged(completions, gold, **kwargs):
    with open(os.environ["ASKED"], "a") as file:
        file.write("asked\\n" * len(completions))
    return [float(answer in text) for text, answer in zip(completions, gold)]

def hang(completions, answer):
    while "a" in completions[0]:
        pass
    return [1.0 for _ in completions]

def by_level(completions, level, completion_ids):
    return [float(level == len(ids) % 3) for ids, level in zip(completion_ids, level)]
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import selftaught.evaluate  # imported before any fork, so that a forked command costs no imports  # noqa: F401

    home = make_home(tmp_path_factory.mktemp("saved"))
    (home / "rewards.py").write_text(REWARDS)
    logged = {"parts": [{"name": f"{home / 'rewards.py'}:logged"}], "workers": 1, "timeout": 120}
    write_recipe(home, "eval.yaml", reward=logged, rollout={"max_rows": ROWS},
                 eval={"samples": SAMPLES, "k": [1, 4]})  # fmt: skip
    return home


def sample(home: Path, out: Path, *options: str) -> list[str | Path]:
    return ["eval", home / "model", home / "eval.yaml", f"out={out}", "--json", out.with_suffix(".json"), *options]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """An evaluation that nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASKED", str(home / "asked"))
        assert cli(*sample(home, home / "whole")).code == 0
    assert len((home / "asked").read_text().splitlines()) == PROBLEMS * SAMPLES + 1  # and the trial before
    return home / "whole"


def killed(home: Path, out: Path, at: Callable[[int], None], *options: str) -> None:
    """`selftaught eval` in a process of its own, killed by `at`, which is told of each batch before it is sampled."""

    def action() -> int:
        poll, reached = TransformersEngine.poll, 0

        def hooked(engine: TransformersEngine) -> list[Rollout]:
            nonlocal reached
            if engine._queue:
                reached += 1
                at(reached)
            return poll(engine)

        TransformersEngine.poll = hooked  # type: ignore[method-assign]
        return command(*sample(home, out, *options))

    assert forked(action, out.with_suffix(".log")) == -signal.SIGKILL, out.with_suffix(".log").read_text()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_batch(number: int) -> Callable[[int], None]:
    return lambda reached: die() if reached == number else None


def die_in_write(number: int, length: int) -> Callable[[int], None]:
    """While the rows of the batch `number` are written, once `length` bytes of them are in the file."""

    def at(reached: int) -> None:
        if reached != 1:
            return
        fsync, written = os.fsync, 0

        def hooked(descriptor: int) -> None:
            nonlocal written
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.endswith("completions.jsonl"):
                written += 1
                if written == number:
                    before = Path(path).read_bytes().splitlines(keepends=True)[: (number - 1) * ROWS]
                    os.truncate(path, len(b"".join(before)) + length)
                    die()
            fsync(descriptor)

        os.fsync = hooked

    return at


def resumed(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Said, int, int]:
    """The same command with --resume: what it said, how many responses it sampled, and how many it verified."""
    monkeypatch.setenv("ASKED", str(out.with_suffix(".asked")))
    out.with_suffix(".asked").write_text("")
    sampled, poll = 0, TransformersEngine.poll

    def counting(engine: TransformersEngine) -> list[Rollout]:
        nonlocal sampled
        batch = poll(engine)
        sampled += len(batch)
        return batch

    monkeypatch.setattr(TransformersEngine, "poll", counting)
    said = cli(*sample(home, out, "--resume"))
    assert said.code == 0, said.err
    return said, sampled, len(out.with_suffix(".asked").read_text().splitlines()) - 1  # a trial before


def same(out: Path, whole: Path) -> bool:
    return (out / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes() and json.loads(
        out.with_suffix(".json").read_text()) == json.loads(whole.with_suffix(".json").read_text())  # fmt: skip


# Killed and resumed.


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
def test_killed_between_batches_and_resumed_it_samples_only_what_is_missing(
    home: Path, whole: Path, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    out = tmp_path / "killed"
    killed(home, out, die_before_batch(batch))
    path = out / "completions.jsonl"
    there = len(lines(path)) if path.exists() else 0
    assert there == max(0, batch - 2) * SAMPLES  # one batch was sampled and still being verified
    said, sampled, verified = resumed(home, out, monkeypatch)
    missing = PROBLEMS * SAMPLES - there
    assert (sampled, verified) == (missing, missing) and same(out, whole)
    assert (f"{there} of 24 completions are there; sampling the other {missing}" in said.out) == (there > 0)


@pytest.mark.parametrize("length", [0, 1, 700, 1200])
def test_killed_while_it_writes_it_mends_the_file_and_samples_the_torn_row_again(
    home: Path, whole: Path, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    out = tmp_path / "torn"
    killed(home, out, die_in_write(3, length))
    text = (out / "completions.jsonl").read_bytes()
    there = text.count(b"\n")
    assert text.endswith(b"\n") is (length == 0) and 2 * ROWS <= there < 3 * ROWS
    said, sampled, verified = resumed(home, out, monkeypatch)
    # The batch that was cut is sampled whole, for the same bits; what is there of it is not verified or saved again.
    assert sampled == (PROBLEMS - 2) * ROWS and verified == PROBLEMS * SAMPLES - there
    assert ("is truncated: cut away, to be sampled again" in said.out) == (length > 0)
    assert same(out, whole)


def test_a_process_of_its_own_killed_half_way_goes_on(home: Path, tmp_path: Path) -> None:
    out, environment = tmp_path / "real", {**os.environ, "PYTHONPATH": str(SOURCES), "HF_HUB_OFFLINE": "1"}
    slow = f"reward={{name: '{home / 'rewards.py'}:slow', workers: 1, timeout: 120}}"
    run = [sys.executable, "-m", "selftaught.cli", *map(str, sample(home, out, slow))]
    path, began = out / "completions.jsonl", time.monotonic()
    with subprocess.Popen(run, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (path.exists() and path.read_bytes().count(b"\n") >= 2 * ROWS):
            assert process.poll() is None and time.monotonic() - began < 200
            time.sleep(0.02)
        process.kill()
    there = path.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and 2 * ROWS <= there < PROBLEMS * SAMPLES
    said = cli(*sample(home, out, slow, "--resume"))
    assert said.code == 0 and f"{there} of 24 completions are there" in said.out
    untouched = sample(home, tmp_path / "untouched", slow)
    assert cli(*untouched).code == 0 and same(out, tmp_path / "untouched")


def test_more_samples_than_a_batch_holds_are_resumed_in_parts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("eval.samples=10", "eval.problems=2")
    one = sample(home, tmp_path / "one", *options)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    assert cli(*one).code == 0
    rows = lines(tmp_path / "one" / "completions.jsonl")
    assert [row["sample"] for row in rows] == [*range(10), *range(10)]
    assert len({row["response"] for row in rows}) > 8  # each sample has random numbers of its own
    killed(home, tmp_path / "two", die_before_batch(4), *options)
    assert [row["sample"] for row in lines(tmp_path / "two" / "completions.jsonl")] == list(range(8))
    assert cli(*sample(home, tmp_path / "two", *options, "--resume")).code == 0
    assert same(tmp_path / "two", tmp_path / "one")


def test_rows_that_are_lost_inside_the_file_are_sampled_again_and_duplicates_named(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "holes"
    shutil.copytree(whole, out)
    kept = (out / "completions.jsonl").read_text().splitlines(keepends=True)
    del kept[4:8], kept[9]
    (out / "completions.jsonl").write_text("".join([*kept[:3], "no row\n", kept[0], *kept[3:]]))
    said, sampled, verified = resumed(home, out, monkeypatch)
    assert (sampled, verified) == (8, 5)
    assert "1 line left out: line 4 is not a JSON object" in said.out and "1 duplicated row left out" in said.out
    assert json.loads(out.with_suffix(".json").read_text()) == json.loads(whole.with_suffix(".json").read_text())


def test_only_the_same_evaluation_is_resumed(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))

    def refused(out: Path, *options: str) -> str:
        said = cli(*sample(home, out, *options, "--resume"))
        assert said.code == 2 and said.err.count("error: ") == 1, said.out + said.err
        return said.err

    for option, named in (("seed=1", "seed = 1"), ("eval.temperature=0.5", "eval.temperature = 0.5"),
                          ("eval.samples=5", "eval.samples = 5"), ("reward=numeric", "reward.parts"),
                          ("data.shots=1", "data.shots = 1")):  # fmt: skip
        assert f"{named}" in refused(whole, option) and "was begun with" in refused(whole, option)
    assert cli(*sample(home, whole, "--resume", "--k", "2")).code == 0  # other measures of the same completions
    assert "already holds a run" in cli(*sample(home, whole)).err
    said = cli("eval", home / "other", home / "eval.yaml", f"out={whole}", "--resume")
    assert said.code == 2 and "model = " in said.err and "was begun with" in said.err
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    save_tiny(tmp_path / "model", seed=5)
    weights = home / "model" / "model.safetensors"
    shutil.copy(weights, tmp_path / "kept")
    shutil.copy(tmp_path / "model" / "model.safetensors", weights)
    assert "weights of" in refused(moved) and "are not those" in refused(moved)
    shutil.copy(tmp_path / "kept", weights)
    text = (moved / "completions.jsonl").read_text()
    (moved / "completions.jsonl").write_text(text.replace('"temperature": 1.0', '"temperature": 0.7', 1))
    assert "was sampled with sampling = " in refused(moved)
    (moved / "completions.jsonl").write_text(text.replace('"problem": "', '"problem": "x', 1))
    assert "does not ask for: the data has changed" in refused(moved)
    (moved / "eval.yaml").unlink()
    assert "holds no eval.yaml" in refused(moved)


def test_without_a_named_folder_the_newest_that_fits_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    run: list[str | Path] = ["eval", home / "model", home / "eval.yaml", "eval.problems=2"]
    evals = home / "runs" / "evals"
    said = cli(*run, "--resume")
    assert said.code == 0 and "nothing to resume" in said.out
    assert cli(*run, "seed=3").code == 0
    first, second = (evals / name / "completions.jsonl" for name in ("model-eval", "model-eval-2"))
    for path in (first, second):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    said = cli(*run, "--resume")
    assert said.code == 0 and "4 of 8 completions" in said.out and (len(lines(first)), len(lines(second))) == (8, 4)
    assert cli(*run, "seed=3", "--resume").code == 0 and len(lines(second)) == 8
    said = cli(*run, "seed=3", "--resume")
    assert said.code == 0 and "8 of 8 completions are there; none is missing" in said.out
    said = cli(*run, "seed=4", "--resume")
    assert said.code == 2 and "seed = 4, but" in said.err and not (evals / "model-eval-3").exists()


def test_problems_without_answers_are_named_and_the_rest_evaluated(home: Path, tmp_path: Path) -> None:
    text = (home / "mine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in text]
    for row in rows[::5]:
        row["gold"] = None
    (tmp_path / "holes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lacking = {row["question"] for row in rows[::5]}
    said = cli("eval", home / "model", home / "eval.yaml", f"data.source={tmp_path / 'holes.jsonl'}",
               "reward=numeric", "data.heldout=12", f"out={tmp_path / 'out'}")  # fmt: skip
    assert said.code == 0, said.err
    saved = lines(tmp_path / "out" / "completions.jsonl")
    left_out = 12 - len({row["problem"] for row in saved})
    assert left_out > 0 and f"{left_out} of 12 problems cannot be judged and are left out" in said.out
    assert not any(question in row["prompt"] for row in saved for question in lacking)


# Scored again.


def score(path: Path, reward: str, *options: str | Path) -> Said:
    return cli("eval", "--completions", path, "--reward", reward, *options)


def test_saved_completions_are_judged_anew_and_nothing_else_of_them_changes(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "poll", None)  # nothing is sampled
    out = tmp_path / "new.jsonl"
    said = score(whole, "{name: regex, pattern: '[0-9A-Z]'}", "--out", out, "--json", tmp_path / "new.json")
    assert said.code == 0, said.err
    old, new = lines(whole / "completions.jsonl"), lines(out)
    judged = ("score", "status", "answer", "strategy")
    assert [{k: v for k, v in row.items() if k not in judged} for row in new] == [
        {k: v for k, v in row.items() if k not in judged} for row in old]  # fmt: skip
    matched = [any("0" <= c <= "9" or "A" <= c <= "Z" for c in row["response"]) for row in old]
    assert [row["score"] for row in new] == matched and 0 < sum(matched) < len(matched)
    found = json.loads((tmp_path / "new.json").read_text())
    assert found["pass@1"]["value"] == pytest.approx(sum(matched) / 24) and found["status"]["right"] == sum(matched)
    assert "24 completions scored again: wrong to " in said.out
    again = score(whole, "exact")
    assert again.code == 0 and (whole / "completions-exact.jsonl").is_file()
    assert score(whole, "exact").code == 0 and (whole / "completions-exact-2.jsonl").is_file()
    assert "is there already" in score(whole, "exact", "--out", out).err


def test_a_function_gets_the_columns_of_the_recipe_beside_the_file(home: Path, whole: Path, tmp_path: Path) -> None:
    said = score(whole, f"{home / 'rewards.py'}:by_level", "--out", tmp_path / "levels.jsonl")
    assert said.code == 0, said.err
    level = {row["question"]: row["level"] for row in lines(home / "mine.jsonl")}
    for row in lines(tmp_path / "levels.jsonl"):
        mine = next(value for question, value in level.items() if question in row["prompt"])
        assert row["score"] == float(mine == row["tokens"] % 3)
    alone = tmp_path / "alone.jsonl"
    shutil.copy(whole / "completions.jsonl", alone)
    said = score(alone, f"{home / 'rewards.py'}:by_level")
    assert said.code == 2 and "needs the argument 'level', which is no column of the data" in said.err
    rows = lines(alone)
    append_rows(tmp_path / "own.jsonl", [{**row, "level": 1} for row in rows])  # a file may hold it itself
    assert score(tmp_path / "own.jsonl", f"{home / 'rewards.py'}:by_level", "--out", tmp_path / "o.jsonl").code == 0
    assert [row["score"] for row in lines(tmp_path / "o.jsonl")] == [float(row["tokens"] % 3 == 1) for row in rows]
    assert set(lines(tmp_path / "o.jsonl")[0]) == {*KEYS, "level"}
    write_recipe(home, "strict.yaml", reward={"parts": [{"name": f"{home / 'rewards.py'}:by_level"}]})
    assert score(alone, str(home / "strict.yaml"), "--out", tmp_path / "s.jsonl").code == 0
    assert lines(tmp_path / "s.jsonl") == lines(tmp_path / "levels.jsonl")


def test_a_verifier_that_hangs_costs_its_completions_alone(home: Path, whole: Path, tmp_path: Path) -> None:
    rows = read_rows(whole / "completions.jsonl")[:6]
    rows[2] = {**rows[2], "response": "banana"}
    rows = [{**row, "response": row["response"].replace("a", "b")} if i != 2 else row for i, row in enumerate(rows)]
    append_rows(tmp_path / "c.jsonl", rows)
    said = score(tmp_path / "c.jsonl", f"{{name: '{home / 'rewards.py'}:hang', timeout: 0.5}}",
                 "--out", tmp_path / "new.jsonl")  # fmt: skip
    assert said.code == 0, said.err
    assert [row["status"] for row in lines(tmp_path / "new.jsonl")] == ["right"] * 2 + ["timeout"] + ["right"] * 3


def test_problems_without_answers_are_named_and_the_rest_scored(whole: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = lines(whole / "completions.jsonl")
    first, second = list(dict.fromkeys(row["problem"] for row in rows))[:2]
    known = [{**row, "reference": {first: None, second: "a lot"}.get(row["problem"], "3")} for row in rows]
    append_rows(tmp_path / "c.jsonl", known)
    said = score(tmp_path / "c.jsonl", "numeric", "--out", tmp_path / "n.jsonl", "--json", tmp_path / "n.json")
    assert said.code == 0 and f"2 of 6 problems cannot be judged and are left out: {first}, {second}" in said.err
    assert "2 problems without one score" in said.err
    new = lines(tmp_path / "n.jsonl")
    assert all((row["score"] is None) == (row["problem"] in (first, second)) for row in new) and len(new) == 24
    assert json.loads((tmp_path / "n.json").read_text())["problems"] == 4
    append_rows(tmp_path / "none.jsonl", [{**row, "reference": None} for row in rows])
    said = score(tmp_path / "none.jsonl", "numeric")
    assert said.code == 2 and "the answer of problem" in said.err


def test_a_reward_that_is_none_is_one_message(whole: Path, tmp_path: Path) -> None:
    assert "did you mean 'numeric'?" in score(whole, "numerc").err
    assert "unknown key 'reward.parts.0.extrct'" in score(whole, "{name: numeric, extrct: boxed}").err
    assert "neither a file nor a shipped recipe" in score(whole, "no.yaml").err
    rows = [{k: v for k, v in row.items() if k != "tokens"} for row in lines(whole / "completions.jsonl")]
    append_rows(tmp_path / "c.jsonl", rows)
    assert "24 rows do not say how many tokens" in score(tmp_path / "c.jsonl", "[exact, length]").err


# Compared.


def test_two_files_are_compared_on_the_problems_of_both(whole: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = lines(whole / "completions.jsonl")
    problems = list(dict.fromkeys(row["problem"] for row in rows))

    def made(name: str, right: list[int], **more: Any) -> Path:
        append_rows(tmp_path / name, [
            {**row, "score": float(row["sample"] < right[problems.index(row["problem"])]),
             "status": "right" if row["sample"] < right[problems.index(row["problem"])] else "wrong", **more}
            for row in rows])  # fmt: skip
        return tmp_path / name

    before, after = made("a.jsonl", [0, 1, 2, 1, 0, 3]), made("b.jsonl", [1, 3, 4, 0, 0, 3], model="other")
    said = cli("eval", "--compare", before, after, "--k", "1,4", "--json", tmp_path / "c.json")
    assert said.code == 0 and said.err == "", said.err
    found = json.loads((tmp_path / "c.json").read_text())["pass@1"]
    assert found["value"] == pytest.approx(4 / 24) and found["p"] == 10 / 16 and found["p_permutation"] == 6 / 16
    assert (found["better"], found["worse"], found["same"], found["exact"]) == (3, 1, 2, True)
    assert "+0.167 [" in said.out and "0.625" in said.out and "0.375" in said.out
    swapped = cli("eval", "--compare", after, before, "--json", tmp_path / "d.json")
    assert swapped.code == 0
    assert json.loads((tmp_path / "d.json").read_text())["pass@1"]["value"] == -found["value"]
    short = lines(after)[2:-4]
    for row in short:
        row["sampling"]["temperature"] = 0.5
    append_rows(tmp_path / "short.jsonl", short)
    said = cli("eval", "--compare", before, tmp_path / "short.jsonl", "--k", "1,4,64")
    assert said.code == 0
    for named in ("k = 64: no problem has more than 4 samples; left out, and the rest counted",
                  f"k = 4: 1 problem with fewer samples left out of it: {problems[0]} (2)",
                  f"1 problem in {before} alone, not compared: {problems[-1]}",
                  "5 problems with another sampling on one side, compared all the same"):  # fmt: skip
        assert named in said.err, (named, said.err)


def test_a_folder_stands_for_its_completions(home: Path, whole: Path) -> None:
    said = cli("eval", "--compare", whole, whole / "completions.jsonl")
    assert said.code == 0 and "+0.000 [+0.000, +0.000]" in said.out
    assert cli("eval", "--completions", whole).out == cli("eval", "--completions", whole / "completions.jsonl").out
