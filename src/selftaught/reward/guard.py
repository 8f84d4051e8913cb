"""The guard: a small process between the trainer and one worker. It alone decides when a worker must die.

It forks the worker, hands it one job at a time, and gives the trainer one list of results per job by the
deadline, whatever the worker does. It is a subreaper, so that processes which the worker detached come back
to it; it ends, with all of them, when the trainer's end of the socket closes. Verifier libraries are imported
here once, so that a worker is replaced in milliseconds; users' code is only ever loaded in the worker.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from selftaught.reward import process
from selftaught.reward.process import Closed, Late
from selftaught.reward.verifiers import Result, result
from selftaught.reward.worker import run_worker

START_SECONDS = 120.0  # for importing users' modules
MAX_PROCESSES = 64  # that a verifier may have at a time
MAX_REPLY = 64 << 20  # bytes
_PRELOAD = {"math": "math_verify", "gym": "reasoning_gym"}
_SIGNALS = [getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "ALRM", "TSTP")]


class _Swarm(Exception):
    """The worker started too many processes."""


class _TrainerGone(Exception):
    """The trainer closed its end, or died."""


def main(fd: int, functions: Mapping[str, Callable[..., Any]] | None = None) -> NoReturn:
    """Serve the trainer at `fd` until it closes. The first frame is the spec, the first reply the parts' info."""
    code = 1
    guard = None
    try:
        _settle(fd)
        spec = process.read_frame(fd)
        for name in {_PRELOAD[part["name"]] for part in spec["parts"] if part["name"] in _PRELOAD}:
            with contextlib.suppress(ImportError):  # the check before the run says what to install
                importlib.import_module(name)
        gc.freeze()
        guard = _Guard(fd, spec, functions or {})
        info, failure = guard.ready()
        process.write_frame(fd, info if info is not None else [{"error": failure}] * len(spec["parts"]))
        while True:
            guard.wait_for_trainer()
            process.write_frame(fd, guard.verify(process.read_frame(fd)))
            guard.start_if_none()  # while the trainer thinks
    except (Closed, _TrainerGone):
        code = 0
    except BaseException:  # a fault of ours: the trainer sees that this process ended
        traceback.print_exc()
    finally:
        if guard is not None:
            guard.destroy()
        os._exit(code)


def _settle(fd: int) -> None:
    """Become deaf to signals that a worker may send, leave the trainer's files, and adopt orphans."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _keep_only(fd)
    process.become_subreaper()


def _keep_only(fd: int) -> None:
    """Keep `fd` and standard error; standard input and output become empty."""
    process.close_all_but({0, 1, 2, fd})
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


class _Guard:
    def __init__(self, trainer: int, spec: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> None:
        self.trainer, self.spec, self.functions = trainer, spec, functions
        self.parent = os.getppid()
        self.pid: int | None = None
        self.fd = -1
        self.is_ready = False
        self.start_if_none()

    def start_if_none(self) -> None:
        """Fork a worker, in a session of its own, that loads the functions while this process goes on."""
        if self.pid is not None:
            return
        ours, theirs = socket.socketpair()
        guard_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker(guard_pid, theirs.fileno())
            finally:
                os._exit(1)
        theirs.close()
        ours.setblocking(False)
        self.pid, self.fd, self.is_ready = pid, ours.detach(), False

    def _become_worker(self, guard_pid: int, fd: int) -> None:
        os.setsid()
        process.die_with_parent()
        process.become_subreaper()
        if os.getppid() != guard_pid:  # it died before the line above
            os._exit(1)
        _keep_only(fd)
        os.dup2(1, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        run_worker(fd, self.spec, self.functions)

    def ready(self) -> tuple[list[dict[str, Any]] | None, str]:
        """The first frame of a new worker, or why there is none."""
        try:
            info = self._await(time.monotonic() + START_SECONDS)
        except (Late, Closed, _Swarm) as error:
            return None, self._bury(error, START_SECONDS)["feedback"]
        self.is_ready = True
        return info, ""

    def verify(self, job: Mapping[str, Any]) -> list[Result]:
        """The worker's results for `job`, or one failure per item by the deadline."""
        if self.is_ready and (self._has_ended() or process.readable([self.fd], 0)):
            self.destroy()  # it ended, or spoke unasked, between two jobs
        self.start_if_none()
        if not self.is_ready:
            info, failure = self.ready()
            if info is None:
                process.write_frame(self.trainer, "begun")
                return [result(0.0, "error", failure)] * len(job["items"])
        process.write_frame(self.trainer, "begun")  # from here on the trainer counts too
        seconds = job["seconds"]
        deadline = time.monotonic() + seconds
        try:
            process.write_frame(self.fd, job, deadline)
            results = self._await(deadline)
            if not isinstance(results, list) or len(results) != len(job["items"]):
                raise Closed("not the results")
        except (Late, Closed, _Swarm) as error:
            return [self._bury(error, seconds)] * len(job["items"])
        return results

    def _await(self, deadline: float) -> Any:
        """The worker's next frame, while watching the clock, the trainer and the number of processes."""
        pause = 0.1
        while True:
            now = time.monotonic()
            if now >= deadline:
                raise Late
            ended = self._has_ended()
            ready = process.readable([self.fd, self.trainer], 0.0 if ended else min(pause, deadline - now))
            if self.trainer in ready or os.getppid() != self.parent:
                raise _TrainerGone
            if self.fd in ready:
                return process.read_frame(self.fd, deadline, MAX_REPLY)
            if ended:
                raise Closed("the worker ended")
            looked = time.monotonic()
            if len(process.descendants(os.getpid())) > MAX_PROCESSES:
                raise _Swarm
            pause = max(0.1, 20 * (time.monotonic() - looked))  # watching costs at most a twentieth of a core

    def _has_ended(self) -> bool:
        """Is the worker dead? A process that it left behind may hold its socket open: no end of file then."""
        assert self.pid is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _bury(self, error: Exception, seconds: float) -> Result:
        """Kill the worker that failed by `error`, and say how it ended."""
        status, how = "error", f"it started more than {MAX_PROCESSES} processes"
        if isinstance(error, Late):
            status, how = "timeout", f"no verdict within {seconds:g} s"
        elif isinstance(error, Closed):
            how = self._ending()
        self.destroy()
        return result(0.0, status, how)

    def _ending(self) -> str:
        assert self.pid is not None
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid and os.WIFSIGNALED(status):
                return f"the worker process was killed by {signal.Signals(os.WTERMSIG(status)).name}"
            if pid:
                return f"the worker process ended with code {os.WEXITSTATUS(status)}"
            time.sleep(0.002)
        return "the worker process broke off its answer"

    def destroy(self) -> None:
        """Kill the worker and everything that it started."""
        if self.pid is not None:
            os.close(self.fd)
            process.kill_group(self.pid)
            self.pid, self.is_ready = None, False
        process.kill_descendants()

    def wait_for_trainer(self) -> None:
        while not process.readable([self.trainer], 1.0):
            if os.getppid() != self.parent:
                raise _TrainerGone
