"""The study's arms, each a recipe under another method, privilege or reward; and the sets that all are tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from selftaught.data import graphs
from selftaught.errors import UserError, nearest

REWARDS = ('reward={workers: 1, parts: [{name: "selftaught.studies.graphs.verify:path", batch: true}, '
           '{name: "selftaught.studies.graphs.verify:diversity", batch: true, weight: 0.5}]}')
# A small graph has two right walks. As different texts, one that was sampled seven times would count as much as one
# that was sampled once, and every rollout's nearest sibling would be one that went the other way.
AS_SAMPLED = "privilege.distinct=false"
SMALL, PAPER = "graphs/small", "graphs/qwen3-1.7b"
BASE = "base"


@dataclass(frozen=True)
class Recipe:
    """An arm: what it is in words, and what it changes in the recipe."""

    about: str
    overrides: tuple[str, ...]


# The recipes are SDSD itself: KL(S||T) by the sdpo method, T shown a sibling that succeeded, drawn at random.
CORE: Mapping[str, Recipe] = {
    "grpo": Recipe("GRPO", ("method=grpo", "privilege=null")),
    "grpo-diversity": Recipe("GRPO, reward + half the share of siblings by other concepts",
                             ("method=grpo", "privilege=null", REWARDS)),
    "sdsd": Recipe("KL(S||T), T shown a sampled sibling", ()),
    "sdsd-mixture": Recipe("KL(S||T), T a mixture of up to 3 teachers, each shown another sibling",
                           ("privilege.count=3", "privilege.combine=mixture", AS_SAMPLED)),
}  # fmt: skip
FURTHER: Mapping[str, Recipe] = {
    "sdsd-average": Recipe("mean of KL(S||T_k) over up to 3 teachers, each shown another sibling",
                           ("privilege.count=3", "privilege.combine=average", AS_SAMPLED)),
    "sdsd-different": Recipe("as sdsd-mixture, but siblings with one text are one: the rarer walk weighs as much",
                             ("privilege.count=3", "privilege.combine=mixture")),
    "sdsd-forward": Recipe("KL(T||S), T shown a sampled sibling", ("method.divergence=kl_teacher_student",)),
    "sdsd-nearest": Recipe("KL(S||T), T shown the sibling most like the rollout, also one with its very text",
                           ("privilege.choose=nearest", AS_SAMPLED)),
    "sdpo": Recipe("SDPO's JS, T shown the first sibling that succeeded",
                   ("method.divergence=js", "privilege.choose=first")),
    "rlsd": Recipe("RLSD on a sampled sibling; its weights do not decay", ("method={name: rlsd, lam_decay: null}",)),
    "sdpg": Recipe("SDPG on a sampled sibling, beta = 0.1 throughout",
                   ("method={name: sdpg, beta: 0.1, beta_warmup: 0, beta_decay: 0}",)),
    "demopsd": Recipe("DemoPSD on a sampled sibling", ("method={name: demopsd, top_k: null}",)),
}  # fmt: skip
ARMS: Mapping[str, Recipe] = {**CORE, **FURTHER}


@dataclass(frozen=True)
class Arm:
    """One training of the study."""

    name: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.seed}"


def arms(only: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """The core's arms, or those asked for, in every seed: a whole seed before the next.

    Raises UserError for an arm that does not exist.
    """
    for name in only:
        if name not in ARMS:
            raise UserError(f"study graphs: no arm {name!r}; {nearest(name, ARMS)}")
    return [Arm(name, seed) for seed in seeds for name in only or CORE]


def sources_of_sets(source: str, larger: Sequence[int]) -> dict[str, str]:
    """By name, the sets beside the recipe's own held-out problems: kinds of graphs in the layout of `source`."""
    _, layout = graphs.parse(source)
    named = {f"larger-{nodes}": ("larger", replace(layout, nodes=nodes)) for nodes in larger}
    named |= {kind: (kind, layout) for kind in ("harder", "harder-random")}
    return {name: graphs.source(kind, of) for name, (kind, of) in named.items()}
