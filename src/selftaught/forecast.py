"""What a run will need, told before anything is loaded: tokens and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from selftaught.assemble import Ground, device_of
from selftaught.loss.chunked import GATHERED
from selftaught.score.adapter import adapter_size
from selftaught.score.hub import load_skeleton
from selftaught.vocabulary import chunk_size

GB = 1e9
ACTIVATION_FLOATS = 34  # per layer and token, in hidden widths: what a pre-norm decoder layer keeps for its backward


@dataclass(frozen=True)
class Forecast:
    """Counts of tokens, and bytes by what they are for."""

    parameters: int
    trained: int
    prompt_tokens: int
    step_tokens: int
    run_tokens: int
    bytes: dict[str, int]
    teacher: str = ""  # the external one, in words

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def lines(self) -> list[str]:
        """For people."""
        adapters = "" if self.trained == self.parameters else f", and {self.trained / 1e6:.1f} M trained in adapters"
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.bytes.items())
        return [
            f"model     {self.parameters / 1e6:.0f} M parameters{adapters}{self.teacher}",
            f"tokens    prompts up to {self.prompt_tokens}; at most {self.step_tokens:,} written a step, "
            f"{self.run_tokens:,} in the run",
            f"memory    about {self.total / GB:.1f} GB: {parts}",
        ]


def forecast(ground: Ground) -> Forecast:
    """Tokens exactly, memory by formula (within a fifth or so of what is measured); reads no weights."""
    run, lora = ground.run, ground.run.optim.lora
    model = load_skeleton(run.model)
    count = sum(p.numel() for p in model.parameters())
    text = model.config.get_text_config()
    size = torch.finfo(getattr(torch, run.optim.dtype)).bits // 8
    trained, width_of_trained = (count, size) if lora is None else (
        adapter_size(model, lora.rank, lora.target_modules), 4)  # adapters are float32, whatever the weights are
    kept = {(view.weights, view.every, view.rate) for view in ground.method.views.values()
            if view.weights not in ("live", "external")}
    further = sum(view.nth > 0 for view in ground.method.views.values())  # each with its logits and log-probs
    external, said = 0, ""
    if run.teacher is not None:
        many = sum(p.numel() for p in load_skeleton(run.teacher.model).parameters())
        external = many * torch.finfo(getattr(torch, run.teacher.dtype or run.optim.dtype)).bits // 8
        said = f"; teacher {run.teacher.model}, {many / 1e6:.0f} M"
    layers = 1 if run.optim.activation_checkpointing else text.num_hidden_layers
    rows = min(run.rollout.max_rows, run.rollout.num_generations * run.rollout.prompts_per_step)
    width = text.hidden_size
    longest = max(len(ground.renderer.prompt(problem).token_ids) for problem in ground.dataset.train)
    kv = 2 * text.num_hidden_layers * getattr(text, "num_key_value_heads", text.num_attention_heads) * (
        getattr(text, "head_dim", None) or width // text.num_attention_heads)
    head = 0 if lora is not None and size == 4 else text.vocab_size * width * 4  # its gradient, or its float32 copy
    sampling = rows * (run.rollout.max_completion_length + longest // run.rollout.num_generations) * kv * size
    if run.rollout.engine == "vllm":  # what it takes besides is set by its share of the memory, or elsewhere
        sampling = 0 if run.rollout.vllm is not None and run.rollout.vllm.url else count * size
    draws = 1 + run.rollout.max_resample * bool(run.rollout.filter_groups)
    step = run.rollout.num_generations * run.rollout.prompts_per_step * run.rollout.max_completion_length * draws
    return Forecast(
        parameters=count,
        trained=trained,
        prompt_tokens=longest,
        step_tokens=step,
        run_tokens=step * run.optim.steps,
        bytes={
            "weights": count * size + (0 if lora is None else trained * 4),
            "gradients": trained * 4,
            "optimiser": trained * (8 if width_of_trained == 4 or run.optim.master == "stochastic" else 12),
            "teachers": len(kept) * trained * width_of_trained + external,
            "activations": run.optim.token_budget * width * ACTIVATION_FLOATS * layers * size,
            "head": _head_chunk(text.vocab_size, device_of(run), further) + head,
            "sampling": sampling,
            "libraries": int(0.7 * GB),
        },
        teacher=said,
    )


def _head_chunk(vocabulary: int, device: str, further: int) -> int:
    """Bytes of one chunk of the vocabulary head: logits, their gradient and what a divergence makes of them."""
    if device.startswith("cuda"):  # kernels make nothing of them; gradients of 16 bits are gathered
        return chunk_size(vocabulary, "cuda") * vocabulary * (4 * (3 + further) + 2 * GATHERED)
    return chunk_size(vocabulary) * vocabulary * 4 * (5 + 2 * further)


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
