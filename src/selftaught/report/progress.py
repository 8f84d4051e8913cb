"""What a run says while it runs: a live line on a terminal, one plain line for each step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text


class Progress:
    """Step i of N, reward, latest held-out pass@1, tokens per second and the time left.

    with Progress(total=40) as progress:
        progress.step(1, {"reward": 0.2, "eval/pass@1": 0.15, "tokens_per_second": 310.0})
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.total = total
        self.console = console or Console()
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._first: tuple[int, float] | None = None  # the first step done by this process, and when
        self._done = 0
        self._latest: dict[str, float] = {}
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._live:
            columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(24), _Tail())
            self._bar = Bar(*columns, console=self.console, refresh_per_second=2)
            self._task = self._bar.add_task("", total=self.total, facts="", phase="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Step number `step` (from 1) is done."""
        self._done = step
        self._first = self._first or (step, time.monotonic())
        self._latest.update({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        facts = self._facts(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts, phase="")
        else:
            self._print(f"step {step}/{self.total}  {facts}")

    def doing(self, what: str) -> None:
        """What goes on now ("evaluating 96/256"): on the live line only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, phase=what)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._print(text)

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""
        self._print(f"warning: {text}", style="yellow")

    def seconds_left(self) -> float | None:
        """By the mean pace since this process's first step, evaluations included; right after it, by `step_time`."""
        if self._first is None:
            return None
        step, when = self._first
        done = self._done - step
        pace = (time.monotonic() - when) / done if done > 0 else self._latest.get("step_time")
        return None if pace is None else pace * (self.total - self._done)

    def _facts(self, metrics: Mapping[str, Any]) -> str:
        parts = []
        if isinstance(metrics.get("reward"), int | float):
            parts.append(f"reward {metrics['reward']:.3f}")
        if "eval/pass@1" in self._latest:
            parts.append(f"held-out pass@1 {self._latest['eval/pass@1']:.3f}")
        if isinstance(metrics.get("tokens_per_second"), int | float):
            parts.append(f"{metrics['tokens_per_second']:.0f} tok/s")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _print(self, text: str, style: str | None = None) -> None:
        console = self._bar.console if self._bar is not None else self.console
        # Not markup: a path or an answer in square brackets must come out as it is.
        console.print(Text(text, style=style or ""), soft_wrap=True)


class _Tail(TextColumn):
    """The facts, and beside them what goes on now."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        facts, phase = task.fields["facts"], task.fields["phase"]
        return Text(facts + (f"  ({phase})" if phase else ""))


def duration(seconds: float) -> str:
    """ "48 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
