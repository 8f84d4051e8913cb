"""A user's own run, made on the spot: a tiny model folder, problems, a reward in a file, a recipe; and the commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import string
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml

from tiny import save_tiny

REWARD = '''\
def score(prompts, completions, gold, level, **kwargs):
    """1 for the answer, else a little for varied text, by a column of the data."""
    assert len(prompts) == len(completions) == len(gold) == len(level)
    return [1.0 if text.strip() == answer else 0.04 * len(set(text)) + 0.01 * step
            for text, answer, step in zip(completions, gold, level)]
'''
METHOD = '''\
"""A method of a user's own, in the style of those that ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from selftaught.credit import base_credit
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist


@dataclass(frozen=True)
class Mine:
    """loss = -scale log S(y), where the teacher finds y likelier than the student does."""

    name: ClassVar[str] = "mine"
    needs: ClassVar[frozenset[str]] = frozenset({"privilege"})

    scale: float = 1.0
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View("live", "privileged")})

    scores: ClassVar[frozenset[str]] = frozenset({"teacher", "student"})

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        return {**base_credit(batch), "weight": (logp["teacher"] > logp["student"]).to(logp["student"].dtype)}

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        return TokenLoss(-self.scale * credit["weight"] * student.at_sampled)
'''
CLOCKS = ("time/", "step_time", "tokens_per_second")


class Said(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def command(*args: str | Path) -> int:
    """`selftaught ARGS` in this process, from `main()` on: its exit code; 1 for a traceback that escapes."""
    from selftaught.cli import main

    with mock.patch.object(sys, "argv", ["selftaught", *map(str, args)]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def cli(*args: str | Path) -> Said:
    """`command`, and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(*args)
    return Said(code, out.getvalue(), err.getvalue())


def forked(action: Callable[[], int], log: Path) -> int:
    """Run `action` in a forked process, which needs no imports of its own: its exit code, or minus the signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            try:
                # A fork spoils torch's pool of threads. One thread mends it; a model loader's would do so all at once.
                torch.set_num_threads(torch.get_num_threads())
                code = action()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_problems(path: Path, count: int = 30) -> Path:
    """Sums as a JSONL with columns of the user's own names."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            a, b = rng.randrange(10, 99), rng.randrange(10, 99)
            row = {"question": f"{a} + {b} (no. {number})", "gold": str((a + b) % 7), "level": number % 3}
            file.write(json.dumps(row) + "\n")
    return path


def recipe_of(home: Path, **sections: Any) -> dict[str, Any]:
    """A recipe of a few tiny steps on what `make_home` made; a section given as a mapping is merged into ours."""
    recipe: dict[str, Any] = {
        "model": str(home / "model"),
        "data": {"source": str(home / "mine.jsonl"), "columns": {"answer": "gold"}, "train": 16, "heldout": 6,
                 "template": "completion"},
        # Most tokens of an untrained model hold one of these, so that most responses end by themselves.
        "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 10,
                    "stop": list(string.ascii_lowercase)},
        "reward": {"parts": [{"name": f"{home / 'mine.py'}:score"}], "workers": 1},
        "privilege": {"kind": "answer"},
        "method": {"name": "grpo"},
        "optim": {"steps": 3, "learning_rate": 1e-3},
        "checkpoint": {"every": 2},
        "eval": {"samples": 2, "k": [1, 2]},
        "report": {"to": [], "patience": None, "html": False},
        "out": str(home / "runs" / "mine"),
    }  # fmt: skip
    for key, value in sections.items():
        ours = recipe.get(key)
        recipe[key] = {**ours, **value} if isinstance(ours, Mapping) and isinstance(value, Mapping) else value
    return recipe


def write_recipe(home: Path, name: str = "mine.yaml", **sections: Any) -> Path:
    path = home / name
    path.write_text(yaml.safe_dump(recipe_of(home, **sections)), encoding="utf-8")
    return path


def make_home(folder: Path, **model: Any) -> Path:
    """model/, mine.jsonl, mine.py and mine.yaml in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", **model)
    write_problems(folder / "mine.jsonl")
    (folder / "mine.py").write_text(REWARD)
    write_recipe(folder)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_clocks(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(CLOCKS)}
