"""A run between its steps: its folder, its checkpoints, its clock, and the signals that end it early."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from selftaught.assemble import Parts
from selftaught.engines import PLACE
from selftaught.errors import UserError
from selftaught.evaluate import evaluate, evaluate_controls, flat, heldout
from selftaught.leakage import Watch
from selftaught.optim import Checkpoint, Checkpoints
from selftaught.report import Health, Progress, RunFolder, Trackers, versions
from selftaught.run import Run

# What a resumed run may set anew: nothing that touches its numbers.
MAY_CHANGE = ("out", "report", "checkpoint", "eval.before", *PLACE)


class Interrupts:
    """Ctrl-C and SIGTERM finish the step and save; a second one ends at once.

    SIGTERM often comes twice at a time, from a scheduler to the whole group and from the process that follows this one.
    """

    ONE = 2.0  # seconds within which two SIGTERMs are one

    def __init__(self) -> None:
        self.caught: int | None = None
        self._at = 0.0
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
        if number == signal.SIGTERM == self.caught and time.monotonic() - self._at < self.ONE:
            return
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught, self._at = number, time.monotonic()
        # Written past Python's buffers and locks, which the code that was interrupted may hold.
        os.write(2, b"\nstopping after this step or evaluation, then saving; once more: stop at once\n")


@dataclass
class Place:
    """Where a run lives, and the checkpoint that it goes on from; None: it begins."""

    folder: RunFolder
    checkpoints: Checkpoints
    start: Checkpoint | None
    resume: bool

    @classmethod
    def take(cls, run: Run, resume: bool, progress: Progress) -> Place:
        """Raises UserError where the folder holds another run, another recipe's, only broken checkpoints, or a run that
        has ended and left none.
        """
        folder = RunFolder(run.out, resume=resume, warn=progress.warn)
        checkpoints = Checkpoints(folder.checkpoints, run.checkpoint.keep, progress.warn)
        start = checkpoints.newest() if resume else None
        if resume and start is None:
            cls._refuse_to_begin(folder, checkpoints)
            progress.say(f"nothing to resume in {folder.path}: the run begins")
        if start is not None or (resume and (folder.path / "run.yaml").exists()):
            folder.write_run(run.resolved(), may_change=MAY_CHANGE)
        return cls(folder, checkpoints, start, resume)

    @staticmethod
    def _refuse_to_begin(folder: RunFolder, checkpoints: Checkpoints) -> None:
        """A run begins where there is no checkpoint, unless that would throw away what an earlier one made."""
        if checkpoints.steps():
            raise UserError(f"resume: no checkpoint in {folder.checkpoints} is whole; mend one, or begin anew with "
                            "another out")
        ended = next((path for path in (folder.final, folder.path / "results.json") if path.exists()), None)
        if ended is not None:
            raise UserError(f"resume: this run has ended ({ended} is there) and has no checkpoints to go on from; "
                            "use what it made, or begin anew with another out")

    @property
    def resumed_step(self) -> int | None:
        """What was logged after it is void; None: nothing was logged yet."""
        return self.start.step if self.start else -1 if self.resume else None

    def begin(self, run: Run) -> None:
        """Write what a run starts with, now that everything stands; forget what a killed run logged too much."""
        if self.resume:
            self.folder.truncate(self.start.step if self.start else -1)
        if self.start is None:
            (self.folder.path / "versions.json").unlink(missing_ok=True)
            self.folder.write_run(run.resolved(), may_change=MAY_CHANGE)
        self.folder.write_versions(versions())


@dataclass
class Session:
    """What a run carries from step to step beside its parts; `state` of it goes into every checkpoint."""

    parts: Parts
    folder: RunFolder
    checkpoints: Checkpoints
    trackers: Trackers
    progress: Progress
    health: Health
    watch: Watch | None = None
    done: int = 0
    best: tuple[int, float] | None = None  # step and measure of the best checkpoint on disk
    better: tuple[int, float] | None = None  # the same of this step, where it is better and not yet saved
    saved: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def restore(self, start: Checkpoint) -> None:
        """Go on from that checkpoint."""
        tensors, state = self.checkpoints.load(start.step)
        external = self.parts.external
        if external is not None:
            external.refuse_change(state.get("external"))
        self.parts.refuse_change(state.get("base"))
        model = self.parts.backbone.model
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in tensors["model"].items():
                own[name].copy_(value)
        self.parts.optimizer.load(tensors["optimizer"], state["optimizer"])
        self.parts.teachers.load(tensors.get("teachers", {}), state["teachers"])
        self.parts.cursor.load_state(state["cursor"])
        self.health.load(state["health"])
        self.seconds = dict(state["seconds"])
        self.done = self.saved = start.step
        self.best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
        self.checkpoints.protect(None if self.best is None else self.best[0])
        self.parts.engine.sync(self.parts.backbone.exported(), self.done)
        self.progress.say(f"resumed after step {self.done} from {start.path}")

    def save_is_due(self) -> bool:
        run = self.parts.ground.run
        return self.done % run.checkpoint.every == 0 or self.done == run.optim.steps or self.better is not None

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        if self.saved == self.done:
            return
        parts = self.parts
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "model": {name: p.detach() for name, p in parts.backbone.model.named_parameters() if p.requires_grad},
            "optimizer": parts.optimizer.state_tensors(),
        }
        if held := parts.teachers.state_tensors():
            tensors["teachers"] = held
        best = self.better or self.best
        state = {"optimizer": parts.optimizer.state(), "teachers": parts.teachers.state(),
                 "cursor": parts.cursor.state(), "health": self.health.state(), "best": best, "seconds": self.seconds,
                 "external": parts.external.digest if parts.external else None, "base": parts.base}
        self.checkpoints.protect(None if best is None else best[0])
        if self.checkpoints.save(self.done, tensors, state) is not None:
            self.saved, self.best = self.done, best
        self.better = None
        self.checkpoints.protect(None if self.best is None else self.best[0])

    def farewell(self) -> str:
        """What a run that was stopped says last."""
        steps = self.parts.ground.run.optim.steps
        if self.saved != self.done:
            return f"stopped after step {self.done} of {steps}, but its checkpoint could not be written: see above"
        return f"stopped after step {self.done} of {steps}, all of it saved; go on with the same command and --resume"

    def evaluate(self) -> dict[str, float]:
        """Held-out measures at this point, and whether they are the best so far by the recipe's metric."""
        ground = self.parts.ground
        if not ground.dataset.heldout:
            return {}
        count = f"{len(heldout(ground))} held-out problems, {ground.run.eval.samples} samples each"
        if self.done == 0:
            self.progress.say(f"evaluating before training: {count}")
        self.progress.doing(f"evaluating: {count}")
        began = time.monotonic()
        metrics = flat(evaluate(ground, self.parts.engine, self.folder, self.done))
        if ground.run.eval.controls and self.done in (0, ground.run.optim.steps):
            evaluate_controls(ground, self.parts.engine, self.folder, self.done, self.parts.external)
        self.clock("evaluation", began)
        value = metrics.get(f"eval/{ground.run.eval.best}")
        if self.done and value is not None and (self.best is None or value > self.best[1]):
            self.better = (self.done, value)
        return metrics

    def record(self, metrics: Mapping[str, float]) -> None:
        """One line of metrics for the step that is done; step 0 is before training."""
        if not metrics:
            return
        self.folder.log(self.done, metrics)
        self.trackers.log(self.done, metrics)
        self.progress.step(self.done, metrics)

    def clock(self, name: str, began: float) -> float:
        """Seconds since `began`, added to the run's account."""
        taken = time.monotonic() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        return taken
