"""Stage 3, reward: score, feedback and status of each rollout, found in killable worker processes.

The names below are loaded on first use, because the worker processes import this package too and must
start in milliseconds: they need neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selftaught.reward.config import RewardConfig, RewardPart, from_callables
    from selftaught.reward.rewarder import Pending, Rewarder, check, judgeable

__all__ = ["Pending", "RewardConfig", "RewardPart", "Rewarder", "check", "from_callables", "judgeable"]

_HOMES = {"RewardConfig": "config", "RewardPart": "config", "from_callables": "config"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'rewarder')}"), name)
