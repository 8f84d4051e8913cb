"""Tiny random models of the families that the shared layout must serve, and of two that it must refuse.

Weights are wide enough that attention is sharp and logits differ: with the usual tiny ones every distribution is
nearly uniform, and a wrong mask or position would change nothing that a test could see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "initializer_range": 0.25,
}
WINDOW = 7  # of the sliding layers: below every prompt of the tests


def _made(cls: type, config: Any, seed: int) -> Any:
    """The model in float32 and evaluation mode, the same for a seed; the global randomness is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which hides what is done with them
                torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.2)
    return model.eval()


def llama(seed: int = 0, **overrides: Any) -> Any:
    """Llama with the head tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _made(LlamaForCausalLM, LlamaConfig(**{**COMMON, "tie_word_embeddings": True, **overrides}), seed)


def smollm(seed: int = 0, **overrides: Any) -> Any:
    """Llama as SmolLM has it: nine heads on three of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return _made(LlamaForCausalLM, LlamaConfig(**{**COMMON, **heads, **overrides}), seed)


def qwen2(seed: int = 0, **overrides: Any) -> Any:
    """Qwen2: biases on queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _made(Qwen2ForCausalLM, Qwen2Config(**{**COMMON, "tie_word_embeddings": False, **overrides}), seed)


def qwen3(seed: int = 0, **overrides: Any) -> Any:
    """Qwen3: norms on queries and keys, heads wider than hidden / heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    own = {"head_dim": 12, "tie_word_embeddings": False}
    return _made(Qwen3ForCausalLM, Qwen3Config(**{**COMMON, **own, **overrides}), seed)


def gemma3(seed: int = 0, **overrides: Any) -> Any:
    """Gemma 3, text: one layer slides over WINDOW tokens, one sees all, final logits are soft-capped."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "final_logit_softcapping": 5.0,
           "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True}
    return _made(Gemma3ForCausalLM, Gemma3TextConfig(**{**COMMON, **own, **overrides}), seed)


def gemma2(seed: int = 0, **overrides: Any) -> Any:
    """Gemma 2 caps its attention scores, which no fused attention computes. (In eager mode, where it does so.)"""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "attn_logit_softcapping": 2.0,
           "final_logit_softcapping": 5.0, "attn_implementation": "eager"}
    return _made(Gemma2ForCausalLM, Gemma2Config(**{**COMMON, **own, **overrides}), seed)


def mamba(seed: int = 0, **overrides: Any) -> Any:
    """Mamba is recurrent: it has no attention to segment."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id",
                                             "bos_token_id", "eos_token_id", "initializer_range")}
    own = {"state_size": 4, "conv_kernel": 3, "use_mambapy": False}
    return _made(MambaForCausalLM, MambaConfig(**{**sizes, **own, **overrides}), seed)


SUPPORTED: dict[str, Callable[..., Any]] = {
    "llama": llama, "smollm": smollm, "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3,
}
UNSUPPORTED: dict[str, Callable[..., Any]] = {"gemma2": gemma2, "mamba": mamba}
