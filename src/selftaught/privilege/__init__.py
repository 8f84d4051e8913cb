"""Stage 4, c: what the student may not see, and the prompt that carries it.

check(config, problems)                                                   before any model is loaded
build(config, rollouts, verdicts, problems, renderer, seed=0, step=0)     one Privilege or None per rollout
for_problems(config, problems, pool, renderer, seed=0, step=0)            the same without rollouts: evaluation
control(config, "wrong")                                                  the same privilege, made a control
describe(privileges)                                                      metrics
"""

from __future__ import annotations

from selftaught.privilege.build import build, describe, for_problems
from selftaught.privilege.config import PrivilegeConfig, check, control, evidence

__all__ = ["PrivilegeConfig", "build", "check", "control", "describe", "evidence", "for_problems"]
