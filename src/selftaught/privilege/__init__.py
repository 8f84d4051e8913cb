"""Stage 4, c: what the student may not see, and the prompt that carries it.

check(config, problems)                                                   before any model is loaded
build(config, rollouts, verdicts, problems, renderer, seed=0, step=0)     one Privilege or None per rollout
longest(config, problems, pool, renderer, seed=0, written=512)            tokens of the longest privileged prompt
block(config, problem)                                                    what is inserted, uncut
for_problems(config, problems, pool, renderer, seed=0, step=0)            the same without rollouts: evaluation
control(config, "wrong")                                                  the same privilege, made a control
describe(privileges)                                                      metrics
"""

from __future__ import annotations

from selftaught.privilege.build import build, describe, for_problems, longest
from selftaught.privilege.config import Part, PrivilegeConfig, block, check, control, pieces
from selftaught.privilege.demonstrations import similarity

__all__ = ["Part", "PrivilegeConfig", "block", "build", "check", "control", "describe", "for_problems", "longest",
           "pieces", "similarity"]
