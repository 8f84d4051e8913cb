"""Rollouts by the built-in engine beside `generate`, transformers' continuous batching and vLLM.

    python benchmarks/rollouts.py --vllm-python PATH/TO/VENV-WITH-VLLM/bin/python --out rollouts.json
    python benchmarks/rollouts.py --rows 16 64 --prompt 64 512 --tokens 64 --sides ours generate

One turn: `rows` responses of exactly `tokens` tokens each, in groups of `--group` to prompts of random tokens, drawn at
temperature 1 from the whole vocabulary. Every side gets the same weights and, in each turn, the same new prompts, as
token ids; nothing ends a row early, and each side's lengths are checked. Each side has a process of its own for each
case; they take turns, one at a time, after one turn for warm-up. All but `generate`, whose users score again, return
the log-prob of every sampled token. Peak memory is the process's own, weights and warm-up included.

ours      TransformersEngine on the training weights; a prompt is computed once for its group
generate  `model.generate`, all rows as one batch: a prompt is computed once for every row
batching  `model.generate_batch`, num_return_sequences = group, its manager kept between turns, the cache as large as
          the rows need
vllm      `LLM.generate`, n = group, in the environment of --vllm-python; the cache in whole GB, or by
          VLLM_CPU_KVCACHE_SPACE
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from shared import Side, serve

HERE = Path(__file__).resolve().parent
PAGE = 256  # tokens of a page of the continuous batching's cache, its default
SIDES = ("ours", "generate", "batching", "vllm")
Work = Callable[[list[list[int]]], dict[str, Any]]  # a turn's prompts -> {"lengths": tokens of every row}


def ours(model: Any, tokenizer: Any, args: argparse.Namespace) -> Work:
    from selftaught.records import Problem, Prompt, Request, Sampling
    from selftaught.rollout import TransformersEngine
    from selftaught.score import Backbone

    setting = Sampling(1.0, 1.0, None, args.tokens, ())
    engine = TransformersEngine(Backbone(model), tokenizer, (), max_rows=args.rows)  # no token stops it

    def work(prompts: list[list[int]]) -> dict[str, Any]:
        requests = [Request(Problem(str(i), ""), Prompt(tuple(ids)), 0, 0) for i, ids in enumerate(prompts)]
        drawn = engine.sample(requests, args.group, setting)
        assert all(len(row.logp_sampler) == len(row.token_ids) for row in drawn)
        return {"lengths": [len(row.token_ids) for row in drawn]}

    return work


def generate(model: Any, tokenizer: Any, args: argparse.Namespace) -> Work:
    import torch

    def work(prompts: list[list[int]]) -> dict[str, Any]:
        rows = torch.tensor([ids for ids in prompts for _ in range(args.group)])
        out = model.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, top_p=1.0,
                             temperature=1.0, max_new_tokens=args.tokens, pad_token_id=0)  # fmt: skip
        return {"lengths": [out.shape[1] - rows.shape[1]] * len(out)}

    return work


def batching(model: Any, tokenizer: Any, args: argparse.Namespace) -> Work:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    setting = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=args.tokens,
                               num_return_sequences=args.group, eos_token_id=-1, pad_token_id=0)  # fmt: skip
    pages = args.rows * (-(-(args.prompt + args.tokens) // PAGE) + 1)
    most = max(args.rows, args.rows // args.group * args.prompt)  # all prompts in one pass
    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, return_logprobs=True, seed=0,
                                      max_requests_per_batch=args.rows, max_batch_tokens=most)  # fmt: skip

    def work(prompts: list[list[int]]) -> dict[str, Any]:
        out = model.generate_batch(prompts, generation_config=setting, continuous_batching_config=config,
                                   persistent_manager=True)  # fmt: skip
        assert all(row.error is None and len(row.logprobs) == len(row.generated_tokens) for row in out.values())
        return {"lengths": [len(row.generated_tokens) for row in out.values()]}

    return work


def prepare(args: argparse.Namespace) -> Work:
    """The side `args.one` on the model, ready for turns."""
    import torch
    from transformers import GenerationConfig

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_model, load_tokenizer

    with quiet():
        model = load_model(args.model, getattr(torch, args.dtype), "cpu")
        tokenizer = load_tokenizer(args.model)
    model.generation_config = GenerationConfig()  # without an end token: nothing stops a row, or changes its draws
    torch.manual_seed(0)
    return {"ours": ours, "generate": generate, "batching": batching}[args.one](model, tokenizer, args)


def case(args: argparse.Namespace, folder: Path, rows: int, prompt: int, tokens: int) -> dict[str, Any]:
    """{side: {seconds, median_s, peak_gb} or {error}} of one case."""
    given = {"--model": folder / "model", "--dtype": args.dtype, "--rows": rows, "--group": args.group,
             "--tokens": tokens}  # fmt: skip
    words = [str(word) for pair in given.items() for word in pair]
    commands = {side: [args.vllm_python, str(HERE / "peer_vllm.py"), *words, "--length", str(prompt + tokens)]
                if side == "vllm" else [sys.executable, str(HERE / "rollouts.py"), "--one", side, *words,
                                        "--prompt", str(prompt)] for side in args.sides}  # fmt: skip
    sides = {side: Side(command, args.threads, folder / f"{side}.log") for side, command in commands.items()}
    found: dict[str, dict[str, Any]] = {side: {"seconds": []} for side in sides}
    try:
        for turn in range(args.runs + 1):
            draw = random.Random(turn)
            prompts = [[draw.randrange(args.vocabulary) for _ in range(prompt)] for _ in range(rows // args.group)]
            for name, side in sides.items():
                result = side.turn(prompts)
                if not side.error and result["lengths"] != [tokens] * rows:
                    side.error = f"wrote {sum(result['lengths'])} tokens in {len(result['lengths'])} rows"
                if side.error:
                    found[name] = {"error": side.error}
                elif turn:
                    found[name]["seconds"].append(round(result["seconds"], 3))
                    found[name]["peak_gb"] = result["peak_gb"]
    finally:
        for side in sides.values():
            side.close()
    return {name: one if "error" in one else {**one, "median_s": round(statistics.median(one["seconds"]), 3)}
            for name, one in found.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="responses of a turn")
    parser.add_argument("--group", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128], help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="tokens of a response")
    parser.add_argument("--vllm-python", help="python of an environment with vllm; without it, vLLM is left out")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="by default all; ratios are to the first")
    parser.add_argument("--runs", type=int, default=3, help="turns that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="rollouts.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this side, in this process
    args = parser.parse_args()
    if args.one:
        args.rows, args.prompt, args.tokens = args.rows[0], args.prompt[0], args.tokens[0]
        serve(lambda: prepare(args))
        return
    args.sides = args.sides or [side for side in SIDES if side != "vllm" or args.vllm_python]
    if "vllm" in args.sides and not (args.vllm_python and shutil.which(args.vllm_python)):
        parser.error(f"--vllm-python: {args.vllm_python!r} is no program, and the side vllm needs one")
    if odd := [rows for rows in args.rows if rows < 1 or rows % args.group]:
        parser.error(f"--rows: {odd[0]} is not a multiple of --group {args.group}")

    from selftaught.score.hub import load_tokenizer

    found = []
    print("rows | prompt | tokens | side     |      s | tokens/s | ratio | peak GB")
    with tempfile.TemporaryDirectory(prefix="selftaught-bench-") as work:
        write_copy(args.model, args.dtype, Path(work) / "model")
        args.vocabulary = len(load_tokenizer(str(Path(work) / "model")))
        for rows, prompt, tokens in product(args.rows, args.prompt, args.tokens):
            sides = case(args, Path(work), rows, prompt, tokens)
            base = sides[args.sides[0]].get("median_s")
            for side, one in sides.items():
                found.append({"rows": rows, "prompt": prompt, "tokens": tokens, "side": side, **one})
                line = f"{rows:4} | {prompt:6} | {tokens:6} | {side:8} | "
                if "error" in one:
                    print(line + one["error"], flush=True)
                    continue
                ratio = f"{one['median_s'] / base:5.2f}" if base else "    -"
                print(f"{line}{one['median_s']:6.2f} | {rows * tokens / one['median_s']:8.1f} | {ratio} | "
                      f"{one['peak_gb']:7.2f}", flush=True)  # fmt: skip
    Path(args.out).write_text(json.dumps({"setting": vars(args), "results": found}, indent=1) + "\n")
    print(f"Written to {args.out}.")


def write_copy(name: str, dtype: str, folder: Path) -> None:
    """Model `name` as a folder that every side can load."""
    import torch

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_model, load_tokenizer

    with quiet():
        load_model(name, getattr(torch, dtype), "cpu").save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)


if __name__ == "__main__":
    main()
