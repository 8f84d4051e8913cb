"""The runs of a study: processes of the command line, each in a folder of its own, resumed where it was stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from selftaught.records import Say

_running: set[subprocess.Popen[bytes]] = set()
_told: list[int] = []  # the signals that have been passed on: who begins after one hears it too


def follow(command: Sequence[str], log: Path, jobs: int, environment: Mapping[str, str] | None = None) -> int:
    """Run `command` to its end, one of `jobs` at a time, what it says at the end of `log`; its exit code."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})})
    _running.add(process)
    for number in _told:
        process.send_signal(number)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        raise
    finally:
        _running.discard(process)


def train(recipe: str, folder: Path, overrides: Sequence[str], say: Say, *, jobs: int = 1) -> str:
    """Run `recipe` to its end in `folder`, whose name is the run's; its last words if it failed, else "".

    A finished run is not run again, and its checkpoints go: those of a whole study would fill a disk. What the process
    says goes to FOLDER.log. `jobs` run at a time, so each gets its share of the processors.
    """
    if (folder / "results.json").is_file() and (folder / "final").is_dir():
        return ""
    resume = any((folder / "checkpoints").glob("step-*"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint: nothing in it is needed
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "selftaught.cli", "train", recipe, f"out={folder}", *overrides,
               *(["--resume"] if resume else [])]  # fmt: skip
    log = folder.with_name(f"{folder.name}.log")
    say(f"{folder.name}: {'resumed' if resume else 'started'}")
    code = follow(command, log, jobs)
    if (folder / "results.json").is_file():
        _discard(folder / "checkpoints")
        say(f"{folder.name}: done")
        return ""
    last = log.read_text(encoding="utf-8").strip().splitlines()
    say(f"{folder.name}: failed, see {log}")
    return last[-1] if last else f"exit code {code}"


@contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each follow a process; results are to be asked for within.

    After Ctrl-C, which the processes hear themselves, or SIGTERM, which is passed on to them, no further one begins.
    """
    with _passing_on(signal.SIGTERM), ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _passing_on(number: signal.Signals) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        _told.append(number)
        for process in list(_running):
            process.send_signal(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(number, stop)
    except ValueError:  # not the main thread: whoever embeds us handles signals
        yield
        return
    try:
        yield
    finally:
        _told.clear()
        signal.signal(number, before or signal.SIG_DFL)


def _discard(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints, ignore_errors=True)
