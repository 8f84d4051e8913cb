"""The shared-prefix layout beside the plain one: scoring, and scoring with backward.

    python benchmarks/layout.py --out layout.json

Both layouts in one process on the same weights, prompts and responses, taking turns. Scoring: hidden states of all
response tokens, without gradient. Backward: the same with the gradient of their log-probs in every weight. That both
layouts give the same numbers is a test of the suite and is looked at here again. A whole update in both layouts, beside
a peer's, is `step.py --sides ours plain trl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared import TEXT, turns

TOLERANCE = 1e-3  # of the largest hidden state: layouts differ by the order of sums


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
    ids = tokenizer(TEXT * (args.prompt_tokens // 8 + 2), add_special_tokens=False)["input_ids"]
    prompts = [tuple(ids[i : i + args.prompt_tokens]) for i in range(args.prompts)]
    generator = torch.Generator().manual_seed(0)
    responses = [tuple(torch.randint(len(tokenizer), (args.new_tokens,), generator=generator).tolist())
                 for _ in range(args.prompts * args.group)]  # fmt: skip
    found = layouts(model, [p for p in prompts for _ in range(args.group)], responses, args.runs)
    print("work     | shared s | plain s | plain/shared")
    for work, sides in found.items():
        shared, plain = (side["median_s"] for side in sides.values())
        print(f"{work:8} | {shared:8.2f} | {plain:7.2f} | {plain / shared:12.2f}")
    Path(args.out).write_text(json.dumps({"setting": vars(args), "results": found}, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
