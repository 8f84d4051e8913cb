"""Copies of the metrics for TensorBoard, wandb and trackio. metrics.jsonl stays the record."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from selftaught.errors import UserError
from selftaught.records import Section

Name = Literal["tensorboard", "wandb", "trackio"]


class ReportConfig(Section):
    """What a run writes beside its metrics."""

    to: tuple[Name, ...] = Field(("tensorboard",), description="trackers that get a copy of every metric")
    project: str = Field("selftaught", description="project's name at wandb and trackio")
    save_rollouts: bool = Field(True, description="keep every training rollout in rollouts/step-N.jsonl")
    patience: int | None = Field(8, ge=1, description="dead steps in a row before a run stops; null: it never does")
    html: bool = Field(True, description="write report.html at the end")


MODULES: dict[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
INSTALL = "pip install 'selftaught[trackers]'"


def check_trackers(config: ReportConfig) -> None:
    """Raise UserError for a tracker that the recipe names and that is not installed. Needs no model and no folder."""
    for name in config.to if "to" in config.model_fields_set else ():
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UserError(f"report.to: {name} is not installed; {INSTALL}, or set report.to to []")


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """All trackers of a run. One that fails is dropped with one warning; the run goes on."""

    def __init__(
        self,
        config: ReportConfig,
        folder: Path,
        run_name: str,
        *,
        run: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """`run` is the resolved recipe, shown by wandb and trackio. `resume_step`: hide what came after it.

        UserError: a tracker that the recipe names is not installed. TensorBoard as the mere default is
        then left out, with one warning.
        """
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.to):
            try:
                self._open[name] = _OPENERS[name](config, Path(folder), run_name, dict(run or {}), resume_step)
            except ImportError as error:
                if "to" in config.model_fields_set:
                    raise UserError(f"report.to: {name} is not installed; {INSTALL}, or set report.to to []") from error
                warn(f"{name} is not installed, so metrics go to metrics.jsonl alone ({INSTALL})")
            except Exception as error:
                warn(f"{name} could not be opened ({error}); metrics.jsonl goes on without it")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the finite numbers among `metrics`."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name in list(self._open):
            self._guarded(name, lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        for name in list(self._open):
            self._guarded(name, lambda tracker: tracker.close())
        self._open.clear()

    def _guarded(self, name: str, action: Callable[[Tracker], None]) -> None:
        # A tracker is somebody else's program, network or disk: whatever it raises must not end a run.
        try:
            action(self._open[name])
        except Exception as error:
            del self._open[name]
            self._warn(f"{name} stopped ({error}); metrics.jsonl goes on")


class _TensorBoard:
    def __init__(self, config: ReportConfig, folder: Path, run_name: str, run: Any, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # TensorBoard writes both "@" and "^" as "_": pass@8 and pass^8 would be one curve.
            self._writer.add_scalar(name.replace("^", "_hat_"), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: ReportConfig, folder: Path, run_name: str, run: Any, resume_step: int | None) -> None:
        import wandb

        settings: dict[str, Any] = {
            "project": config.project, "name": run_name, "dir": str(folder), "config": run, "resume": "allow",
        }  # fmt: skip
        try:
            self._run = wandb.init(**settings)
        except Exception:  # without an account or a network: keep the run on this machine, to be synced later
            self._run = wandb.init(**settings, mode="offline")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, config: ReportConfig, folder: Path, run_name: str, run: Any, resume_step: int | None) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=config.project, name=run_name, config=run, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


_OPENERS: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
