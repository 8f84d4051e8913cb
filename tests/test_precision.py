"""A bfloat16 model against float64 on the same weights: scores, softmaxes and log-probs are float32 everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import families
from selftaught.loss import chunked_loss
from selftaught.optim import OptimConfig, Optimizer
from selftaught.records import Problem, Prompt, Request, Sampling, TokenLoss
from selftaught.rollout import TransformersEngine
from selftaught.rollout.cache import DecodeCache
from selftaught.score import Backbone
from selftaught.score.attention import Segments
from selftaught.tensors import pack
from selftaught.vocabulary import sampled_log_probs
from tiny import tiny_tokenizer

PROMPT, WRITTEN, ROWS, HEADS = 40, 9, 3, (4, 2)
PACKED = pack([tuple(range(PROMPT))] * ROWS, [tuple(range(100 * i, 100 * i + WRITTEN + 1)) for i in range(1, ROWS + 1)])
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def seen() -> Tensor:
    """Which tokens of the pass see which: (T, T)."""
    mask = torch.zeros(len(PACKED.token_ids), len(PACKED.token_ids), dtype=torch.bool)
    mask[:PROMPT, :PROMPT] = True
    for start in range(PROMPT, len(mask), WRITTEN):
        rows = slice(start, start + WRITTEN)
        mask[rows, :PROMPT] = mask[rows, rows] = True
    return mask.tril()


def dense(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, scores: torch.dtype = torch.float64) -> Tensor:
    """Attention in float64, with the scores alone rounded to `scores`: (T, Hq, D)."""
    key, value = (x.double().repeat_interleave(HEADS[0] // HEADS[1], 0) for x in (key, value))
    raw = (query.double() @ key.transpose(1, 2) * scaling).to(scores).double()
    return (raw.masked_fill(~seen(), -torch.inf).softmax(-1) @ value).transpose(0, 1)


def packed(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return Segments(PACKED).attend(0, query, key, value, scaling, None)


def decoded(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The responses' tokens by the sampler's cache, one of each at a time; what stands before them is left at zero."""
    prompt = {0: (key[:, None, :PROMPT], value[:, None, :PROMPT])}
    cache = DecodeCache(prompt, torch.tensor([PROMPT]), torch.zeros(ROWS, dtype=torch.int64))
    out = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
    for place in range(WRITTEN):
        at = PROMPT + place + WRITTEN * torch.arange(ROWS)
        out[at] = cache.attend(0, query[:, at], key[:, at], value[:, at], scaling, None)
        cache.advance()
    return out


@pytest.mark.parametrize("attention", [packed, decoded])
@pytest.mark.parametrize("width", [8, 64])
def test_attention_of_bfloat16_has_scores_and_softmax_in_float32(attention: Attention, width: int) -> None:
    """What is left is the rounding of weights and values: a bound that scores in bfloat16 alone go beyond."""
    random = torch.Generator().manual_seed(width)
    query, key, value = (torch.randn(heads, len(PACKED.token_ids), width, generator=random)
                         for heads in (HEADS[0], HEADS[1], HEADS[1]))
    query, key, value = (3 * query).bfloat16(), key.bfloat16(), value.bfloat16()
    scaling = width**-0.5
    exact = dense(query, key, value, scaling)[PROMPT:]
    found = attention(query, key, value, scaling)
    assert found.dtype == torch.bfloat16
    error = (found[PROMPT:].double() - exact).abs().mean()
    of_scores = (dense(query, key, value, scaling, scores=torch.bfloat16)[PROMPT:] - exact).abs().mean()
    assert error < 2.0**-9 * exact.abs().mean() * 2 < of_scores


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_log_probs_of_a_bfloat16_model_are_near_float64s_and_the_samplers_near_the_scorers(family: str) -> None:
    narrow = families.SUPPORTED[family]().to(torch.bfloat16)
    exact = families.SUPPORTED[family]().to(torch.bfloat16).double()  # the same weights
    backbone = Backbone(narrow, "shared")
    prompts = [tuple(range(20, 60)), tuple(range(25, 40))]
    asked = [Request(Problem(f"p{i}", "?"), Prompt(prompt), 0, 0) for i, prompt in enumerate(prompts)]
    rollouts = TransformersEngine(backbone, tiny_tokenizer(), ()).sample(asked, 8, Sampling(max_completion_length=24))
    given, written = [r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts]
    tokens = torch.tensor([t for row in written for t in row])
    with backbone.frozen():
        hidden = backbone.hidden(pack(given, written))
    scored, _ = sampled_log_probs(hidden, backbone.head(), tokens)
    sampled = torch.tensor([p for r in rollouts for p in r.logp_sampler])
    with torch.no_grad():
        reference = torch.cat([exact(input_ids=torch.tensor([p + w]), use_cache=False).logits[0, len(p) - 1 : -1]
                               .log_softmax(-1).gather(1, torch.tensor(w)[:, None])[:, 0]
                               for p, w in zip(given, written, strict=True)])
    assert scored.dtype == torch.float32
    for one, other in ((scored, reference), (sampled, reference), (sampled, scored)):
        gap = (one - other).abs()
        assert gap.mean() < 0.04 and gap.max() < 0.4  # nats: two layers of activations rounded to 8 bits


def test_the_head_of_a_bfloat16_model_is_float32_on_what_it_is_given() -> None:
    backbone = Backbone(families.llama().to(torch.bfloat16))
    hidden = (4 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens = torch.arange(50)
    logits = hidden.double() @ backbone.head().weight.detach().double().t()
    exact = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found, _ = sampled_log_probs(hidden, backbone.head(), tokens)
    assert (found.double() - exact).abs().max() < 1e-5
    rounded = logits.bfloat16().double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (rounded - exact).abs().max() > 1e-2  # what logits in bfloat16 would cost


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("master", ["float32", "stochastic"])
def test_the_heads_gradient_is_added_where_the_optimiser_gathers_it_unrounded(tied: bool, master: str) -> None:
    found = []
    for in_place in (False, True):
        model = families.llama(tie_word_embeddings=tied).bfloat16()
        backbone = Backbone(model)
        optimizer = Optimizer(model.named_parameters(), OptimConfig(dtype="bfloat16", master=master, steps=1))
        head = model.get_output_embeddings().weight
        with backbone.accumulating(optimizer.gathered if in_place else None) as head_grad:
            assert (head_grad is not None) is in_place
            for _ in range(2):
                n = sum(len(response) for _, response in PACKED.rows)
                reduced = chunked_loss(
                    lambda student, views, credit: TokenLoss(-student.at_sampled, {}),
                    {"student": backbone.hidden(PACKED)}, {"student": backbone.head()},
                    torch.tensor([t for _, response in PACKED.rows for t in response]), {}, torch.ones(n) / n,
                    head_grad=head_grad)
                reduced.loss.backward()
        gradient = optimizer.gathered(head)
        assert gradient is not None and gradient.dtype == torch.float32 and head.grad is None
        found.append(gradient)
    rounded, exact = found
    assert 0 < (exact - rounded).norm() / exact.norm() < 4e-3  # a rounding to bfloat16 less
