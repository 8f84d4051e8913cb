"""Low-rank adapters (LoRA, arXiv:2106.09685): W x becomes W x + (alpha / rank) B A x; A and B alone are trained.

peft puts them into a model in place, so that the model stays of its own class, its backbone and its head where they
were. A is random and B zero at first: the adapted model is then its base, bit for bit. Both are float32.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selftaught.errors import UserError, nearest

ALL = "all-linear"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SAVED = "base_model.model."  # before every name in an adapter's file: where peft's own wrapper keeps the model


def base_of(folder: Path) -> str | None:
    """The base model that an adapter's folder names; None: it is no adapter's folder, but perhaps a whole model's.

    Raises UserError where it is an adapter of another kind, or is not whole.
    """
    path = folder / CONFIG
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if whole or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"model: {path} cannot be read ({error}); save the adapter again") from error
    if not base or kind != "LORA":
        why = "that names no base model" if not base else f"of the kind {kind}, not LORA"
        raise UserError(f"model: {folder} holds an adapter {why}; merge the adapter into its base model and save that")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"model: {folder} has an {CONFIG}, but no {WEIGHTS}; save the adapter again, as safetensors")
    return str(base)


def require_peft(what: str) -> None:
    """Raises UserError where peft is not installed; `what` asked for it."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} needs the package peft, which is missing; install the extra: "
                        "pip install 'selftaught[lora]'")


def targets(model: Any, wanted: str | Sequence[str]) -> list[str]:
    """The modules that adapters go to: every linear layer but the head, or those whose names end with one of `wanted`.

    Experts whose weights are one tensor are no linear layers, and stay as they are. A model on the meta device will do.
    Raises UserError for a name that no linear layer has, and for the vocabulary head: hidden states meet it chunk by
    chunk, outside the model, where no adapter is.
    """
    from transformers.pytorch_utils import Conv1D

    outer = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    inner = [name for name, module in linear.items() if id(module) not in outer]
    if not inner:
        raise UserError(f"optim.lora: {type(model).__name__} has no linear layer for an adapter; leave optim.lora out")
    if wanted == ALL:
        return inner
    chosen: dict[str, None] = {}
    for end in [wanted] if isinstance(wanted, str) else wanted:
        if any(_ends(name, end) for name, module in model.named_modules() if id(module) in outer):
            raise UserError(f"optim.lora.target_modules: {end!r} is the vocabulary head or its embedding, which takes "
                            f"no adapter here; leave it out, or write {ALL}: every linear layer but the head")
        found = [name for name in inner if _ends(name, end)]
        if not found:
            known = {name.rpartition(".")[2] for name in inner}
            raise UserError(f"optim.lora.target_modules: {type(model).__name__} has no linear layer {end!r}; "
                            f"{nearest(end, known)}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def adapter_size(model: Any, rank: int, wanted: str | Sequence[str]) -> int:
    """How many numbers an adapter of that rank trains: rank (inputs + outputs) of each layer that it goes to."""
    modules = dict(model.named_modules())
    return sum(rank * sum(modules[name].weight.shape) for name in targets(model, wanted))


def add_adapter(model: Any, rank: int, alpha: float, wanted: str | Sequence[str], seed: int) -> None:
    """Put a new adapter into `model`, its A drawn by `seed`; from then on nothing else of the model is trainable."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets(model, wanted), task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(config, model)


def adapter(model: Any) -> dict[str, Tensor]:
    """The adapter's parameters by the names that peft saves them under; {} where the model has none."""
    if not hasattr(model, "peft_config"):
        return {}
    return {_SAVED + name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_" in name}


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write what `PeftModel.from_pretrained` loads: the adapter's tensors, and its settings with its base's name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    save_file({name: p.detach().contiguous() for name, p in adapter(model).items()}, folder / WEIGHTS,
              metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path) -> None:
    """Put the adapter in `folder` into its base `model`. Raises UserError where the two do not fit."""
    from peft import LoraConfig

    _inject(LoraConfig.from_pretrained(str(folder)), model)
    _fill(adapter(model), load_file(folder / WEIGHTS), folder)


def _fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor], folder: Path) -> None:
    other = sorted(own.keys() ^ given.keys()) or [name for name in own if own[name].shape != given[name].shape]
    if other:
        raise UserError(f"model: the adapter in {folder} does not fit its base model: {other[0]!r} differs, with "
                        f"{len(other)} in all; merge it into the model that it was trained on, and save that")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def _inject(config: Any, model: Any) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # it finds out by itself which way a layer's weights lie
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft makes them as narrow as the layer: updates would be lost
    model.eval()  # new modules begin in training mode


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
