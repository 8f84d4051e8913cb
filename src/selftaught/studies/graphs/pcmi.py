"""Does the base model's in-context teacher predict what self-distillation does? (arXiv 2606.26091, Remark 1)

Self-distillation from demonstrations c has the optimum pi*(y) proportional to pi0(y) exp(E_c i(y; c)), with
i(y; c) = log pi0(y|x, c) - log pi0(y|x) (beta = 0, KL(S||T), frozen teacher). Of two right walks, one through each
slot, the log-odds thus move from log k to log k + E_c[i(0; c) - i(1; c)]; c is drawn from pi0 on the two. The paper
states this and does not measure it. KL(T||S) has the arithmetic mean E_c pi0(y|x, c) as its optimum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selftaught.data.graphs import TARGETS, Graph, prompt, shown
from selftaught.studies.graphs.base import ANSWER, QUESTION, SHOWN, collate

CHUNK = 64  # sequences of one pass


@torch.no_grad()
def logps(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """log pi(response, end | text) of each pair, in nats: (B,)."""
    found = []
    for start in range(0, len(pairs), CHUNK):
        ids, labels = collate([(text, [walk]) for text, walk in pairs[start : start + CHUNK]], tokenizer)
        logp = model(input_ids=ids.to(model.device)).logits[:, :-1].float().log_softmax(-1).cpu()
        wanted = labels[:, 1:]
        taken = logp.gather(-1, wanted.clamp_min(0)[..., None]).squeeze(-1)
        found.append(taken.masked_fill(wanted < 0, 0.0).sum(-1))
    return torch.cat(found)


def walks(graphs: Sequence[Graph]) -> list[tuple[str, str]]:
    """For each graph, under no demonstration and then under each slot's, the walk of either slot: 6 pairs."""
    pairs = []
    for graph in graphs:
        asked = QUESTION.replace("{question}", prompt(graph, "tokens"))
        each = [shown(graph.path(slot), "tokens") for slot in range(TARGETS)]
        for block in ("", *(SHOWN.replace("{privilege}", walk) + "\n" for walk in each)):
            pairs += [(asked + block + ANSWER, walk) for walk in each]
    return pairs


def predict(logp_C2: Tensor) -> dict[str, float]:
    """Log-odds of slot 0 over slot 1 from log pi0 of the two walks, rows: plain, shown slot 0, shown slot 1 (3, 2)."""
    (plain, *given), share = logp_C2.double().tolist(), logp_C2[0].double().softmax(0).tolist()
    tilt = [sum(share[c] * (given[c][y] - plain[y]) for c in range(TARGETS)) for y in range(TARGETS)]
    mixed = [sum(share[c] * math.exp(given[c][y]) for c in range(TARGETS)) for y in range(TARGETS)]
    return {
        "base": plain[0] - plain[1],
        "tilted": plain[0] - plain[1] + tilt[0] - tilt[1],
        "mixed": math.log(mixed[0]) - math.log(mixed[1]),
        "right": math.exp(plain[0]) + math.exp(plain[1]),
        "copies0": math.exp(given[0][0]), "copies1": math.exp(given[1][1]),
        "shifts0": math.exp(given[0][1]), "shifts1": math.exp(given[1][0]),
    }  # fmt: skip


def predictions(model: Any, tokenizer: Any, graphs: Sequence[Graph]) -> dict[str, float]:
    """Means over graphs with one chain in each sector: `predict`, and the share of slot 0 that each log-odds mean."""
    rows = logps(model, tokenizer, walks(graphs)).view(len(graphs), 1 + TARGETS, TARGETS)
    each = [predict(row) for row in rows]
    means = {name: statistics.fmean(one[name] for one in each) for name in each[0]}
    for name in ("base", "tilted", "mixed"):
        means[f"slot0_{name}"] = statistics.fmean(1 / (1 + math.exp(-one[name])) for one in each)
    return means
