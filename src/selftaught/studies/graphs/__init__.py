"""Concept graphs: what self-distillation from sampled demonstrations does to the ways in which a problem is solved."""

from __future__ import annotations

from typing import Any

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """`run`, when it is asked for: a verifier's worker imports this package too, and must not wait for torch."""
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selftaught.studies.graphs.study import run

    return run
