"""Coefficients that depend on the step alone."""

from __future__ import annotations


def linear_decay(value: float, step: int, decay: int | None) -> float:
    """value max(0, 1 - step / decay); constant where `decay` is 0 or None."""
    return value * max(0.0, 1 - step / decay) if decay else value


def trapezoid(value: float, step: int, warmup: int, decay: int, steps: int) -> float:
    """value ramp(step / warmup) ramp((steps - step) / decay); ramp clamps to [0, 1], and is 1 where it divides by 0."""
    return value * _ramp(step, warmup) * _ramp(steps - step, decay)


def _ramp(part: int, whole: int) -> float:
    return min(1.0, max(0.0, part / whole)) if whole else 1.0
