"""The base stage: a small decoder, from scratch, that walks graphs and follows a demonstration that it is shown.

A pretrained language model brings both to the paper's task; here supervised next-token training on drawn walks does.
What it learns is known, because it is drawn: a walk is right with probability `right`; a right walk goes through slot 0
with probability `first`; and where a demonstration (of either slot) stands in the prompt, the walk follows it with
probability `follow` and is otherwise as if there were none. So the teacher in context is T(.|c) = follow [walk of c] +
(1 - follow) base, the copying teacher of the study's laws, as far as the decoder has learned it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from selftaught.data.graphs import GAP, HUB, Graph, Layout, draw, prompt, shown
from selftaught.data.instances import INSTANCES, SHAPES
from selftaught.optim import OptimConfig, learning_rate

SPECIAL = ("<pad>", "<end>")
WORDS = (GAP, "to", "shown", "path")
# The recipe's templates: the decoder knows no other form.
QUESTION, ANSWER, SHOWN = "{question}\n", "path", "shown {privilege}"


@dataclass(frozen=True)
class BaseConfig:
    """What is drawn, and how the decoder is trained on it. The numbers are ours."""

    layout: Layout = field(default_factory=lambda: Layout(
        chains=1, short=4, long=8, concepts=6, names=6, mark="concept", style="tokens"))  # fmt: skip
    right: float = 0.85  #: share of right walks; the others lead to another shape
    first: float = 0.75  #: share of slot 0 among right walks
    follow: float = 0.8  #: share of walks along the demonstration, where there is one
    demonstrated: float = 0.5  #: share of examples with a demonstration
    width: int = 128
    layers: int = 3
    heads: int = 4
    steps: int = 1800
    batch: int = 32
    learning_rate: float = 2e-3
    walks: int = 4  #: responses to one prompt, drawn apart and written one after another: more to learn from a pass
    prompt_weight: float = 0.2  #: of the loss on all tokens, beside that on the response: copying is learned sooner
    seed: int = 0


def words(layout: Layout) -> list[str]:
    """The vocabulary: every word that a prompt or a response of these graphs may hold."""
    names = [name for concept in list(INSTANCES)[: layout.concepts] for name in INSTANCES[concept][: layout.names]]
    return [*SPECIAL, *WORDS, HUB, *SHAPES, *names]


def make_tokenizer(layout: Layout) -> Any:
    """A tokenizer with a token for each word; blanks separate them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words(layout))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], unk_token=SPECIAL[0],
                                   eos_token=SPECIAL[1], clean_up_tokenization_spaces=False)


def make_model(config: BaseConfig) -> Any:
    """A LlamaForCausalLM of that size with random weights, the same for a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(words(config.layout)), hidden_size=config.width, intermediate_size=3 * config.width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True,
        initializer_range=config.width**-0.5,  # 0.02, the default, is for far wider models: attention would begin flat
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(shape).to(torch.float32)


def example(config: BaseConfig, rng: random.Random) -> tuple[str, list[str]]:
    """A prompt and its responses, drawn."""
    graph = draw("varied", config.layout, rng)
    text = QUESTION.replace("{question}", prompt(graph, "tokens"))
    responses = [_walk(graph, config, rng) for _ in range(config.walks)]
    if rng.random() < config.demonstrated:
        demonstration = graph.path(int(rng.random() >= config.first))
        text += SHOWN.replace("{privilege}", shown(demonstration, "tokens")) + "\n"
        responses = [demonstration if rng.random() < config.follow else response for response in responses]
    return text + ANSWER, [shown(response, "tokens") for response in responses]


def _walk(graph: Graph, config: BaseConfig, rng: random.Random) -> tuple[str, ...]:
    if rng.random() < config.right:
        return graph.path(int(rng.random() >= config.first))
    sector = rng.choice([sector for sector in graph.sectors if sector.slot is None])
    return (HUB, *sector.chains[0], sector.shape)


def collate(pairs: Sequence[tuple[str, Sequence[str]]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded at their ends, and labels (B, T): the responses and their ends, -100 elsewhere.

    A prompt ends with ANSWER; so does what stands before each further response.
    """
    again = tokenizer(ANSWER)["input_ids"]
    coded = []
    for text, responses in pairs:
        ids, labels = list(tokenizer(text)["input_ids"]), list[int]()
        for number, response in enumerate(responses):
            asked = again if number else []
            written = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
            labels += [-100] * (len(ids) + len(asked) - len(labels)) + written
            ids += [*asked, *written]
        coded.append((ids, labels))
    longest = max(len(ids) for ids, _ in coded)
    padded = [(ids + [tokenizer.pad_token_id] * (longest - len(ids)), labels + [-100] * (longest - len(labels)))
              for ids, labels in coded]  # fmt: skip
    return torch.tensor([ids for ids, _ in padded]), torch.tensor([labels for _, labels in padded])


def train_base(config: BaseConfig, folder: Path, say: Callable[[str], None], device: str = "cpu") -> dict[str, Any]:
    """Train the decoder on fresh graphs and save it with its tokenizer in `folder`; returns what was done."""
    tokenizer, model = make_tokenizer(config.layout), make_model(config).to(device)
    optim = OptimConfig(steps=config.steps, learning_rate=config.learning_rate, schedule="cosine",
                        warmup_steps=min(50, config.steps // 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng, began, losses = random.Random(f"base/{config.seed}"), time.monotonic(), list[float]()
    for step in range(config.steps):
        ids, labels = collate([example(config, rng) for _ in range(config.batch)], tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        ids, labels = ids.to(device), labels.to(device)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten())
        whole = cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        optimizer.zero_grad()
        (loss + config.prompt_weight * whole).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            say(f"base: step {step + 1}/{config.steps}, loss {sum(losses[-50:]) / len(losses[-50:]):.3f}, "
                f"{time.monotonic() - began:.0f} s")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return {"config": asdict(config), "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": time.monotonic() - began, "loss": losses}
