"""The shared-prefix layout beside the plain one, and the built-in engine beside transformers' `generate`.

    python benchmarks/layout.py --out layout.json

Both sides in one process on the same weights, prompts and responses, taking turns. Scoring: hidden states of all
response tokens, without gradient. Backward: the same with the gradient of their log-probs in every weight. Sampling:
exactly `--new-tokens` tokens for each row, float32, untruncated; `generate` gets the same rows as one batch. That both
layouts give the same numbers is a test of the suite and is looked at here again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step as one_step

TOLERANCE = 1e-3  # of the largest hidden state: layouts differ by the order of sums


def turns(sides: dict[str, Callable[[], Any]], runs: int) -> dict[str, dict[str, Any]]:
    """Seconds of each side, taking turns, after one turn for warm-up."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs + 1):
        for side, work in sides.items():
            began = time.monotonic()
            work()
            seconds[side].append(time.monotonic() - began)
    return {side: {"seconds": [round(s, 3) for s in each[1:]], "median_s": round(statistics.median(each[1:]), 3)}
            for side, each in seconds.items()}  # fmt: skip


def layouts(model: Any, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]],
            runs: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Scoring, and scoring with backward, in both layouts."""
    import torch

    from selftaught.loss import chunked_loss
    from selftaught.records import TokenLoss
    from selftaught.score import Backbone
    from selftaught.tensors import pack

    shared, plain = Backbone(model, layout="shared"), Backbone(model, layout="plain")
    packed = pack(prompts, responses)
    tokens = torch.tensor([token for response in responses for token in response])
    weight = torch.ones(len(tokens)) / len(tokens)

    def score(backbone: Backbone) -> Any:
        with backbone.frozen():
            return backbone.hidden(packed)

    def backward(backbone: Backbone) -> None:
        model.zero_grad()
        with backbone.accumulating() as head_grad:
            reduced = chunked_loss(lambda student, views, credit: TokenLoss(-student.at_sampled, {}),
                                   {"student": backbone.hidden(packed)}, {"student": backbone.head()}, tokens, {},
                                   weight, head_grad=head_grad)
            reduced.loss.backward()

    gap = (score(shared) - score(plain)).abs().max() / score(plain).abs().max()
    if gap > TOLERANCE:
        raise SystemExit(f"the layouts differ by {gap:.2g} of the largest hidden state: nothing to compare")
    sides = {"shared": shared, "plain": plain}
    return {"score": turns({side: lambda b=b: score(b) for side, b in sides.items()}, runs),
            "backward": turns({side: lambda b=b: backward(b) for side, b in sides.items()}, runs)}  # fmt: skip


def sampling(model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], group: int, new_tokens: int,
             runs: int) -> dict[str, dict[str, Any]]:
    """Rows of exactly `new_tokens` tokens from the built-in engine and from `generate`."""
    import torch

    from selftaught.records import Problem, Prompt, Request, Sampling
    from selftaught.rollout import TransformersEngine
    from selftaught.score import Backbone

    requests = [Request(Problem(str(i), ""), Prompt(ids), 0, 0) for i, ids in enumerate(prompts)]
    setting = Sampling(1.0, 1.0, None, new_tokens, ())
    engine = TransformersEngine(Backbone(model), tokenizer, ())  # no token stops it
    rows = torch.tensor([ids for ids in prompts for _ in range(group)])

    def ours() -> None:
        drawn = engine.sample(requests, group, setting)
        assert {len(rollout.token_ids) for rollout in drawn} == {new_tokens} and len(drawn) == len(rows)

    def theirs() -> None:
        out = model.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, top_p=1.0,
                             temperature=1.0, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                             pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        assert out.shape == (len(rows), rows.shape[1] + new_tokens)

    return turns({"ours": ours, "generate": theirs}, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--prompts", type=int, default=2, help="problems, each of a prompt of its own")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3, help="turns that count, after one for warm-up")
    parser.add_argument("--out", default="layout.json")
    args = parser.parse_args()

    import torch

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_model, load_tokenizer

    with quiet():
        model, tokenizer = load_model(args.model, torch.float32, "cpu"), load_tokenizer(args.model)
    ids = tokenizer(one_step.TEXT, add_special_tokens=False)["input_ids"]
    prompts = [tuple(ids[i : i + args.prompt_tokens]) for i in range(args.prompts)]
    generator = torch.Generator().manual_seed(0)
    responses = [tuple(torch.randint(len(tokenizer), (args.new_tokens,), generator=generator).tolist())
                 for _ in range(args.prompts * args.group)]  # fmt: skip
    found = layouts(model, [p for p in prompts for _ in range(args.group)], responses, args.runs)
    found["sample"] = sampling(model, tokenizer, prompts, args.group, args.new_tokens, args.runs)
    print("work     | ours s | other s | other/ours")
    for work, sides in found.items():
        mine, other = (side["median_s"] for side in sides.values())
        print(f"{work:8} | {mine:6.2f} | {other:7.2f} | {other / mine:6.2f}   ({' against '.join(sides)})")
    Path(args.out).write_text(json.dumps({"setting": vars(args), "results": found}, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
