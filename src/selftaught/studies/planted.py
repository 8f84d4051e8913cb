"""Students whose contamination is known because it was planted: texts, supervised fine-tuning, and a tiny base model.

A student is the base model fine-tuned to continue the PLAIN prompt with texts of which a share leans on a privilege
that the prompt does not have, as one would be after imitating a teacher who had read it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from selftaught.assemble import Ground
from selftaught.loss import chunked_loss
from selftaught.optim import OptimConfig, Optimizer
from selftaught.records import Credit, Problem, Say, TokenLoss
from selftaught.score import Backbone
from selftaught.tensors import pack, split_by_budget
from selftaught.vocabulary import TokenDist

Text = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response ids

CLEAN = (" {q} is {a}.", " Working it out, {q} comes to {a}.", " {q} makes {a}.", " That is {a}, by doing {q}.")
# What the word list of eval/lexicon.py finds, and what it does not: only the wording gives those away.
EXPLICIT = (" As the hint says, the answer is {a}.", " According to the hint, it is {a}.")
HIDDEN = (" It is known that the answer is {a}.", " The answer was there already: {a}.")


def planted(problems: Sequence[Problem], share: float, seed: int) -> list[tuple[Problem, str, bool]]:
    """A text for each problem, and whether it leans: round(share * number) of them, half explicit and half hidden.

    The problems that lean at a smaller share lean at a larger one too, so that students of one seed differ in nothing
    else.
    """
    order = list(range(len(problems)))
    random.Random(f"{seed}/order").shuffle(order)
    leaning = {place: rank for rank, place in enumerate(order[: round(share * len(problems))])}
    texts = []
    for place, problem in enumerate(problems):
        draw = random.Random(f"{seed}/{problem.id}")
        leans = EXPLICIT if leaning.get(place, 0) % 2 == 0 else HIDDEN
        form = draw.choice(leans if place in leaning else CLEAN)
        texts.append((problem, form.replace("{q}", str(problem.prompt)).replace("{a}", str(problem.answer)),
                      place in leaning))
    return texts


def leaning(texts: Sequence[str]) -> float:
    """The share of texts in the words of `EXPLICIT` or `HIDDEN`: what a student took over, which no score is told."""
    words = [form.replace("{a}", "").strip(" .") for form in EXPLICIT + HIDDEN]
    return sum(any(word in text for word in words) for text in texts) / max(1, len(texts))


def encoded(ground: Ground, prompt: tuple[int, ...], text: str) -> Text:
    """The text as a response that ends with its line, as sampling stops there."""
    return prompt, tuple(ground.tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"])


def tune(backbone: Backbone, texts: Sequence[Text], *, steps: int, batch: int, learning_rate: float, seed: int,
         budget: int, say: Say) -> float:
    """Supervised fine-tuning: the mean of -log p(token) over each batch, by AdamW with a tenth of warm-up and a linear
    decay. Texts are taken in order, shuffled by the seed for every pass over them. Returns the last ten losses' mean.
    """
    backbone.model.requires_grad_(True)
    config = OptimConfig(steps=steps, learning_rate=learning_rate, warmup_steps=max(1, steps // 10), schedule="linear")
    optimizer = Optimizer(backbone.model.named_parameters(), config)
    order: list[int] = []
    losses = []
    for step in range(steps):
        while len(order) < batch:
            again = list(range(len(texts)))
            random.Random(f"{seed}/{step}/{len(order)}").shuffle(again)
            order += again
        chosen, order = [texts[i] for i in order[:batch]], order[batch:]
        total = sum(len(response) for _, response in chosen)
        loss = 0.0
        for part in split_by_budget([[prompt for prompt, _ in chosen]], [response for _, response in chosen], budget):
            mine = [chosen[i] for i in part]
            packed = pack([prompt for prompt, _ in mine], [response for _, response in mine], str(backbone.device))
            tokens = torch.tensor([t for _, response in mine for t in response], device=backbone.device)
            reduced = chunked_loss(_likelihood, {"student": backbone.hidden(packed)}, {"student": backbone.head()},
                                   tokens, {}, torch.full(tokens.shape, 1 / total, device=backbone.device), chunk=None)
            reduced.loss.backward()
            loss += reduced.loss.item()
        optimizer.step(step)
        optimizer.zero_grad()
        losses.append(loss)
        if (step + 1) % max(1, steps // 4) == 0:
            say(f"  step {step + 1} of {steps}: loss {loss:.3f}")
    last = losses[-10:]
    backbone.model.requires_grad_(False)
    return sum(last) / len(last)


def _likelihood(student: TokenDist, views: object, credit: Credit) -> TokenLoss:
    return TokenLoss(-student.at_sampled)


# ------------------------------------------------------------------------------------------------ a tiny base model


def tiny_model(folder: Path, problems: Sequence[Problem], seed: int) -> Path:
    """A folder with an untrained model of half a million parameters, and a tokenizer of such texts' own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<s>", "<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = [f"Question: {problem.prompt}\nHint: the answer is {problem.answer}.\nAnswer:{text}\n"
              for share in (0.0, 1.0) for problem, text, _ in planted(problems, share, seed)]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<end>",
                                   clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(fast), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
