"""Containment: frames over pipes, limits, and the killing of every process that a verifier started.

Only the standard library: this runs in the guards and workers, which must start in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

MAX_FRAME = 256 << 20  # bytes; a longer frame is a broken peer
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Closed(Exception):
    """The peer closed its end, or sent what is no frame."""


class Late(Exception):
    """The deadline passed before the frame was whole."""


def write_frame(fd: int, value: Any, deadline: float | None = None) -> None:
    """Length and JSON, escaped to ASCII, so that lone surrogates and NUL survive. Raises Late or Closed.

    A `deadline` is kept only where `fd` does not block.
    """
    data = json.dumps(value, ensure_ascii=True).encode("ascii")
    view = memoryview(struct.pack(">Q", len(data)) + data)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError as error:
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Late from error
        except OSError as error:
            raise Closed(str(error)) from error


def read_frame(fd: int, deadline: float | None = None, limit: int = MAX_FRAME) -> Any:
    """One frame; waits until `deadline` (on time.monotonic). Raises Late or Closed."""
    (size,) = struct.unpack(">Q", _read(fd, 8, deadline))
    if size > limit:
        raise Closed(f"a frame of {size} bytes is over the limit of {limit}")
    try:
        return json.loads(_read(fd, size, deadline))
    except ValueError as error:
        raise Closed("not a frame") from error


def _read(fd: int, size: int, deadline: float | None) -> bytes:
    chunks = []
    while size:
        if deadline is not None and not readable([fd], deadline - time.monotonic()):
            raise Late
        try:
            chunk = os.read(fd, min(size, 1 << 20))
        except OSError as error:
            raise Closed(str(error)) from error
        if not chunk:
            raise Closed("end of file")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def readable(fds: list[int], seconds: float) -> list[int]:
    """Those of `fds` that have data or were closed, within `seconds`. poll: works for any number of open files."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)]


def close_all_but(keep: set[int]) -> None:
    """Close every file of this process that is not in `keep`."""
    for name in os.listdir("/dev/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def become_subreaper() -> None:
    """Orphans among this process's descendants, setsid or not, come back to it and not to init (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def limit_process(memory_mb: int | None) -> None:
    """No core files, files of at most 256 MiB, and `memory_mb` of address space above what is in use now."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 256 << 20}
    with contextlib.suppress(OSError):
        if memory_mb is not None:
            with open("/proc/self/statm") as statm:
                limits[resource.RLIMIT_AS] = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (
                    memory_mb << 20
                )
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def descendants(root: int) -> list[int]:
    """Ids of all processes below `root`, from one walk over /proc (empty where there is none)."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                    # The command may hold spaces and brackets: what follows its last bracket is fixed.
                    parent = int(stat.read().rpartition(b")")[2].split()[1])
                    children.setdefault(parent, []).append(int(name))
    below, queue = [], [root]
    while queue:
        found = children.get(queue.pop(), [])
        below += found
        queue += found
    return below


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signum)


def kill_group(pid: int) -> None:
    """SIGKILL to a whole process group at once: a fork bomb cannot outrun it."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def reap() -> bool:
    """Collect the children that have ended. True if none, ended or running, is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def kill_descendants(seconds: float = 5.0) -> bool:
    """Kill and reap everything below this process, which must be a subreaper. True if nothing is left.

    A round stops every process that it finds before it kills any, so that a swarm cannot go on forking
    meanwhile. One system call where there are no children at all.
    """
    until = time.monotonic() + seconds
    while not reap():
        below = descendants(os.getpid())
        for pid in below:
            kill(pid, signal.SIGSTOP)
        for pid in below:
            kill(pid)
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def kill_marked(mark: bytes, seconds: float = 2.0) -> None:
    """Kill every process that was started with `mark` in its environment: the last resort, when a guard died."""
    until = time.monotonic() + seconds
    found = True
    while found and time.monotonic() < until:
        found = False
        with contextlib.suppress(OSError):
            for name in os.listdir("/proc"):
                if name.isdigit() and int(name) != os.getpid():
                    with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                        if mark in environ.read():
                            kill(int(name))
                            found = True
