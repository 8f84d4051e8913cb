"""The trainer's side of the workers: one guard process per slot, and a thread that feeds it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from selftaught.reward import guard, process
from selftaught.reward.process import Closed, Late
from selftaught.reward.verifiers import Result, result

GRACE = 5.0  # seconds that a guard has beyond the deadline of its worker before it is killed itself
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from selftaught.reward.guard import main; main(int(sys.argv[2]))"
)
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # the trainer needs the cores
Prepare = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


class GuardProcess:
    """A guard as the trainer holds it. Started on first use, and again after a verifier managed to kill it."""

    def __init__(self, spec: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> None:
        self._spec, self._functions = spec, functions
        self._mark = f"SELFTAUGHT_REWARD={secrets.token_hex(16)}"
        self._pid: int | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self.info: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start the process and wait until its functions are loaded; fills `info`. Raises Late or Closed."""
        ours, theirs = socket.socketpair()
        with theirs:
            fork = self._fork if self._functions else self._spawn
            self._pid, self._socket = fork(theirs), ours
        ours.setblocking(False)
        until = time.monotonic() + guard.START_SECONDS + GRACE
        process.write_frame(ours.fileno(), self._spec, until)
        self.info = process.read_frame(ours.fileno(), until)

    def _spawn(self, theirs: socket.socket) -> int:
        name, _, value = self._mark.partition("=")
        environment = {**dict.fromkeys(_ONE_THREAD, "1"), **os.environ, name: value}
        command = [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno())]
        self._popen = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        return self._popen.pid

    def _fork(self, theirs: socket.socket) -> int:
        """A function that cannot be imported is inherited. The child touches neither torch nor other threads."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                guard.main(theirs.fileno(), self._functions)
            finally:
                os._exit(1)
        return pid

    def verify(self, prepare: Prepare, items: int) -> list[Result]:
        """`items` results of the job that `prepare` makes from the parts' info, whatever happens."""
        seconds = 0.0
        try:
            if self._socket is None or process.readable([self._socket.fileno()], 0):
                self.kill()  # it never ran, or ended between two jobs
                self.start()
            assert self._socket is not None
            job = prepare(self.info)
            seconds, fd = job["seconds"], self._socket.fileno()
            until = time.monotonic() + guard.START_SECONDS + GRACE  # a new worker may still be loading
            process.write_frame(fd, job, until)
            process.read_frame(fd, until)  # "begun"
            results: list[Result] = process.read_frame(fd, time.monotonic() + seconds + GRACE)
            return results
        except Late:
            self.kill()
            return [result(0.0, "timeout", f"no verdict within {seconds:g} s, nor from the guard process")] * items
        except Closed:
            self.kill()
            return [result(0.0, "error", "the guard process of the verifier was killed")] * items

    def shut(self) -> None:
        """Ask the process to end, from any thread: a read in another one sees the end of file."""
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_WR)

    def close(self, seconds: float = 2 * GRACE) -> None:
        """End the process and everything below it, and wait for it."""
        self.shut()
        until = time.monotonic() + seconds
        while self._pid is not None and not self._reaped():
            if time.monotonic() > until:
                break
            time.sleep(0.002)
        self.kill()

    def kill(self) -> None:
        """End the process by force, with all that carries its mark."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pid is not None:
            process.kill(self._pid, signal.SIGKILL)
            while not self._reaped():
                time.sleep(0.001)
            process.kill_marked(self._mark.encode())

    def _reaped(self) -> bool:
        if self._popen is not None:
            ended = self._popen.poll() is not None
        else:
            try:
                ended = self._pid is None or os.waitpid(self._pid, os.WNOHANG)[0] != 0
            except ChildProcessError:  # somebody else in this process collected it
                ended = True
        if ended:
            self._pid = self._popen = None
        return ended


class Pool:
    """Verifies jobs on `workers` guards, each with its thread. Futures never hold an exception but CancelledError."""

    def __init__(self, spec: Mapping[str, Any], workers: int, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._guards = [GuardProcess(spec, functions) for _ in range(workers)]
        self._jobs: queue.SimpleQueue[tuple[Prepare, int, Future[list[Result]]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        if functions:  # to be forked while the trainer is still small: before weights, devices and threads
            for each in self._guards:
                with contextlib.suppress(Late, Closed):  # it is started again when it is needed
                    each.start()

    def submit(self, prepare: Prepare, items: int) -> Future[list[Result]]:
        if self._closed:
            raise RuntimeError("the reward's workers are closed")
        future: Future[list[Result]] = Future()
        self._jobs.put((prepare, items, future))
        if not self._threads:
            self._threads = [threading.Thread(target=self._serve, args=(each,), daemon=True) for each in self._guards]
            for thread in self._threads:
                thread.start()
        return future

    def _serve(self, slot: GuardProcess) -> None:
        while (job := self._jobs.get()) is not None:
            prepare, items, future = job
            if self._closed:
                future.set_exception(CancelledError())
                continue
            try:
                future.set_result(slot.verify(prepare, items))
            except BaseException as error:  # a fault of ours belongs to whoever waits for the result
                future.set_exception(error)

    def close(self) -> None:
        """Cancel what waits, end every process. May be called twice."""
        self._closed = True
        for each in self._guards:
            each.shut()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for each in self._guards:
            each.close()
