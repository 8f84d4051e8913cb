"""Time and peak memory of one GRPO or SDPO step, ours beside TRL's, on the same model, prompts, threads and precision.

    python benchmarks/step.py --peer-python PATH/TO/VENV-WITH-TRL/bin/python --out step.json
    python benchmarks/step.py --method sdpo --lengths drawn --peer-python ...

A step: 4 prompts of 128 tokens x 4 rollouts of exactly 64 new tokens, or of 8 to 64, float32, one optimiser update, the
whole loop (sampling, reward, loss, update). Micro-batches of 1, 4 and 16 rollouts; the two sides take turns, each run
in a process of its own so that its peak memory is its own. The first step of a run is warm-up and not counted. The
machine must be quiet; on 2 cores it takes a quarter of an hour. Drawn lengths are forced upon both sides' samplers, the
same ones in each step. The reward of GRPO is a hash of the text: this measures time, not learning.
SDPO: each rollout is a success, so its teacher, an average of the student's weights, sees a sibling's text; the
objective is the published one on both sides (js on 100 tokens and a tail).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from peer_trl import GENERATIONS, NEW_TOKENS, PROMPTS, drawn

PROMPT_TOKENS = 128
TEXT = "The quick brown fox jumps over the lazy dog and then counts to ten slowly. " * 60
HERE = Path(__file__).resolve().parent


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The peer's reward: a hash of the text, varied and free."""
    return [(zlib.crc32(str(text).encode("utf-8", "replace")) % 7) / 7.0 for text in completions]


def succeed(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """As the peer's for SDPO: every rollout a success."""
    return [1.0 for _ in completions]


# What both sides are given.


def write_model(name: str, folder: Path) -> None:
    """A float32 copy of model `name` that never stops by itself: its end token is the one it is least ready to say."""
    import torch

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(name), load_model(name, torch.float32, "cpu")
    probe = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :PROMPT_TOKENS]
    with torch.no_grad():
        highest_V = model(probe).logits[0, :, : len(tokenizer)].log_softmax(-1).amax(0)
    unlikely = int(highest_V.argmin())
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(unlikely)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = unlikely
    model.config.eos_token_id = model.config.pad_token_id = unlikely
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_prompts(folder: Path, path: Path) -> None:
    """64 distinct prompts of exactly 128 tokens, also after they have been decoded and encoded again."""
    from selftaught.score.hub import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, 65):
            # The number makes each prompt a problem of its own: the text repeats itself.
            texts = (f"{number}: {tokenizer.decode(ids[:length]).strip()}" for length in range(PROMPT_TOKENS, 0, -1))
            text = next(t for t in texts if len(tokenizer(t, add_special_tokens=False)["input_ids"]) == PROMPT_TOKENS)
            file.write(json.dumps({"prompt": text, "answer": "42"}) + "\n")


# Our side: a run through the front door, timed from outside.


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "reward": f"{HERE / 'step.py'}:reward"},
    "sdpo": {"method": "sdpo", "reward": f"{HERE / 'step.py'}:succeed",
             "privilege": {"kind": "demonstration", "choose": "first"}},
}  # fmt: skip
DEMONSTRATION = NEW_TOKENS + 16  # tokens at most that a sibling's text and the words around it add to a prompt


