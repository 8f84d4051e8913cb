"""A run between its steps: its folder, its checkpoints, its clock, and the signals that end it early."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from selftaught.assemble import Parts
from selftaught.errors import UserError
from selftaught.evaluate import evaluate, evaluate_controls, flat
from selftaught.optim import Checkpoints
from selftaught.report import Health, Progress, RunFolder, Trackers

MAY_CHANGE = ("out", "report", "checkpoint")  # what a resumed run may set anew: nothing that touches its numbers


class Interrupts:
    """Ctrl-C and SIGTERM finish the step and save; a second one ends at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.caught: int | None = None
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: whoever embeds us handles signals
                continue
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        self._say("stopping after this step; everything will be saved (once more: stop at once)")


@dataclass
class Session:
    """What a run carries from step to step beside its parts; `state` of it goes into every checkpoint."""

    parts: Parts
    folder: RunFolder
    checkpoints: Checkpoints
    trackers: Trackers
    progress: Progress
    health: Health
    done: int = 0
    best: tuple[int, float] | None = None
    saved: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def restore(self) -> None:
        """Go on from the newest whole checkpoint; without one, from the beginning."""
        newest = self.checkpoints.newest()
        if newest is None:
            self.folder.truncate(-1)
            return
        tensors, state = self.checkpoints.load(newest.step)
        model = self.parts.backbone.model
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in tensors["model"].items():
                own[name].copy_(value)
        self.parts.optimizer.load(tensors["optimizer"], state["optimizer"])
        self.parts.teachers.load(tensors.get("teachers", {}), state["teachers"])
        self.parts.cursor.load_state(state["cursor"])
        self.health.load(state["health"])
        self.done = self.saved = newest.step
        self.best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
        self.checkpoints.protect(None if self.best is None else self.best[0])
        self.parts.engine.sync((), self.done)
        self.folder.truncate(self.done)
        self.progress.say(f"resumed after step {self.done} from {newest.path}")

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        if self.saved == self.done:
            return
        parts = self.parts
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "model": {name: p.detach() for name, p in parts.backbone.model.named_parameters()},
            "optimizer": parts.optimizer.state_tensors(),
        }
        if held := parts.teachers.state_tensors():
            tensors["teachers"] = held
        state = {"optimizer": parts.optimizer.state(), "teachers": parts.teachers.state(), "cursor": parts.cursor.state(),
                 "health": self.health.state(), "best": self.best}
        if self.checkpoints.save(self.done, tensors, state) is not None:
            self.saved = self.done

    def evaluate(self) -> dict[str, float]:
        """Held-out measures at this point; keeps the best checkpoint by the recipe's metric."""
        ground = self.parts.ground
        if not ground.dataset.heldout:
            return {}
        self.progress.doing("evaluating")
        began = time.monotonic()
        metrics = flat(evaluate(ground, self.parts.engine, self.folder, self.done))
        if ground.run.eval.controls and self.done in (0, ground.run.optim.steps):
            evaluate_controls(ground, self.parts.engine, self.folder, self.done)
        self.clock("evaluation", began)
        value = metrics.get(f"eval/{ground.run.eval.best}")
        if self.done and value is not None and (self.best is None or value > self.best[1]):
            self.best = (self.done, value)
            self.save()
            self.checkpoints.protect(self.done)
        return metrics

    def record(self, metrics: Mapping[str, float]) -> None:
        """One line of metrics for the step that is done."""
        self.folder.log(self.done, metrics)
        self.trackers.log(self.done, metrics)
        self.progress.step(self.done, metrics)

    def clock(self, name: str, began: float) -> float:
        """Seconds since `began`, added to the run's account."""
        taken = time.monotonic() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        return taken


def refuse_gap(metrics: Mapping[str, float], bound: float) -> None:
    """Stop where sampler and scorer are not the same distribution. Raises UserError."""
    gap = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    if not gap <= bound:
        raise UserError(f"the sampler's log-probs differ from the scorer's by {gap:.3g} nats on average, above "
                        f"rollout.max_logp_gap = {bound}: they do not hold the same weights, temperature or precision; "
                        "run `selftaught doctor`, or raise the bound if the difference is known")
