"""How the cost of our step grows: with the response, the group, the prompt and the vocabulary.

    python benchmarks/growth.py --out growth.json
    python benchmarks/growth.py --axes response group --method sdpo --response 64 128 256 512

One axis at a time, the others at the first of their values. Seconds of a step's sampling, scoring and update, and the
peak memory of the process, which is a new one for each point; steps go through the front door, the first is warm-up and
not counted. Responses have exactly the tokens named. A micro-batch is one group, so that memory grows with what a group
holds. Model: quickstart; on the axis of the vocabulary its architecture with random weights and that many words.

The last rows of an axis are slopes of the logarithms: doubling the size costs 2**slope times as much. `slope` is the
least-squares one over all points, `last` that of the last two, which says more of large sizes where a constant
(weights, optimiser) is still part of the first ones. The default method scores views before the update; most do not,
and have nothing there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import methods
import step as one_step
from peer_trl import Sizes
from shared import child, write_model, write_prompts, write_random_model

HERE = Path(__file__).resolve().parent
AXES = {"response": [32, 64, 128, 256], "group": [4, 8, 16, 32], "prompt": [64, 128, 256, 512],
        "vocabulary": [32_000, 128_256, 151_936, 262_144]}  # fmt: skip
COSTS = ("sample_s", "score_s", "update_s", "peak_gb")


def recipe(method: str, model: str, prompts: str, sizes: Sizes, steps: int) -> dict[str, Any]:
    """The methods benchmark's, with room in a micro-batch for one group and what its teacher is shown."""
    given = methods.recipe(method, model, prompts, sizes, steps)
    # A group's first success is shown to all others, another to itself; an answer is a few words.
    contexts, shown = (2, sizes.new_tokens + 16) if method in methods.DEMONSTRATED else (1, 32)
    given["optim"]["token_budget"] = contexts * (sizes.prompt_tokens + shown) + sizes.generations * sizes.new_tokens
    return given


def point(axis: str, size: int, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Medians of one setting, measured in a process of its own."""
    base = {name: getattr(args, name)[0] for name in ("response", "group", "prompt")} | {axis: size}
    sizes = Sizes(args.prompts_per_step, base["group"], base["prompt"], base["response"])
    model = work / (f"model-{size}" if axis == "vocabulary" else "model")
    if not model.exists():
        if axis == "vocabulary":
            write_random_model(args.model, size, model)
        else:
            write_model(args.model, model)
    prompts = work / "prompts.jsonl"
    write_prompts(model, prompts, sizes.prompt_tokens)
    given = recipe(args.method, str(model), str(prompts), sizes, args.steps)
    found = child([sys.executable, str(HERE / "growth.py"), "--one", json.dumps(given)], args.threads)
    if "error" not in found and found["mean_new_tokens"] != [sizes.new_tokens] * args.steps:
        found = {"error": f"mean lengths are {found['mean_new_tokens']}, not {sizes.new_tokens}"}
    if "error" not in found:
        medians = {cost: round(statistics.median(found[cost][1:] or found[cost]), 3) for cost in COSTS[:-1]}
        found |= {"steps": {cost: found[cost] for cost in COSTS[:-1]}, **medians}
    return {"axis": axis, "size": size, **sizes._asdict(), **found}


def slopes(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Of log cost over log size: by least squares, and between the last two points; NaN where a cost is 0."""
    if len(sizes) < 2 or min(costs) <= 0:
        return math.nan, math.nan
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope, (y[-1] - y[-2]) / (x[-1] - x[-2])


def along(axis: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All points of an axis, printed as they come, and their slopes."""
    rows = []
    print(f"{axis:>10} | sample s | score s | update s | peak GB", flush=True)
    for size in getattr(args, axis):
        row = point(axis, size, args, work)
        rows.append(row)
        cells = row.get("error") or " | ".join(f"{row[cost]:{width}.2f}" for cost, width in zip(COSTS, (8, 7, 8, 7),
                                                                                                strict=True))
        print(f"{size:10} | {cells}", flush=True)
    good = [row for row in rows if "error" not in row]
    fits = {cost: slopes([row["size"] for row in good], [row[cost] for row in good]) for cost in COSTS}
    for index, name in enumerate(("slope", "last")):
        cells = " | ".join(f"{fits[cost][index]:{width}.2f}" for cost, width in zip(COSTS, (8, 7, 8, 7), strict=True))
        print(f"{name:>10} | {cells}", flush=True)
    return {"points": rows, "slopes": {cost: [None if math.isnan(s) else round(s, 3) for s in fit]
                                       for cost, fit in fits.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    for axis, sizes in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=sizes, metavar="SIZE")
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--method", default="rlsd", help="any of `selftaught methods`")
    parser.add_argument("--prompts-per-step", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps of each point, the first one as warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="growth.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one point in this process, as a recipe in JSON
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_step.ours(json.loads(args.one))))
        return

    from selftaught.methods import names

    if args.method not in names():
        parser.error(f"--method: {args.method!r} is none of {', '.join(names())}")
    with tempfile.TemporaryDirectory(prefix="selftaught-bench-") as work:
        results = {axis: along(axis, args, Path(work)) for axis in args.axes}
    Path(args.out).write_text(json.dumps({"setting": vars(args), "results": results}, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