def recipe(method: str, model: str, prompts: str, micro_batch: int, steps: int, out: str) -> dict[str, Any]:
    """The peer's setting in our words. A micro-batch is a token budget: prompts are shared within a group, and the
    first success is shown to all the others, another to itself.
    """
    groups = max(1, micro_batch // GENERATIONS)
    prompt = PROMPT_TOKENS if method == "grpo" else min(2, micro_batch) * (PROMPT_TOKENS + DEMONSTRATION)
    return {
        **METHODS[method],
        "model": model,
        "data": {"source": prompts, "heldout": 0, "template": "completion", "question": "{question}", "answer": ""},
        "rollout": {
            "num_generations": GENERATIONS,
            "prompts_per_step": PROMPTS,
            "max_completion_length": NEW_TOKENS,
            "temperature": 1.0,
        },
        "optim": {
            "steps": steps,
            "learning_rate": 1e-6,
            "dtype": "float32",
            "token_budget": groups * prompt + micro_batch * NEW_TOKENS,
        },
        "checkpoint": {"every": steps},
        "seed": 0,
        "out": out,
    }


def watch(path: Path, seen: list[float], stop: threading.Event) -> None:
    """Note the time of every new line of `path`: a step ends when its row of metrics is written."""
    while not stop.wait(0.02):
        if path.exists():
            lines = path.read_bytes().count(b"\n")
            seen.extend([time.monotonic()] * (lines - len(seen)))


def end_rows(end: int) -> None:
    """Let every row of the engine end at its drawn length by token `end`; its log-prob is recorded as the model's."""
    import torch

    from selftaught.rollout import transformers_engine as engine

    steps, due, lengths = itertools.count(), list[bool](), dict[int, int]()
    sample, draw = engine.TransformersEngine._draw, engine.draw

    def row_by_row(self: Any, active: list[Any], logits: Any, position: int, sampling: Any) -> Any:
        if position == 0:
            lengths.clear()
            lengths.update(zip(map(id, active), drawn(next(steps)), strict=True))
        due[:] = [position + 1 == lengths[id(row)] for row in active]
        return sample(self, active, logits, position, sampling)

    def ended(logits: Any, uniform: Any) -> Any:
        tokens, logp = draw(logits, uniform)
        rows = torch.tensor(due)
        tokens[rows], logp[rows] = end, logits[rows].log_softmax(-1)[:, end]
        return tokens, logp

    engine.TransformersEngine._draw, engine.draw = row_by_row, ended


def ours(method: str, model: str, prompts: str, micro_batch: int, steps: int, lengths: str) -> dict[str, Any]:
    """Seconds of each step and peak memory of `selftaught.train` in this process."""
    import torch

    import selftaught
    from selftaught.score.hub import load_tokenizer

    if lengths == "drawn":
        end_rows(load_tokenizer(model).eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        metrics = out / "metrics.jsonl"
        began, seen, stop = time.monotonic(), list[float](), threading.Event()
        watcher = threading.Thread(target=watch, args=(metrics, seen, stop), daemon=True)
        watcher.start()
        selftaught.train(**recipe(method, model, prompts, micro_batch, steps, str(out)))
        stop.set()
        watcher.join()
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    ends = [began, *(end for end, row in zip(seen, rows, strict=True) if "reward" in row)]
    return {
        "steps_s": [round(b - a, 3) for a, b in itertools.pairwise(ends)],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "workers_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 3),  # the largest one
        "mean_new_tokens": [row["completions/mean_length"] for row in rows if "reward" in row],
        "parts_s": [{part: round(row[f"time/{part}"], 2) for part in ("sample", "score", "update")}
                    for row in rows if "reward" in row],
        "threads": torch.get_num_threads(),
        "versions": {"selftaught": selftaught.__version__, "torch": torch.__version__},
    }


# Taking turns.


def child(command: list[str], threads: int, lengths: list[float]) -> dict[str, Any]:
    """Run one side in its own process; its last line is its result, or {"error": ...}. `lengths`: each step's mean."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
           "THP_MEM_ALLOC_ENABLE": "1"}  # huge pages, as the command line asks for; for both sides
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if result["mean_new_tokens"] != lengths:
        return {**result, "error": f"mean lengths are {result['mean_new_tokens']}, not {lengths}"}
    return {**result, "median_s": round(statistics.median(result["steps_s"][1:] or result["steps_s"]), 2)}


def measure(args: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """{side: {micro-batch: result}}, the sides taking turns."""
    write_model(args.model, work / "model")
    write_prompts(work / "model", work / "prompts.jsonl")
    given = ["--model", str(work / "model"), "--prompts", str(work / "prompts.jsonl"), "--steps", str(args.steps),
             "--method", args.method, "--lengths", args.lengths]
    size = PROMPTS * GENERATIONS
    lengths = [sum(drawn(step)) / size if args.lengths == "drawn" else NEW_TOKENS for step in range(args.steps)]
    sides = {"ours": [sys.executable, str(HERE / "step.py"), "--ours"]}
    if args.peer_python:
        sides["trl"] = [args.peer_python, str(HERE / "peer_trl.py")]
    results: dict[str, dict[str, Any]] = {side: {} for side in sides}
    for micro_batch in args.micro_batch:
        for side, command in sides.items():
            print(f"micro-batch {micro_batch}, {side} ...", flush=True)
            result = child([*command, *given, "--micro-batch", str(micro_batch)], args.threads, lengths)
            print(f"  {result.get('error') or result['steps_s']}", flush=True)
            results[side][str(micro_batch)] = result
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Medians, ratios and peak memory, and the best of each side against the other's best."""
    lines = ["micro-batch |  ours s |   TRL s | TRL/ours | ours GB | TRL GB"]
    for micro_batch, own in results["ours"].items():
        peer = results.get("trl", {}).get(micro_batch, {})
        a, b = own.get("median_s"), peer.get("median_s")
        ratio = f"{b / a:.2f}" if a and b else "-"
        cells = [a or "-", b or "-", ratio, own.get("peak_gb", "-"), peer.get("peak_gb", "-")]
        widths = (7, 7, 8, 7, 6)
        row = " | ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{micro_batch:>11} | {row}")
    best = {side: [r for r in runs.values() if "median_s" in r] for side, runs in results.items()}
    if best["ours"] and best.get("trl"):
        mine, theirs = (min(best[side], key=lambda r: r["median_s"]) for side in ("ours", "trl"))
        ratio = theirs["median_s"] / mine["median_s"]
        lines.append(
            f"Best against best: {mine['median_s']} s and {mine['peak_gb']} GB, TRL {theirs['median_s']} s and "
            f"{theirs['peak_gb']} GB: {ratio:.2f} times as fast."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", help="python of an environment with trl==1.16.0; without it ours alone is timed"
    )
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--method", default="grpo", choices=sorted(METHODS))
    parser.add_argument("--lengths", default="all", choices=["all", "drawn"], help="of rollouts: 64 tokens, or 8 to 64")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, the first one as warm-up")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 4, 16], choices=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="step.json")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)  # one run of our side, in this process
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.method, args.model, args.prompts, args.micro_batch[0], args.steps, args.lengths)))
        return
    if args.peer_python and not shutil.which(args.peer_python):
        parser.error(f"--peer-python: there is no program {args.peer_python!r}")
    with tempfile.TemporaryDirectory(prefix="selftaught-bench-") as work:
        results = measure(args, Path(work))
    setting = {
        "method": args.method, "prompts": PROMPTS, "generations": GENERATIONS, "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS, "lengths": args.lengths, "dtype": "float32", "threads": args.threads,
        "model": args.model, "machine": platform.processor(),
    }  # fmt: skip
    Path(args.out).write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
    print(table(results))
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
