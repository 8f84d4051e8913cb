"""Time and peak memory of one update by each method, as ratios to GRPO's on the same rollouts.

    python benchmarks/methods.py --out methods.json

Each method has a process of its own, so that its peak memory is its own; GRPO runs again before every third one, and a
ratio is to the GRPO nearest before it. An update is what follows sampling: scores of the views that the method's
credit reads, losses and gradients of all micro-batches, AdamW, and the teachers' own update. The rollouts are the same
for all, drawn by the untrained model: 4 prompts of 128 tokens x 4 rollouts of 64. The first update is warm-up. The
teacher that is another model is a copy of the student. The privilege is the answer, or of SDPO and DemoPSD a sibling.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import step as one_step
from peer_trl import Sizes
from shared import child, peak_gb, write_model, write_prompts

HERE = Path(__file__).resolve().parent
EVERY = 3  # methods between two runs of grpo
DEMONSTRATED = ("sdpo", "demopsd")


def recipe(method: str, model: str, prompts: str, sizes: Sizes, steps: int = 10) -> dict[str, Any]:
    """The step benchmark's setting with `method`, and what it needs, in micro-batches of one group."""
    from selftaught.methods import build

    run = one_step.recipe("grpo", model, prompts, sizes, sizes.generations, steps, "unused")
    kind = {"kind": "demonstration", "threshold": 0.0} if method in DEMONSTRATED else {"kind": "answer"}
    run |= {"method": method, "privilege": kind}
    if any(view.weights == "external" for view in build(method).views.values()):
        run["teacher"] = model
    if method == "dr_grpo":
        run["loss"] = {"reduction": "constant", "length": sizes.new_tokens}
    return run


def updates(method: str, model: str, prompts: str, new_tokens: int, count: int) -> dict[str, Any]:
    """Seconds of `count` updates after one for warm-up, and the peak memory of this process."""
    import torch

    from selftaught.assemble import assemble, lay_ground, make_batch, privileges_of
    from selftaught.batches import draw, optimiser_batches
    from selftaught.run import load_run

    update = importlib.import_module("selftaught.train").update
    ground = lay_ground(load_run(recipe(method, model, prompts, Sizes(new_tokens=new_tokens))), lambda line: None)
    try:
        parts = assemble(ground)
        drawn = draw(parts, 0)
        rollouts, verdicts = drawn.batch
        seconds = []
        for number in range(count + 1):
            session = SimpleNamespace(parts=parts, done=number, clock=lambda stage, since: time.monotonic() - since)
            began = time.monotonic()
            privileges = privileges_of(ground, rollouts, verdicts, 0)
            batch = make_batch(rollouts, verdicts, privileges, number, parts.backbone.device)
            for part, logp in optimiser_batches(parts, batch):
                update(session, part, logp)
            parts.teachers.update(number)
            seconds.append(time.monotonic() - began)
    finally:
        if ground.rewarder is not None:
            ground.rewarder.close()
    return {"seconds": [round(s, 3) for s in seconds[1:]],
            "peak_gb": peak_gb(),
            "tokens": sum(len(r.token_ids) for r in rollouts), "threads": torch.get_num_threads()}  # fmt: skip


def measured(method: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """`updates` in a process of its own."""
    given = {"--one": method, "--model": work / "model", "--prompts": work / "prompts.jsonl",
             "--new-tokens": args.new_tokens, "--updates": args.updates}  # fmt: skip
    result = child([sys.executable, str(HERE / "methods.py"), *(str(word) for pair in given.items() for word in pair)],
                   args.threads)  # fmt: skip
    return result if "error" in result else {**result, "median_s": statistics.median(result["seconds"])}


def main() -> None:
    from selftaught.methods import names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--methods", nargs="+", default=[name for name in names() if name != "grpo"])
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=Sizes().new_tokens)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="methods.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this method, in this process
    parser.add_argument("--prompts", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(updates(args.one, args.model, args.prompts, args.new_tokens, args.updates)))
        return
    rows: list[dict[str, Any]] = []
    base: dict[str, Any] = {}
    print("method  |      s |  ratio |  peak GB | ratio")
    with tempfile.TemporaryDirectory(prefix="selftaught-bench-") as folder:
        work = Path(folder)
        write_model(args.model, work / "model")
        write_prompts(work / "model", work / "prompts.jsonl")
        for index, method in enumerate(args.methods):
            for each in ["grpo", method] if index % EVERY == 0 else [method]:
                found = measured(each, args, work)
                base = found if each == "grpo" else base
                if "error" not in found and "error" not in base:
                    found["time_ratio"] = round(found["median_s"] / base["median_s"], 2)
                    found["memory_ratio"] = round(found["peak_gb"] / base["peak_gb"], 2)
                    cells = (found["median_s"], found["time_ratio"], found["peak_gb"], found["memory_ratio"])
                    line = f"{each:7} | {cells[0]:6.2f} | {cells[1]:6.2f} | {cells[2]:8.2f} | {cells[3]:5.2f}"
                    print(line, flush=True)
                else:
                    print(f"{each:7} | {found.get('error', 'no grpo to compare with')}", flush=True)
                rows.append({"method": each, **found})
    Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
