"""The weights of a model as other engines load them: by the names of its checkpoint, whole, adapters merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selftaught.errors import UserError

_INNER = ".base_layer."  # in the names of what peft has put an adapter around


def exported(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` of the whole model would write, without a copy where none is needed.

    A layer with an adapter gives W + (alpha / rank) B A, in W's precision, made when it is asked for. Tensors may be
    the model's own: they are read before the next update. Raises UserError where an adapter cannot be merged so.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {name.replace(_INNER, "."): value.detach() for name, value in _tensors(model) if ".lora_" not in name}
    adapted = {id(state[f"{name}.weight"]): module for name, module in model.named_modules()
               if hasattr(module, "get_delta_weight")}
    for name, value in revert_weight_conversion(model, state).items():
        module = adapted.pop(id(value), None)
        yield name, value if module is None else _merged(module)
    if adapted:
        raise UserError(f"optim.lora: {len(adapted)} adapted layers of {type(model).__name__} are other tensors in its "
                        "checkpoint, so they cannot be merged for vLLM; set rollout.engine=transformers")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that a checkpoint holds."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


@torch.no_grad()
def _merged(module: Any) -> Tensor:
    weight = module.get_base_layer().weight
    return (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)
