"""Compiling the loops of `cpu/`, where the machine has a C compiler, and keeping them in the cache folder.

They are compiled once for each kind of processor. Their threads are torch's own: its OpenMP library is loaded already,
and serves what names no other. Without a compiler, or with SELFTAUGHT_LOOPS=0, there are none.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from selftaught.places import cache_folder
from selftaught.processor import kind

SOURCES = sorted(Path(__file__).with_name("cpu").glob("*.c"))
HEADERS = sorted(Path(__file__).with_name("cpu").glob("*.h"))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC")
# Symbols that stay open are found in torch's own OpenMP library; other compilers bring theirs, or go without threads.
THREADS = ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), (("-fopenmp-simd",), ()))
SECONDS = 30.0  # that a compiler may take


def libraries() -> Iterator[ctypes.CDLL]:
    """The loops by each compiler and kind of threads, the best first; the caller takes the first that is right."""
    if os.environ.get("SELFTAUGHT_LOOPS") == "0":
        return
    try:
        compilers = _compilers()
    except ValueError:  # $CC is no command
        return
    for command in compilers:
        for compiled, linked in THREADS:
            try:
                yield _loaded(command, compiled, linked)
            except subprocess.TimeoutExpired:  # the next attempt would take as long
                return
            except (OSError, subprocess.SubprocessError):
                continue


def _loaded(command: Sequence[str], compiled: Sequence[str], linked: Sequence[str]) -> ctypes.CDLL:
    """Raises OSError or SubprocessError where that fails."""
    return ctypes.CDLL(str(_built(command, compiled, linked)))


def _compilers() -> list[list[str]]:
    """The commands that may compile C here: what $CC says, or the usual names."""
    chosen = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["cc"], ["gcc"], ["clang"]]
    return [command for command in chosen if command and shutil.which(command[0])]


def _built(command: Sequence[str], compiled: Sequence[str], linked: Sequence[str]) -> Path:
    """The compiled file, from the cache or made now. Raises OSError or SubprocessError where that fails."""
    sources = [source.read_text(encoding="utf-8") for source in (*HEADERS, *SOURCES)]
    told = [*command, _run([*command, "--version"]), *FLAGS, *compiled, *linked, kind(), *sources]
    name = f"loops-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    folder = _folder()
    if not _is_whole(folder / name):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            objects = [f"{source.stem}.o" for source in SOURCES]
            steps = [[*command, *FLAGS, *compiled, "-c", *map(str, SOURCES)],
                     [*command, *linked, "-shared", *objects, "-o", name, "-lm"]]
            for step in steps:
                _run(step, work)
            (Path(work) / "sum").write_text(_sum(Path(work) / name), encoding="utf-8")
            os.replace(Path(work) / name, folder / name)  # whole or not at all, whoever else compiles it
            os.replace(Path(work) / "sum", _sum_of(folder / name))
    return folder / name


def _is_whole(library: Path) -> bool:
    """Is it there as it was compiled? To load one that was cut short ends the process."""
    try:
        return _sum_of(library).read_text(encoding="utf-8") == _sum(library)
    except (OSError, UnicodeDecodeError):
        return False


def _sum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _sum_of(library: Path) -> Path:
    """Where its checksum is kept."""
    return library.with_suffix(".sha256")


def _run(command: Sequence[str], folder: str | None = None) -> str:
    """What the command prints. Raises OSError or SubprocessError; what takes too long is ended with all it began."""
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return said


def _folder() -> Path:
    """In the cache folder; where there is none that can be written, one of this process."""
    try:
        folder = cache_folder() / "loops"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return _own_folder()


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="selftaught-loops-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
