"""A tokenizer and a model so small that tests make them on the spot, without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CORPUS = (
    "Question: 3 + 8\nAnswer: 11\n\n",
    "Hint: the answer is 12.\n",
    "A correct solution: 7 + 1 = 8, 8 + 9 = 17. The answer is 17.\n",
    "the quick brown fox jumps over the lazy dog",
)


def tiny_tokenizer(*, chat: bool = True, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer (any text goes in and comes out): pad, bos, and <|im_end|> as end of text.

    chat: with a ChatML template that knows `enable_thinking`. bos: plain text begins with <s>, as with Llama's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(vocab_size: int = 320, *, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 LlamaForCausalLM: 2 layers, width 32, the same for a seed. The global RNG is left alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).to(torch.float32).eval()


def save_tiny(folder: str | Path, **overrides: Any) -> Path:
    """A model folder with both, as `from_pretrained` reads it."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer), **overrides).save_pretrained(folder)
    return folder
