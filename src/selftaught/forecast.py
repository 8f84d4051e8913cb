"""What a run will need, told before anything is loaded: tokens and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from selftaught.assemble import Ground, device_of
from selftaught.score.hub import load_config
from selftaught.vocabulary import CHUNK_ELEMENTS

GB = 1e9
ACTIVATION_FLOATS = 34  # per layer and token, in hidden widths: what a pre-norm decoder layer keeps for its backward


@dataclass(frozen=True)
class Forecast:
    """Counts of tokens, and bytes by what they are for."""

    parameters: int
    prompt_tokens: int
    step_tokens: int
    run_tokens: int
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.bytes.items())
        return [
            f"model     {self.parameters / 1e6:.0f} M parameters",
            f"tokens    prompts up to {self.prompt_tokens}; at most {self.step_tokens:,} written a step, "
            f"{self.run_tokens:,} in the run",
            f"memory    about {self.total / GB:.1f} GB: {parts}",
        ]


def forecast(ground: Ground) -> Forecast:
    """Tokens exactly, memory by formula (within a fifth or so of what is measured); reads no weights."""
    from transformers import AutoModelForCausalLM

    run = ground.run
    config = load_config(run.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    size = torch.finfo(getattr(torch, run.optim.dtype)).bits // 8
    kept = {(view.weights, view.every, view.rate) for view in ground.method.views.values() if view.weights != "live"}
    layers = 1 if run.optim.activation_checkpointing else text.num_hidden_layers
    rows = min(run.rollout.max_rows, run.rollout.num_generations * run.rollout.prompts_per_step)
    width = text.hidden_size
    longest = max(len(ground.renderer.prompt(problem).token_ids) for problem in ground.dataset.train)
    kv = 2 * text.num_hidden_layers * getattr(text, "num_key_value_heads", text.num_attention_heads) * (
        getattr(text, "head_dim", None) or width // text.num_attention_heads)
    step = run.rollout.num_generations * run.rollout.prompts_per_step * run.rollout.max_completion_length
    return Forecast(
        parameters=count,
        prompt_tokens=longest,
        step_tokens=step,
        run_tokens=step * run.optim.steps,
        bytes={
            "weights": count * size,
            "gradients": count * 4,
            "optimiser": count * (8 if size == 4 else 12),
            "teachers": len(kept) * count * size,
            "activations": run.optim.token_budget * width * ACTIVATION_FLOATS * layers * size,
            "head": CHUNK_ELEMENTS * 4 * 5 + text.vocab_size * width * 4,
            "sampling": rows * (run.rollout.max_completion_length + longest // run.rollout.num_generations) * kv * size,
            "libraries": int(0.7 * GB),
        },
    )


def available_memory(ground: Ground) -> int | None:
    """Bytes of the device that the run would use; None where the system does not tell."""
    device = device_of(ground.run)
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:  # what Linux could free counts too: the page cache is no memory in use
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
