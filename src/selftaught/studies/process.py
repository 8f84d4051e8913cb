"""The runs of a study: processes of the command line, each in a folder of its own, resumed where it was stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from selftaught.records import Say


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
    with log.open("a", encoding="utf-8") as file:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if (folder / "results.json").is_file():
        _discard(folder / "checkpoints")
        say(f"{folder.name}: done")
        return ""
    last = log.read_text(encoding="utf-8").strip().splitlines()
    say(f"{folder.name}: failed, see {log}")
    return last[-1] if last else f"exit code {done.returncode}"


@contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each follow a process; results are to be asked for within.

    After Ctrl-C, which the processes hear themselves, no further one begins.
    """
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _discard(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints, ignore_errors=True)
