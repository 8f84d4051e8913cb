"""Which of a rollout's siblings are shown to its teacher."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from selftaught.privilege.config import Evidence
from selftaught.records import Rollout, Verdict

THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
WORD = re.compile(r"[A-Za-z]+|[0-9]+|\S")  # outside of ASCII every sign is a word: most scripts have no other border


def demonstrations(
    part: Evidence, group: Sequence[tuple[Rollout, Verdict]], count: int, key: str
) -> list[list[str]]:
    """For each rollout of one problem, up to `count` texts of siblings that succeeded, best choice first.

    One ranking serves the whole group (but for `nearest`), so that all its failures share one demonstration and hence
    one prompt. `nearest` costs O(G S L^2 / 64) for G rollouts, S successes and L words: 64 pairs of 2000 words take
    about a tenth of a second.
    """
    ranked = _ranked(part, group, key)
    out = []
    for rollout, _ in group:
        own = _shown(part, rollout)
        texts = [text for sample, text in ranked if not (part.exclude_self and sample == rollout.sample)]
        if part.choose == "nearest":
            texts = [text for text in texts if not (part.exclude_self and part.distinct and text == own)]
            likeness = {text: similarity(own, text) for text in texts}
            texts.sort(key=lambda text: -likeness[text])
        out.append((list(dict.fromkeys(texts)) if part.distinct else texts)[:count])
    return out


def similarity(one: str, other: str) -> float:
    """2 LCS / (length + length), in words: 1 for equal texts, 0 where they have no word in common; symmetric.

    LCS, the longest common subsequence, by Hyyro's bit-parallel recurrence: a bit of `open` for each word of `one`,
    cleared where the longest subsequence grows.
    """
    first, second = WORD.findall(one), WORD.findall(other)
    if not first or not second:
        return 0.0
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    open_bits = full
    for word in second:
        met = open_bits & places.get(word, 0)
        open_bits = ((open_bits + met) | (open_bits - met)) & full
    return 2 * (len(first) - open_bits.bit_count()) / (len(first) + len(second))


def _ranked(part: Evidence, group: Sequence[tuple[Rollout, Verdict]], key: str) -> list[tuple[int, str]]:
    """(sample, text) of the rollouts of one problem that succeeded and have something to show, best choice first."""
    successes = sorted((rollout for rollout, verdict in group if _succeeded(part, verdict)), key=lambda r: r.sample)
    if part.choose == "random":
        random.Random(key).shuffle(successes)
    elif part.choose == "shortest":
        successes.sort(key=lambda rollout: (len(rollout.token_ids), rollout.sample))
    shown = [(rollout.sample, _shown(part, rollout)) for rollout in successes]
    return [(sample, text) for sample, text in shown if text]


def _succeeded(part: Evidence, verdict: Verdict) -> bool:
    """By its status, unless a threshold is set: a wrong answer can have a high weighted sum, a right one a low."""
    if verdict.score is None:
        return False
    return verdict.status == "right" if part.threshold is None else verdict.score >= part.threshold


def _shown(part: Evidence, rollout: Rollout) -> str:
    return _without_thinking(rollout.text) if part.strip_thinking else rollout.text.strip()


def _without_thinking(text: str) -> str:
    """`text` after its thinking: a block that the prompt opened and one that was never closed go too."""
    visible = THINKING.sub("", text)
    visible = visible.rpartition("</think>")[2]
    return visible.partition("<think>")[0].strip()
