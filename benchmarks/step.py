"""Time and peak memory of one GRPO or SDPO step, ours beside TRL's, on the same model, prompts, threads and precision.

    python benchmarks/step.py --peer-python PATH/TO/VENV-WITH-TRL/bin/python --out step.json
    python benchmarks/step.py --method sdpo --lengths drawn --peer-python ...
    python benchmarks/step.py --sides ours plain trl --peer-python ...    # the update: packed, one row each, TRL's

A step: 4 prompts of 128 tokens x 4 rollouts of exactly 64 new tokens, or of 8 to 64, float32, one optimiser update, the
whole loop (sampling, reward, loss, update). `update` is all of it but sampling; `plain` is ours with every rollout in a
row of its own instead of after its group's prompt, in sampling too. Micro-batches of 1, one group and all rollouts; the
sides take turns, each run in a process of its own so that its peak memory is its own. The first step of a run is
warm-up and not counted. The machine must be quiet; on 2 cores it takes a quarter of an hour. Where it cannot be quiet,
`--rounds 5`: medians are of all counted steps of all rounds, every other round is in reverse order, and the ratio of
each round is printed. Drawn lengths are forced upon all samplers, the same ones in each step. The reward of GRPO is a
hash of the text: this measures time, not learning.
SDPO: each rollout is a success, so its teacher, an average of the student's weights, sees a sibling's text; the
objective is the published one on all sides (js on 100 tokens and a tail).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_trl import Sizes, drawn
from shared import child, peak_gb, write_model, write_prompts

HERE = Path(__file__).resolve().parent


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The peer's reward: a hash of the text, varied and free."""
    return [(zlib.crc32(str(text).encode("utf-8", "replace")) % 7) / 7.0 for text in completions]


def succeed(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """As the peer's for SDPO: every rollout a success."""
    return [1.0 for _ in completions]


# Our side: a run through the front door, timed from outside.


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "reward": f"{HERE / 'step.py'}:reward"},
    "sdpo": {"method": "sdpo", "reward": f"{HERE / 'step.py'}:succeed",
             "privilege": {"kind": "demonstration", "choose": "first"}},
}  # fmt: skip


