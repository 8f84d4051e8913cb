"""y ~ pi(. | x): an engine protocol, the built-in engine on the training weights, and vLLM with a copy of them."""

from selftaught.rollout.engine import Engine, RolloutConfig, VllmConfig, uniforms
from selftaught.rollout.transformers_engine import TransformersEngine

__all__ = ["Engine", "RolloutConfig", "TransformersEngine", "VllmConfig", "uniforms"]
