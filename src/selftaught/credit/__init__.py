"""Per-token constants of one optimiser batch: advantages, weights, gates. Never a gradient."""

from selftaught.credit.counted import base_credit, broadcast
from selftaught.credit.evidence import evidence, evidence_weight, linear_decay
from selftaught.credit.group import group_advantage

__all__ = ["base_credit", "broadcast", "evidence", "evidence_weight", "group_advantage", "linear_decay"]
