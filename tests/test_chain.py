"""All layers of a decoding step in one call: when that is done, when not, and that it changes no bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from selftaught.kernels import layer, loops
from selftaught.records import Rollout, Sampling
from selftaught.rollout import TransformersEngine
from selftaught.rollout.cache import DecodeCache
from selftaught.score import Backbone, turned
from selftaught.tensors import _has_onednn
from test_rollout import PROMPTS, TOKENIZER, requests
from test_turned import decoded, reference

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
READ = torch.randint(families.VOCABULARY, (2 * len(PROMPTS), 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.skipif(not (_has_onednn() and loops.usable(torch.ones(1))),
                                reason="a processor without oneDNN's products, or no compiler")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were written before each step that was one call."""
    seen, step = list[int](), layer.Stack.step

    def counted(self: layer.Stack, x_HB: Tensor, cos_BD: Tensor, sin_BD: Tensor, written: int) -> Tensor:
        seen.append(written)
        return step(self, x_HB, cos_BD, sin_BD, written)

    monkeypatch.setattr(layer.Stack, "step", counted)
    return seen


def made(family: str = "llama", **more: Any) -> Any:
    """With heads of whole vectors, which the loops attend with."""
    model: Any = families.SUPPORTED[family](head_dim=16, num_hidden_layers=3, **more)
    return model


def sampled(model: Any, stop: tuple[int, ...] = (), length: int = 70) -> list[Rollout]:
    """Over more tokens than there is room for at first, and than at second."""
    engine = TransformersEngine(Backbone(model), TOKENIZER, stop)
    return engine.sample(requests(), 4, Sampling(max_completion_length=length))


@pytest.mark.parametrize("stop", [(), tuple(range(0, 40))], ids=["all to the end", "rows leave"])
@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3"])
def test_no_bit_depends_on_it(family: str, stop: tuple[int, ...], steps: list[int],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family)
    one = sampled(model, stop)
    longest = max(len(rollout.token_ids) for rollout in one)
    assert steps == list(range(longest - 1)) and longest > 2
    assert (len({len(rollout.token_ids) for rollout in one}) > 1) == bool(stop)
    monkeypatch.setattr(turned._Chain, "_by_loops", lambda *_: None)
    each = sampled(model, stop)
    assert len(steps) == longest - 1
    assert [(r.token_ids, r.logp_sampler) for r in one] == [(r.token_ids, r.logp_sampler) for r in each]


@pytest.mark.parametrize("window", [1, 6, 40])
def test_a_window_in_some_layers(window: int, steps: list[int]) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = made("qwen3", sliding_window=window, use_sliding_window=True, layer_types=kinds)
    read = READ.repeat(1, 5)
    torch.testing.assert_close(decoded(Backbone(model), read).double(), reference(model, read), **CLOSE)
    assert len(steps) == read.shape[1]


def test_heads_of_no_whole_vectors_are_decoded_layer_by_layer(steps: list[int]) -> None:
    model = families.llama(head_dim=8)
    torch.testing.assert_close(decoded(Backbone(model), READ).double(), reference(model, READ), **CLOSE)
    assert not steps


def between(model: Any, what: Callable[[Tensor], Tensor]) -> None:
    """Let the backbone do something with the output of its second layer, where no module shows it."""
    rest = model.model.layers[2]

    class Doing(type(rest)):  # type: ignore[misc]
        def __call__(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
            return super().__call__(what(hidden_states), *given, **named)

    rest.__class__ = Doing


@pytest.mark.parametrize("what", [lambda x: 2 * x, lambda x: x.clone()], ids=["doubled", "copied"])
def test_a_model_that_does_something_between_its_layers(what: Callable[[Tensor], Tensor], steps: list[int]) -> None:
    model = made()
    between(model, what)
    torch.testing.assert_close(decoded(Backbone(model), READ).double(), reference(model, READ), **CLOSE)
    assert not steps


def test_a_model_that_begins_to_do_something_between_its_layers_is_refused(steps: list[int]) -> None:
    model = made()
    backbone = Backbone(model)
    decoded(backbone, READ)
    assert steps
    between(model, lambda x: 2 * x)
    with pytest.raises(RuntimeError, match="does something between its layers where it did nothing before"):
        decoded(backbone, READ)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_whoever_looks_between_layers_sees_what_is_there(kind: str, steps: list[int]) -> None:
    model, seen = made(), list[Tensor]()
    backbone = Backbone(model)
    plain = decoded(backbone, READ)
    count = len(steps)
    place = model.model.layers[1] if kind == "register_forward_hook" else model.model.layers[2]
    getattr(place, kind)(lambda module, *given: seen.append(given[-1] if torch.is_tensor(given[-1]) else given[0][0]))
    assert decoded(backbone, READ).equal(plain)
    assert len(steps) == count and len({x.sum().item() for x in seen[1:]}) == READ.shape[1]


@pytest.mark.parametrize("patched", [0, 1, 2])
def test_a_layer_that_is_patched_later_is_called(patched: int, steps: list[int]) -> None:
    """The two others are still one call where they follow one another."""
    model = made()
    backbone = Backbone(model)
    decoded(backbone, READ)
    count = len(steps)
    model.model.layers[patched].forward = lambda hidden_states, **named: 3 * hidden_states
    torch.testing.assert_close(decoded(backbone, READ).double(), reference(model, READ), **CLOSE)
    assert len(steps) == count * (1 if patched == 1 else 2)


def test_new_weights_count_from_the_next_decoding_on() -> None:
    model = made()
    backbone = Backbone(model)
    first = decoded(backbone, READ)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[1].mlp.up_proj.weight * 2)
    found = decoded(backbone, READ)
    torch.testing.assert_close(found.double(), reference(model, READ), **CLOSE)
    assert not torch.allclose(found, first, atol=0.01)


@pytest.mark.parametrize("ended", ["well", "by a signal"])
def test_nothing_outlives_the_decoding(ended: str) -> None:
    backbone, kept = Backbone(made()), list[Any]()
    try:
        with backbone.decoding():
            _, layers = backbone.prefill(PROMPTS)
            cache = DecodeCache(layers, torch.tensor([len(p) for p in PROMPTS]), torch.arange(len(PROMPTS)))
            for _ in range(3):
                hidden = backbone.run(torch.tensor([5, 6, 7]), cache.positions(), cache)
                cache.advance()
            held = cache.held()
            assert held is not None and held is cache.held()
            kept += [weakref.ref(x) for x in (hidden, *held[0][:4])]
            del layers, cache, held, hidden
            if ended == "by a signal":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not any(reference() is not None for reference in kept)


def test_a_step_of_the_same_cache_by_another_model() -> None:
    """What a stack holds belongs to one model: a second one has its own."""
    models = [made(), made(seed=3)]
    backbones = [Backbone(model) for model in models]
    for _ in range(2):
        for backbone, model in zip(backbones, models, strict=True):
            torch.testing.assert_close(decoded(backbone, READ).double(), reference(model, READ), **CLOSE)
