"""The user's mistakes, told in one message that names the field, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: the command line prints its message alone and exits with 2."""


class Unreachable(UserError):
    """Something on the Hub that cannot be had now, for want of a network: nothing is known against it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that helps after an unknown `word`: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
