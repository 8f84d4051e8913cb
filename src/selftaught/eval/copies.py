"""The longest span that a response copies from one text and not from another, in linear time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


class Automaton:
    """All contiguous spans of a sequence (Blumer et al., 1985): at most two states for each item."""

    def __init__(self, items: Iterable[Hashable]) -> None:
        self._next: list[dict[Hashable, int]] = [{}]
        self._link, self._length = [-1], [0]
        last = 0
        for item in items:
            last = self._extend(last, item)

    def _state(self, length: int, link: int, steps: dict[Hashable, int]) -> int:
        self._length.append(length)
        self._link.append(link)
        self._next.append(steps)
        return len(self._length) - 1

    def _extend(self, last: int, item: Hashable) -> int:
        new = self._state(self._length[last] + 1, 0, {})
        state = last
        while state != -1 and item not in self._next[state]:
            self._next[state][item] = new
            state = self._link[state]
        if state == -1:
            return new
        met = self._next[state][item]
        if self._length[met] == self._length[state] + 1:
            self._link[new] = met
            return new
        clone = self._state(self._length[state] + 1, self._link[met], dict(self._next[met]))
        while state != -1 and self._next[state].get(item) == met:
            self._next[state][item] = clone
            state = self._link[state]
        self._link[met] = self._link[new] = clone
        return new

    def matches(self, items: Sequence[Hashable]) -> list[int]:
        """For each end, the length of the longest span of `items` ending there that is a span of the sequence too."""
        state = length = 0
        found = []
        for item in items:
            while state and item not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if item in self._next[state]:
                state, length = self._next[state][item], length + 1
            else:
                length = 0
            found.append(length)
        return found


def longest_copy(response: Sequence[Hashable], source: Sequence[Hashable], known: Sequence[Hashable] = ()
                 ) -> tuple[int, int]:
    """(start, end) in `response` of its longest span that is in `source` and not in `known`; (0, 0) for none.

    For strings, characters; for tuples of token ids, tokens. Of spans as long, the first. A span that ends at an
    item counts at its longest: where that is in `known`, every shorter one ending there is too.
    """
    best = (0, 0)
    for end, (copied, seen) in enumerate(zip(Automaton(source).matches(response), Automaton(known).matches(response),
                                             strict=True), start=1):
        if copied > seen and copied > best[1] - best[0]:
            best = (end - copied, end)
    return best
