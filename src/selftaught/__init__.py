"""selftaught: language models trained on their own rollouts."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from selftaught.methods import chunked_objective, objective
    from selftaught.records import TokenBatch, Verdict
    from selftaught.run import Run
    from selftaught.train import train

_HOME = {"train": "train", "Run": "run", "TokenBatch": "records", "objective": "methods",
         "chunked_objective": "methods", "Verdict": "records"}

__all__ = ["Run", "TokenBatch", "Verdict", "chunked_objective", "objective", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'selftaught' has no attribute {name!r}")
    return getattr(import_module(f"selftaught.{_HOME[name]}"), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule `selftaught.train` would hide the function of the same name behind it.
        if name == "train" and isinstance(value, ModuleType):
            value = value.train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
