"""Decoder layers of a decoding step, against the model's own forward in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from selftaught.records import Sampling
from selftaught.rollout import cache
from selftaught.rollout.cache import DecodeCache
from selftaught.score import Backbone, turned
from selftaught.score.turned import _Layer
from selftaught.tensors import FEW, _has_onednn, scripted
from test_rollout import HEAD, PROMPTS, engine, requests, tokens

TURNED = ("llama", "smollm", "qwen2", "qwen3")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
pytestmark = pytest.mark.skipif(not _has_onednn(), reason="a processor without oneDNN's products keeps its own layers")


def turned_layers(backbone: Backbone) -> int:
    """How many layers of the model are turned while it decodes."""
    with backbone.decoding():
        return sum(isinstance(getattr(vars(module).get("forward"), "__self__", None), _Layer)
                   for module in backbone.model.modules())


def decoded(backbone: Backbone, read: Tensor) -> Tensor:
    """Hidden states after each of the read tokens (B, steps), row i of prompt i // 2: (steps, B, H)."""
    with backbone.decoding():
        _, layers = backbone.prefill(PROMPTS)
        group = torch.arange(len(PROMPTS)).repeat_interleave(2)
        cache = DecodeCache(layers, torch.tensor([len(prompt) for prompt in PROMPTS]), group)
        hidden = []
        for token_B in read.t():
            hidden.append(backbone.run(token_B, cache.positions(), cache))
            cache.advance()
    return torch.stack(hidden)


def reference(model: Any, read: Tensor) -> Tensor:
    double = copy.deepcopy(model).double()
    rows = [torch.tensor([[*PROMPTS[i // 2], *row]]) for i, row in enumerate(read.tolist())]
    with torch.no_grad():
        return torch.stack([double.model(input_ids=row, use_cache=False).last_hidden_state[0, -read.shape[1] :]
                            for row in rows], dim=1)


@pytest.mark.parametrize("function", [turned._norm, turned._rotated, turned._product, turned._sum, turned._gated_sum,
                                      cache._attend], ids=lambda f: f.__name__)
def test_what_a_decoding_step_repeats_is_known_to_torchs_compiler(function: Any) -> None:
    assert isinstance(scripted(function), torch.jit.ScriptFunction)


def test_layers_of_the_known_shape_are_turned_while_decoding_and_no_others() -> None:
    for name, make in (families.SUPPORTED | families.UNSUPPORTED).items():
        backbone = Backbone(make())
        assert turned_layers(backbone) == (2 if name in TURNED else 0)
        assert not any("forward" in vars(module) for module in backbone.model.modules())


@pytest.mark.parametrize("family", TURNED)
def test_decoded_hidden_states_are_those_of_the_model_in_float64(family: str) -> None:
    model = families.SUPPORTED[family]()
    read = torch.randint(families.VOCABULARY, (2 * len(PROMPTS), 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decoded(Backbone(model), read).double(), reference(model, read), **CLOSE)


def test_adapted_projections_are_run_by_their_own_forward() -> None:
    peft = pytest.importorskip("peft")
    model = families.qwen3()
    made = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear", r=4), model)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    backbone = Backbone(model)
    assert turned_layers(backbone) == 2
    read = torch.tensor([[5, 6, 7]] * (2 * len(PROMPTS)))
    hidden = decoded(backbone, read)
    torch.testing.assert_close(hidden.double(), reference(model, read), **CLOSE)
    assert (hidden - decoded(Backbone(families.qwen3()), read)).abs().max() > 0.01


def test_a_layer_that_only_looks_like_a_known_one_keeps_its_forward() -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Doubled(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
            return hidden_states + 2 * (super().forward(hidden_states, *rest, **named) - hidden_states)

    model = families.llama()
    model.model.layers[1].__class__ = Doubled
    backbone = Backbone(model)
    assert turned_layers(backbone) == 1  # each is looked at by itself
    read = torch.tensor([[5, 6, 7]] * (2 * len(PROMPTS)))
    torch.testing.assert_close(decoded(backbone, read).double(), reference(model, read), **CLOSE)


def test_other_activations_and_biases_are_as_in_the_model() -> None:
    model = families.llama(hidden_act="gelu", mlp_bias=True, attention_bias=True)
    backbone = Backbone(model)
    assert turned_layers(backbone) == 2
    read = torch.tensor([[5, 6, 7]] * (2 * len(PROMPTS)))
    torch.testing.assert_close(decoded(backbone, read).double(), reference(model, read), **CLOSE)


def test_more_rows_than_are_turned_draw_the_same_tokens() -> None:
    model, sampling, count = families.smollm(), Sampling(max_completion_length=10), FEW // len(PROMPTS) + 2
    many, few = (engine(model, max_rows=rows) for rows in (256, count))
    assert len(HEAD) < FEW < len(PROMPTS) * count
    assert tokens(many.sample(requests(), count, sampling)) == tokens(few.sample(requests(), count, sampling))
