"""Hostile verifiers: every rollout gets one verdict by its deadline, and no process is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from selftaught.records import Problem, Prompt, Rollout, Sampling
from selftaught.reward import RewardConfig, Rewarder, pool

HOSTILE = Path(__file__).parent / "rewards" / "hostile.py"
TIMEOUT = 1.0
ODD = ("", "\x00", "a\x00b", "\ud800", "\udfff\ud83d", "\U0010ffff", "\u202e", "\r\n", '"}]', "x" * 200_000)
EXPECTED = {
    # completion's first word: status, how many of the 500
    "sleep": ("timeout", 4), "spin": ("timeout", 4), "backtrack": ("timeout", 3), "deaf": ("timeout", 2),
    "swarm": ("timeout", 3), "stop": ("timeout", 2), "parent_stop": ("timeout", 1),
    "bomb": ("error", 2), "memory": ("error", 6), "deep": ("error timeout", 2), "exit": ("error", 6),
    "segv": ("error", 6),
    "killed": ("error", 4), "group": ("error", 3), "daemon_exit": ("error", 3), "close": ("error", 3),
    "sys_exit": ("error", 4), "interrupt": ("error", 3), "raise": ("error", 6), "parent_kill": ("error", 2),
    "orphan": ("error", 2),
    "text": ("error", 2), "number": ("error", 2), "two": ("error", 2), "empty": ("error", 2), "nothing": ("error", 2),
    "infinite": ("error", 2), "object": ("error", 2), "status": ("error", 2), "none": ("unparsed", 2),
    "children": ("right", 4), "fork": ("right", 4), "daemon": ("right", 4), "noise": ("right", 4),
    "alarm": ("right", 4), "parent_term": ("right", 4),
}  # fmt: skip


def rollout(text: str) -> Rollout:
    return Rollout(Problem("p", "?", "1"), 0, Prompt((1,)), (1,), (0.0,), text, "stop", Sampling(), 0, 0)


def carriers(mark: str) -> list[psutil.Process]:
    """Living processes with `mark` in their environment, and all descendants of this one."""
    mine = set(psutil.Process().children(recursive=True))
    found = []
    for process in {*mine, *psutil.process_iter()}:
        with contextlib.suppress(psutil.Error):  # it may end between any two questions
            if (process in mine or mark in process.environ()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [p for p in found if p.pid != os.getpid()]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"MARK_{uuid.uuid4().hex}"
    monkeypatch.setenv(name, "1")
    return name


def test_500_hostile_completions_each_get_a_verdict_and_leave_nothing(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{word} {number}" for word, (_, count) in EXPECTED.items() for number in range(count)]
    texts += [odd for odd in ODD for _ in range(4)]
    texts += [f"benign {number}" for number in range(500 - len(texts))]
    random.Random(0).shuffle(texts)
    assert len(texts) == 500

    seconds: list[float] = []
    verify = pool.GuardProcess.verify

    def timed(*args: object) -> object:
        began = time.monotonic()
        found = verify(*args)  # type: ignore[arg-type]
        seconds.append(time.monotonic() - began)
        return found

    monkeypatch.setattr(pool.GuardProcess, "verify", timed)
    monkeypatch.setattr(pool, "GRACE", 2.0)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    config = RewardConfig.parse({"name": f"{HOSTILE}:score"})
    with Rewarder(config.model_copy(update={"timeout": TIMEOUT, "workers": 3})) as rewarder:
        verdicts = rewarder([rollout(text) for text in texts])
        assert len(carriers(mark)) <= 2 * 3 + len(before)  # three guards and their workers

    assert len(verdicts) == len(seconds) == 500
    wrong = []
    for text, verdict in zip(texts, verdicts, strict=True):
        status, _ = EXPECTED.get(text.partition(" ")[0], ("right", 0))
        if verdict.status not in status.split():  # how long a deep recursion takes to fill its memory is open
            wrong.append((text[:40], verdict))
        assert verdict.score == {"right": 1.0, "unparsed": None}.get(status, 0.0) or wrong
        assert verdict.feedback or status in ("right", "unparsed")
        if status == "right" and verdict.status == "right" and len(text) < 1000:
            assert verdict.answer == text  # NUL and lone surrogates survive both ways
    assert not wrong
    assert max(seconds) < TIMEOUT + 2.0 + 3.0
    assert {process.pid for process in carriers(mark)} <= before


def test_feedback_says_how_it_failed() -> None:
    said = {
        "sleep": "no verdict within 1 s", "segv": "killed by SIGSEGV", "exit": "ended with code 3",
        "bomb": "more than 64 processes", "memory": "MemoryError", "two": "2 values for 1 completions",
        "sys_exit": "SystemExit: 0 (hostile.py", "text": "str where a number or None is due",
        "parent_kill": "guard process of the verifier was killed", "nothing": "NoneType, not a list",
    }  # fmt: skip
    config = RewardConfig.parse({"name": f"{HOSTILE}:score"}).model_copy(update={"timeout": 1.0, "workers": 1})
    with Rewarder(config) as rewarder:
        verdicts = rewarder([rollout(word) for word in said])
    for (word, feedback), verdict in zip(said.items(), verdicts, strict=True):
        assert feedback in (verdict.feedback or ""), word


@pytest.mark.parametrize("word", ["children", "daemon", "fork"])
def test_what_a_verifier_started_ends_with_its_verdict(mark: str, word: str) -> None:
    config = RewardConfig.parse(f"{HOSTILE}:score").model_copy(update={"workers": 1})
    with Rewarder(config) as rewarder:
        rewarder([rollout("benign")])
        before = {process.pid for process in carriers(mark)}
        assert rewarder([rollout(word)])[0].status == "right"
        assert {process.pid for process in carriers(mark)} == before  # the same guard and the same worker


def test_a_long_text_is_cut_and_says_so() -> None:
    with Rewarder(RewardConfig.parse(f"{HOSTILE}:score")) as rewarder:
        (verdict,) = rewarder([rollout("x" * 50_000)])
    assert verdict.answer is not None and verdict.answer.endswith("[cut: 50000 characters]")
    assert len(verdict.answer) < 17_000


def test_closing_does_not_wait_for_a_hang(mark: str) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    config = RewardConfig.parse(f"{HOSTILE}:score").model_copy(update={"timeout": 60.0})
    rewarder = Rewarder(config)
    pending = rewarder.submit([rollout("spin"), rollout("swarm"), rollout("benign")])
    time.sleep(1.0)
    began = time.monotonic()
    rewarder.close()
    rewarder.close()
    assert time.monotonic() - began < 5.0 and pending.done()
    assert {process.pid for process in carriers(mark)} <= before


@pytest.mark.parametrize("inherited", [False, True])
def test_nothing_survives_a_trainer_that_is_killed(mark: str, inherited: bool) -> None:
    functions = "{'x:f': (lambda f: lambda completions: f(completions))(module.score)}" if inherited else "None"
    code = f"""
import sys, time
sys.path.insert(0, {str(HOSTILE.parent)!r})
import hostile as module
from selftaught.records import *
from selftaught.reward import RewardConfig, Rewarder
config = RewardConfig.parse({"x:f" if inherited else f"{HOSTILE}:score"!r}).model_copy(update={{"timeout": 60.0}})
rewarder = Rewarder(config, {functions})
texts = ["daemon", "daemon", "swarm", "sleep"]
rewarder.submit([Rollout(Problem("p", "?"), 0, Prompt((1,)), (1,), (0.0,), t, "stop", Sampling(), 0, 0) for t in texts])
time.sleep(2.0)
print("hanging", flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "hanging\n"
    assert len(carriers(mark)) > 20
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    until = time.monotonic() + 10.0
    while carriers(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not carriers(mark)
