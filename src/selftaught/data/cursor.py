"""The endless order over the training problems."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from selftaught.errors import UserError
from selftaught.records import Problem


class Cursor:
    """Every problem once per epoch, in a fresh order keyed by (seed, epoch); `state` resumes it exactly.

    No step draws one problem twice, also not where it runs over the end of an epoch: randomness is keyed by
    (step, problem, sample), so a problem drawn twice in one step would give the same rollouts twice.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int) -> None:
        self._problems = {problem.id: problem for problem in problems}
        assert len(self._problems) == len(problems), "problems must be distinct"
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._moved: list[str] = []  # ids that the step over the epoch's end drew before it: they come last
        self._order = self._permutation()

    @property
    def epoch(self) -> int:
        """How many times every problem was drawn."""
        return self._epoch

    def __len__(self) -> int:
        """How many problems there are."""
        return len(self._problems)

    def next(self, n: int, already: Sequence[str] = ()) -> list[Problem]:
        """The next `n` problems, all different, and different from those that the step drew `already` (their ids).

        Raises UserError where there are not so many.
        """
        if n + len(already) > len(self._problems):
            raise UserError(
                f"rollout.prompts_per_step: {n + len(already)} problems a step, but there are only "
                f"{len(self._problems)} to train on; lower it or raise data.train"
            )
        ids = self._order[self._position : self._position + n]
        self._position += len(ids)
        if len(ids) < n:
            self._epoch += 1
            self._moved = [*already, *ids]
            self._order = self._permutation()
            self._position = n - len(ids)
            ids = ids + self._order[: self._position]
        return [self._problems[identity] for identity in ids]

    def state(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "moved": list(self._moved),
            "problems": self._digest(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken. Raises UserError where the problems or the seed are not the same."""
        if state["problems"] != self._digest() or state["seed"] != self._seed:
            raise UserError(
                "data: the training problems or the seed are not those of the saved run, so it cannot be resumed "
                "exactly; restore the data, or start a new run in another folder"
            )
        self._epoch, self._position, self._moved = state["epoch"], state["position"], list(state["moved"])
        self._order = self._permutation()

    def _permutation(self) -> list[str]:
        def key(identity: str) -> tuple[bool, bytes]:
            return identity in moved, hashlib.sha256(f"{self._seed}/{self._epoch}/{identity}".encode()).digest()

        moved = set(self._moved)
        return sorted(self._problems, key=key)

    def _digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._problems)).encode()).hexdigest()
