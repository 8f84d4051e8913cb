"""A reward whose behaviour is named by the completion's first word: everything that a verifier may do wrong."""

import ctypes
import os
import re
import signal
import sys
import time
from types import SimpleNamespace


def _child(work):
    if os.fork() == 0:
        try:
            work()
        finally:
            os._exit(0)


def _nap():
    time.sleep(600)


def _sleep():
    while True:
        time.sleep(1)


def _spin():
    while True:
        pass


def _backtrack():  # one call in C that never gives up the interpreter's lock
    re.match(r"(x+x+)+y", "x" * 64)


def _deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _sleep()


def _children():
    for _ in range(5):
        _child(_nap)


def _swarm():  # 20 processes, each in a session of its own, then a hang
    for _ in range(20):
        _child(lambda: (os.setsid(), _nap()))
    _sleep()


def _bomb():
    while True:
        os.fork()


def _daemon():  # double fork and setsid: nobody's child
    def middle():
        os.setsid()
        _child(_nap)

    _child(middle)
    time.sleep(0.02)


def _daemon_exit():
    _daemon()
    os._exit(0)


def _orphan():  # nobody is left to clean up but the trainer
    _daemon()
    os.kill(os.getppid(), signal.SIGKILL)
    _sleep()


def _noise():
    for _ in range(4):
        print("x" * 2**20)
        print("y" * 2**20, file=sys.stderr)
        os.write(1, b"\xff\x00" * 2**19)


def _deep():
    sys.setrecursionlimit(10**9)

    def down():
        down()

    down()


def _alarm():
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _parent(number):
    return lambda: os.kill(os.getppid(), number)


def _raise(error):
    def act():
        raise error

    return act


ACTS = {
    "sleep": _sleep,
    "spin": _spin,
    "backtrack": _backtrack,
    "deaf": _deaf,
    "swarm": _swarm,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "bomb": _bomb,
    "memory": lambda: bytearray(4 << 30),
    "children": _children,
    "fork": os.fork,
    "daemon": _daemon,
    "daemon_exit": _daemon_exit,
    "orphan": _orphan,
    "exit": lambda: os._exit(3),
    "segv": lambda: ctypes.string_at(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "group": lambda: os.killpg(0, signal.SIGKILL),
    "noise": _noise,
    "deep": _deep,
    "alarm": _alarm,
    "sys_exit": lambda: sys.exit(0),
    "interrupt": _raise(KeyboardInterrupt()),
    "raise": _raise(ValueError("no \udcff good\x00")),
    "close": lambda: os.closerange(0, 256),
    "parent_term": _parent(signal.SIGTERM),
    "parent_kill": _parent(signal.SIGKILL),
    "parent_stop": _parent(signal.SIGSTOP),
}
RETURNS = {
    "text": ["1.0"],
    "number": 1.0,
    "two": [1.0, 1.0],
    "empty": [],
    "nothing": None,
    "none": [None],
    "infinite": [float("inf")],
    "object": [object()],
    "status": [SimpleNamespace(score=1.0, status="superb")],
}


def score(completions, **_):
    (text,) = completions
    word, _, _ = text.partition(" ")
    if word in RETURNS:
        return RETURNS[word]
    ACTS.get(word, lambda: None)()
    return [SimpleNamespace(score=1.0, status="right", feedback=None, answer=text)]
