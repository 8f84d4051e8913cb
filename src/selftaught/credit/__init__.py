"""Per-token constants of one optimiser batch: advantages, weights, gates. Never a gradient."""

from selftaught.credit.counted import base_credit, broadcast, logp_before, place_in_rollout
from selftaught.credit.evidence import evidence, evidence_weight
from selftaught.credit.group import group_advantage
from selftaught.credit.route import STUDENT_LIGHT, STUDENT_WEAK, TEACHER_FULL, TEACHER_LIGHT, routes
from selftaught.credit.schedule import linear_decay, trapezoid
from selftaught.credit.sequence import sequence_ratio

__all__ = ["STUDENT_LIGHT", "STUDENT_WEAK", "TEACHER_FULL", "TEACHER_LIGHT", "base_credit", "broadcast", "evidence",
           "evidence_weight", "group_advantage", "linear_decay", "logp_before", "place_in_rollout", "routes",
           "sequence_ratio", "trapezoid"]
