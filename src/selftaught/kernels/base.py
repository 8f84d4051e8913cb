"""What the kernels of all devices have in common: what they say of rows of logits, and a switch that turns them off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

_off = False


class Statistics(NamedTuple):
    """Of n rows of logits, (n,) each: log-sum-exp, log-prob of the sampled token, entropy."""

    lse: Tensor
    logp: Tensor
    entropy: Tensor


class Side(NamedTuple):
    """Rows of logits (n, V), what multiplies them (1 / temperature), and their log-sum-exps (n,) when multiplied."""

    logits: Tensor
    scale: float
    lse: Tensor

    @property
    def given(self) -> tuple[Tensor, int, float, Tensor]:
        """As a kernel of a GPU takes them."""
        return self.logits, self.logits.stride(0), self.scale, self.lse


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Use torch's operators alone, to compare with."""
    global _off
    _off, before = True, _off
    try:
        yield
    finally:
        _off = before


def is_off() -> bool:
    """Are torch's operators asked for?"""
    return _off