def recipe(method: str, model: str, prompts: str, sizes: Sizes, micro_batch: int, steps: int, out: str,
           layout: str = "auto") -> dict[str, Any]:  # fmt: skip
    """The peer's setting in our words. A micro-batch is a token budget: prompts are shared within a group, and the
    first success is shown to all the others, another to itself; in the plain layout every row has its own.
    """
    prompt = sizes.prompt_tokens
    if method == "sdpo":  # a sibling's text and the words around it come on top
        prompt += sizes.new_tokens + 16
    contexts = max(1, micro_batch // sizes.generations) * (1 if method == "grpo" else min(2, micro_batch))
    if layout == "plain":
        contexts = micro_batch
    return {
        **METHODS[method],
        "model": model,
        "data": {"source": prompts, "heldout": 0, "template": "completion", "question": "{question}", "answer": ""},
        "rollout": {
            "num_generations": sizes.generations,
            "prompts_per_step": sizes.prompts,
            "max_completion_length": sizes.new_tokens,
            "temperature": 1.0,
            "max_rows": sizes.rollouts,  # all at once, as the peer samples them
        },
        "score": {"layout": layout},
        "optim": {
            "steps": steps,
            "learning_rate": 1e-6,
            "dtype": "float32",
            "token_budget": contexts * prompt + micro_batch * sizes.new_tokens,
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


def end_rows(end: int, sizes: Sizes) -> None:
    """Let every row of the engine end at its drawn length by token `end`; its log-prob is recorded as the model's."""
    import torch

    from selftaught.rollout import transformers_engine as engine

    steps, ahead, due, lengths = itertools.count(), list[int](), list[bool](), dict[int, int]()
    sample, draw = engine.TransformersEngine._draw, engine.draw

    def row_by_row(self: Any, active: list[Any], logits: Any, position: int, sampling: Any) -> Any:
        if position == 0:  # of a batch: all rollouts, or one group in the plain layout
            ahead[:] = ahead or drawn(next(steps), sizes)
            lengths.clear()
            lengths.update(zip(map(id, active), ahead, strict=False))
            del ahead[: len(active)]
        due[:] = [position + 1 == lengths[id(row)] for row in active]
        return sample(self, active, logits, position, sampling)

    def ended(logits: Any, uniform: Any) -> Any:
        tokens, logp = draw(logits, uniform)
        rows = torch.tensor(due)
        tokens[rows], logp[rows] = end, logits[rows].log_softmax(-1)[:, end]
        return tokens, logp

    engine.TransformersEngine._draw, engine.draw = row_by_row, ended


def ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each step and peak memory of `selftaught.train` of the recipe `given` in this process."""
    import torch

    import selftaught

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        metrics = out / "metrics.jsonl"
        began, seen, stop = time.monotonic(), list[float](), threading.Event()
        watcher = threading.Thread(target=watch, args=(metrics, seen, stop), daemon=True)
        watcher.start()
        selftaught.train(**{**given, "out": str(out)})
        stop.set()
        watcher.join()
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    ends = [began, *(end for end, row in zip(seen, rows, strict=True) if "reward" in row)]
    steps = [row for row in rows if "reward" in row]
    return {
        "steps_s": [round(b - a, 3) for a, b in itertools.pairwise(ends)],
        **{f"{part}_s": [round(row[f"time/{part}"], 3) for row in steps] for part in ("sample", "score", "update")},
        "peak_gb": peak_gb(),
        "mean_new_tokens": [row["completions/mean_length"] for row in steps],
        "threads": torch.get_num_threads(),
        "versions": {"selftaught": selftaught.__version__, "torch": torch.__version__},
    }


# Taking turns.


def run(command: list[str], threads: int, lengths: list[float]) -> dict[str, Any]:
    """One side in its own process: its result, or {"error": ...}. `lengths`: each step's mean."""
    result = child(command, threads)
    if "error" in result:
        return result
    if result["mean_new_tokens"] != lengths:
        return {**result, "error": f"mean lengths are {result['mean_new_tokens']}, not {lengths}"}
    # All but the sampling of a step is its update; the first step is warm-up.
    rest = [step - sample for step, sample in zip(result["steps_s"], result["sample_s"], strict=True)]
    return {**result, "counted": {"": result["steps_s"][1:], "_sample": result["sample_s"][1:], "_update": rest[1:]}}


def pooled(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the counted steps of all `rounds` and the highest peak; {"error": ...} where one of them failed."""
    if failed := next((result for result in rounds if "error" in result), None):
        return {"error": failed["error"], "rounds": rounds}
    medians = {f"median{part}_s": round(statistics.median(s for result in rounds for s in result["counted"][part]), 2)
               for part in ("", "_sample", "_update")}  # fmt: skip
    return {**medians, "peak_gb": max(result["peak_gb"] for result in rounds), "rounds": rounds}


def ratios(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[float]:
    """Of each round: how many times as long a median step of `theirs` takes."""
    a, b = ([statistics.median(result["counted"][""]) for result in side["rounds"]] for side in (theirs, mine))
    return [round(x / y, 2) for x, y in zip(a, b, strict=True)]


def measure(args: argparse.Namespace, sizes: Sizes, work: Path) -> dict[str, dict[str, Any]]:
    """{side: {micro-batch: pooled result}}, the sides taking turns."""
    write_model(args.model, work / "model")
    write_prompts(work / "model", work / "prompts.jsonl", sizes.prompt_tokens)
    given = ["--model", str(work / "model"), "--prompts", str(work / "prompts.jsonl"), "--steps", str(args.steps),
             "--method", args.method, "--lengths", args.lengths, "--sizes", *map(str, sizes)]  # fmt: skip
    lengths = [sum(drawn(step, sizes)) / sizes.rollouts if args.lengths == "drawn" else sizes.new_tokens
               for step in range(args.steps)]  # fmt: skip
    commands = {side: [args.peer_python, str(HERE / "peer_trl.py")] if side == "trl"
                else [sys.executable, str(HERE / "step.py"), "--one", side] for side in args.sides}  # fmt: skip
    turns = list(itertools.product(args.micro_batch, commands))
    found: dict[tuple[int, str], list[dict[str, Any]]] = {turn: [] for turn in turns}
    for number in range(args.rounds):
        for micro_batch, side in turns[:: -1 if number % 2 else 1]:
            print(f"micro-batch {micro_batch}, {side} ...", flush=True)
            result = run([*commands[side], *given, "--micro-batch", str(micro_batch)], args.threads, lengths)
            print(f"  {result.get('error') or result['counted']['']}", flush=True)
            found[micro_batch, side].append(result)
    return {side: {str(m): pooled(found[m, side]) for m in args.micro_batch} for side in commands}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Medians, their ratios to the first side's, and peak memory; then the best of each side beside the first's."""
    first = next(iter(results))
    lines = ["micro-batch | side  |  step s | ratio | sample s | update s | ratio | peak GB"]
    for micro_batch, base in results[first].items():
        for side in results:
            found = results[side][micro_batch]
            if "error" in found:
                lines.append(f"{micro_batch:>11} | {side:5} | {found['error']}")
                continue
            step, update = (f"{found[key] / base[key]:5.2f}" if base.get(key) else "    -"
                            for key in ("median_s", "median_update_s"))  # fmt: skip
            lines.append(f"{micro_batch:>11} | {side:5} | {found['median_s']:7.2f} | {step} | "
                         f"{found['median_sample_s']:8.2f} | {found['median_update_s']:8.2f} | {update} | "
                         f"{found['peak_gb']:7.2f}")  # fmt: skip
    best = {side: min((r for r in runs.values() if "error" not in r), key=lambda r: r["median_s"], default=None)
            for side, runs in results.items()}  # fmt: skip
    mine = best.pop(first)
    for side, theirs in best.items():
        if mine and theirs:
            lines.append(f"Best against best: {first} {mine['median_s']} s and {mine['peak_gb']} GB, {side} "
                         f"{theirs['median_s']} s and {theirs['peak_gb']} GB: "
                         f"{theirs['median_s'] / mine['median_s']:.2f} times as fast "
                         f"(of each round: {', '.join(map(str, ratios(theirs, mine)))}).")  # fmt: skip
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python",
                        help="python of an environment with trl==1.16.0; without it ours alone is timed")  # fmt: skip
    parser.add_argument("--sides", nargs="+", choices=["ours", "plain", "trl"],
                        help="ours, and trl where --peer-python is given; ratios are to the first")  # fmt: skip
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--method", default="grpo", choices=sorted(METHODS))
    parser.add_argument("--lengths", default="all", choices=["all", "drawn"],
                        help="of rollouts: the longest, or from an eighth of it")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs=4, default=Sizes(), metavar=("PROMPTS", "GROUP", "PROMPT", "NEW"),
                        help="prompts and rollouts of each, tokens of a prompt and of a rollout")  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, the first one as warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side and micro-batch")
    parser.add_argument("--micro-batch", type=int, nargs="+", help="rollouts; by default 1, one group, and all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="step.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run of this side of ours, in this process
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sizes = Sizes(*args.sizes)
    args.sides = args.sides or ["ours", *(["trl"] if args.peer_python else [])]
    args.micro_batch = args.micro_batch or sorted({1, args.sizes.generations, args.sizes.rollouts})
    if "trl" in args.sides and not (args.peer_python and shutil.which(args.peer_python)):
        parser.error(f"--peer-python: {args.peer_python!r} is no program, and the side trl needs one")
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps {args.steps} --rounds {args.rounds}: the first step is not counted, so two steps and "
                     "one round at least")  # fmt: skip
    if odd := [size for size in args.micro_batch if size < 1 or args.sizes.rollouts % size]:
        parser.error(f"--micro-batch: {odd[0]} does not divide a step's {args.sizes.rollouts} rollouts")
    return args


def main() -> None:
    args = arguments()
    if args.one:
        if args.lengths == "drawn":
            from selftaught.score.hub import load_tokenizer

            end_rows(load_tokenizer(args.model).eos_token_id, args.sizes)
        layout = "plain" if args.one == "plain" else "auto"
        given = recipe(args.method, args.model, args.prompts, args.sizes, args.micro_batch[0], args.steps, "", layout)
        print(json.dumps(ours(given)))
        return
    with tempfile.TemporaryDirectory(prefix="selftaught-bench-") as work:
        results = measure(args, args.sizes, Path(work))
    setting = {"method": args.method, **args.sizes._asdict(), "lengths": args.lengths, "dtype": "float32",
               "threads": args.threads, "model": args.model, "machine": platform.processor()}  # fmt: skip
    Path(args.out).write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
    print(table(results))
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
