"""y ~ pi(. | x): an engine protocol, and the built-in engine on the training weights."""

from selftaught.rollout.engine import Engine, RolloutConfig, uniforms
from selftaught.rollout.transformers_engine import TransformersEngine

__all__ = ["Engine", "RolloutConfig", "TransformersEngine", "uniforms"]
