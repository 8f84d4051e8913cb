"""One side of `step.py`: TRL's GRPO or SDPO trainer, in its own environment (trl 1.16.0).

Run by step.py; alone: python benchmarks/peer_trl.py --model FOLDER --prompts FILE.jsonl --micro-batch 4
Nothing of selftaught is imported. The last line printed is JSON: seconds of each step (the first is warm-up), of its
calls of the sampler, and peak memory.
Left at TRL's own defaults: everything that is not in `settings`, such as its loss and its optimiser (AdamW).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
import zlib
from typing import Any, NamedTuple

from shared import peak_gb

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Sizes(NamedTuple):
    """Of a step, on both sides."""

    prompts: int = 4
    generations: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 64

    @property
    def rollouts(self) -> int:
        return self.prompts * self.generations


def reward(completions: list[str], **_: Any) -> list[float]:
    """A hash of the text: varied, so that advantages are not zero, and free. It says nothing about learning."""
    return [(zlib.crc32(text.encode()) % 7) / 7.0 for text in completions]


def succeed(completions: list[str], **_: Any) -> list[float]:
    """Every rollout a success, so that each has a sibling's to be shown to its teacher."""
    return [1.0 for _ in completions]


# SDPO as published, and as ours: js on the student's 100 likeliest tokens and a tail, an average of weights as teacher.
SDPO = {
    "distillation_mode": "topk_logits",
    "distillation_topk": 100,
    "distillation_add_tail": True,
    "distillation_alpha": 0.5,
}


def drawn(step: int, sizes: Sizes) -> list[int]:
    """Lengths of a step's rollouts, from an eighth of the longest, the last token an end token."""
    return random.Random(step).choices(range(max(1, sizes.new_tokens // 8), sizes.new_tokens + 1), k=sizes.rollouts)


def end_rows(model: Any, end: int, sizes: Sizes) -> None:
    """Let every row of the next `generate` calls end at its drawn length, by token `end`, and not before."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Ends(LogitsProcessor):
        def __init__(self, prompt: int, lengths: list[int]) -> None:
            self.prompt, self.lengths = prompt, lengths

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            written = input_ids.shape[1] - self.prompt
            scores[:, end] = -float("inf")
            for row, length in enumerate(self.lengths):
                if written + 1 == length:
                    scores[row] = -float("inf")
                    scores[row, end] = 0.0
            return scores

    generate, calls = model.generate, itertools.count()

    def ended(**given: Any) -> Any:
        width = given["input_ids"].shape[1]
        return generate(**given, logits_processor=LogitsProcessorList([Ends(width, drawn(next(calls), sizes))]))

    model.generate = ended


def settings(sizes: Sizes, micro_batch: int, steps: int, output: str, lengths: str) -> dict[str, Any]:
    """One optimiser step of a rollout batch, in micro-batches of `micro_batch`."""
    return {
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": sizes.rollouts // micro_batch,  # all are sampled at once
        "num_generations": sizes.generations,
        "max_completion_length": sizes.new_tokens,
        "generation_kwargs": {"min_new_tokens": sizes.new_tokens} if lengths == "all" else {},
        "temperature": 1.0,
        "beta": 0.0,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder (safetensors and tokenizer)")
    parser.add_argument("--prompts", required=True, help="JSONL with a column `prompt`")
    parser.add_argument("--method", default="grpo", choices=["grpo", "sdpo"])
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lengths", default="all", choices=["all", "drawn"])
    parser.add_argument("--sizes", type=int, nargs=4, default=Sizes(), help=f"of a step: {', '.join(Sizes._fields)}")
    args = parser.parse_args()
    sizes = Sizes(*args.sizes)

    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the end of one step to the end of the next: sampling, reward, loss and update together."""

        def __init__(self) -> None:
            self.last, self.seconds = time.monotonic(), list[float]()
            self.sampling, self.sampled = 0.0, list[float]()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.monotonic()
            self.seconds.append(now - self.last)
            self.sampled.append(self.sampling)
            self.last, self.sampling = now, 0.0

        def around(self, generate: Any) -> Any:
            """`generate`, its seconds counted as the step's sampling."""

            def timed(*given: Any, **named: Any) -> Any:
                began = time.monotonic()
                out = generate(*given, **named)
                self.sampling += time.monotonic() - began
                return out

            return timed

    with open(args.prompts, encoding="utf-8") as file:
        rows = [{"prompt": json.loads(line)["prompt"]} for line in file]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        given = settings(sizes, args.micro_batch, args.steps, output, args.lengths)
        if args.method == "grpo":
            trainer_class, config, reward_function = trl.GRPOTrainer, trl.GRPOConfig(**given), reward
        else:
            from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

            trainer_class, config, reward_function = SDPOTrainer, SDPOConfig(**given, **SDPO), succeed
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if args.lengths == "drawn":
            end_rows(model, tokenizer.eos_token_id, sizes)
        trainer = trainer_class(
            model=model,
            reward_funcs=reward_function,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer._generate = clock.around(trainer._generate)
        clock.last = time.monotonic()
        trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    result = {
        "steps_s": [round(s, 3) for s in clock.seconds],
        "sample_s": [round(s, 3) for s in clock.sampled],
        "peak_gb": peak_gb(),
        "mean_new_tokens": lengths,
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
