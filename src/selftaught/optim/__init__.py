"""Stage 8: the optimiser, its schedule, the teachers that follow the student, and checkpoints."""

from __future__ import annotations

from selftaught.optim.checkpoints import Checkpoint, Checkpoints
from selftaught.optim.config import CheckpointConfig, OptimConfig, learning_rate
from selftaught.optim.optimizer import Optimizer
from selftaught.optim.teachers import Teachers, check_views

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "Checkpoints",
    "OptimConfig",
    "Optimizer",
    "Teachers",
    "check_views",
    "learning_rate",
]
