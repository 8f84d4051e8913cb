"""The study of all methods: its arms, its processes, what it does not do twice, and its table."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from selftaught.errors import UserError
from selftaught.methods import names
from selftaught.recipe import recipe_names
from selftaught.run import load_run
from selftaught.studies import methods as study
from selftaught.studies import process
from tiny import save_tiny

TINY = ("optim.steps=1", "optim.warmup_steps=0", "data.train=16", "data.heldout=3", "data.shots=1",
        "rollout.num_generations=2", "rollout.prompts_per_step=2", "rollout.max_completion_length=4",
        "optim.token_budget=512",
        "eval.controls=false", "checkpoint.every=1", "report.html=false")  # fmt: skip


def test_every_controlled_method_has_its_three_arms_and_the_others_one() -> None:
    names = [arm.name for arm in study.arms(("grpo", "rlsd"), (0, 1))]
    assert names == ["grpo-right-0", "rlsd-right-0", "grpo-right-1", "rlsd-right-1",
                     "rlsd-empty-0", "rlsd-wrong-0", "rlsd-empty-1", "rlsd-wrong-1"]  # fmt: skip


def test_a_study_of_all_runs_the_methods_and_no_recipe_of_another_name() -> None:
    assert set(study.default_methods()) == set(names()) and "small/lora" in recipe_names()


@pytest.mark.parametrize("method", study.CONTROLLED)
def test_the_arms_of_every_shipped_recipe_are_runs(method: str) -> None:
    own = load_run(f"small/{method}")
    assert study.changes(study.Arm(method, "right", 0)) == []
    for kind in ("empty", "wrong"):
        run = load_run(f"small/{method}", study.changes(study.Arm(method, kind, 0)))
        assert run.privilege is not None and own.privilege is not None
        changed = run.model_copy(update={"privilege": own.privilege, "method": own.method})
        assert changed == own  # nothing but the privilege, or what would read it
        if (method, kind) == ("sdpg", "empty"):
            assert run.method.fields["beta"] == 0
        else:
            assert run.privilege.kind == kind and run.method == own.method


def test_a_study_runs_what_is_missing_once_and_makes_its_table(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out, said = save_tiny(tmp_path / "model"), tmp_path / "study", list[str]()
    extra = [f"model={model}", *TINY]
    with monkeypatch.context() as patched:
        patched.setattr(process, "_discard", lambda checkpoints: None)  # as a run that is stopped below has them
        table = study.run(out, said.append, only=("rlsd", "gkd"), jobs=2, overrides=extra)
    rows = {(row["method"], row["privilege"]): row for row in json.loads((out / "table.json").read_text())}
    assert set(rows) == {("rlsd", "right"), ("rlsd", "empty"), ("rlsd", "wrong"), ("gkd", "right"),
                         ("quickstart", "right")}
    gkd = yaml.safe_load((out / "gkd-right-0" / "run.yaml").read_text())
    assert gkd["teacher"]["model"] == str(out / "quickstart-right-0" / "final")
    assert gkd["eval"]["every"] is None and gkd["eval"]["before"] == str(out / "quickstart-right-0")
    assert set(rows["rlsd", "right"]["over"]) == {"empty", "wrong"} and rows["rlsd", "wrong"]["over"] == {}
    assert "weight" in rows["rlsd", "right"]["did"]
    assert (out / "table.md").read_text() == table + "\n" and table.count("\n") == 6

    said.clear()
    (out / "rlsd-wrong-0" / "results.json").unlink()  # as if stopped after its last checkpoint
    (out / "gkd-right-0" / "results.json").unlink()
    for step in (out / "gkd-right-0" / "checkpoints").iterdir():
        step.rename(step.with_name(f"gone-{step.name}"))  # as if stopped before its first
    assert study.run(out, said.append, only=("rlsd", "gkd"), jobs=2, overrides=extra) == table
    assert sorted(said) == ["gkd-right-0: done", "gkd-right-0: started", "rlsd-wrong-0: done", "rlsd-wrong-0: resumed"]
    assert not any((out / name / "checkpoints").exists() for name in ("gkd-right-0", "rlsd-wrong-0"))


def test_a_termination_reaches_the_runs_and_ends_the_study(tmp_path: Path) -> None:
    began = tmp_path / "began"
    code = ("import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
            f"pathlib.Path({str(began)!r}).touch(); time.sleep(60)")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), process.workers(1) as pool:
        work = pool.submit(process.follow, [sys.executable, "-c", code], tmp_path / "log", 1)
        queued = pool.submit(process.follow, [sys.executable, "-c", ""], tmp_path / "log", 1)
        while not began.exists():
            assert not work.done()  # a process that failed to begin is a failure, not a wait
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        work.result()
    assert work.result() == 7 and queued.cancelled() and signal.getsignal(signal.SIGTERM) is before


def test_after_an_interrupt_no_further_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, told, shutdown = list[str](), threading.Event(), ThreadPoolExecutor.shutdown

    def cancelled(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        told.set()
        shutdown(pool, wait=wait)

    def interrupted(recipe: str, *_: object, **__: object) -> str:
        begun.append(recipe)
        if len(begun) == 1:
            raise KeyboardInterrupt
        assert told.wait(60)  # a second run may have begun before the first one's end was heard; it lasts until then
        return ""

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", cancelled)
    monkeypatch.setattr(study, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, lambda text: None, jobs=1)
    assert begun[0] == "quickstart" and len(begun) <= 2


def test_a_failed_arm_is_named_and_the_others_stand_in_the_table(tmp_path: Path) -> None:
    model, out = save_tiny(tmp_path / "model"), tmp_path / "study"
    with pytest.raises(UserError, match=r"1 of 1 runs failed \(grpo-right-0: .*optim.steps") as told:
        study.run(out, lambda text: None, only=("grpo",), overrides=[f"model={model}", *TINY, "optim.steps=-1"])
    assert "table.md" in str(told.value)
    assert len((out / "table.md").read_text().splitlines()) == 2


def test_a_method_without_a_small_recipe_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"small/rsld.*did you mean 'rlsd'"):
        study.run(tmp_path, lambda text: None, only=("rsld",))
