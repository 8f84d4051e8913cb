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


@pytest.mark.parametrize("what", [lambda x: 2 * x, lambda x: x.mul_(2), lambda x: x.clone()],
                         ids=["doubled", "in place", "copied"])
def test_a_model_that_does_something_between_its_layers(what: Callable[[Tensor], Tensor], steps: list[int]) -> None:
    model = made()
    between(model, what)
    torch.testing.assert_close(decoded(Backbone(model), READ).double(), reference(model, READ), **CLOSE)
    assert not steps


@pytest.mark.parametrize("what", [lambda x: 2 * x, lambda x: x.mul_(2)], ids=["doubled", "in place"])
def test_a_model_that_begins_to_do_something_between_its_layers_is_refused(what: Callable[[Tensor], Tensor],
                                                                           steps: list[int]) -> None:
    model = made()
    backbone = Backbone(model)
    decoded(backbone, READ)
    assert steps
    between(model, what)
    with pytest.raises(RuntimeError, match=r"between its layers|single memory location"):
        decoded(backbone, READ)


def test_a_layer_with_angles_of_its_own(steps: list[int]) -> None:
    model = made()
    last = model.model.layers[2]

    class Turning(type(last)):  # type: ignore[misc]
        def __call__(self, hidden_states: Tensor, *given: Any, position_embeddings: Any, **named: Any) -> Any:
            cos, sin = position_embeddings
            return super().__call__(hidden_states, *given, position_embeddings=(cos, -sin), **named)

    last.__class__ = Turning
    torch.testing.assert_close(decoded(Backbone(model), READ).double(), reference(model, READ), **CLOSE)
    assert not steps


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_that_is_another_since(place: int) -> None:
    model = made()
    backbone = Backbone(model)
    decoded(backbone, READ)
    other = type(model.model.layers[place])(model.config, place).eval()
    other.load_state_dict(made(seed=5).model.layers[place].state_dict())
    model.model.layers[place] = other
    for _ in range(2):
        torch.testing.assert_close(decoded(backbone, READ).double(), reference(model, READ), **CLOSE)


def test_layers_that_are_left_out_are_missed() -> None:
    """No number comes of it that somebody could take for one."""
    model = made()
    backbone = Backbone(model)
    with backbone.decoding():
        cache = begun(backbone)
        model.config.num_hidden_layers = 2
        assert stepped(backbone, cache).isnan().all()
    torch.testing.assert_close(decoded(backbone, READ).double(), reference(model, READ), **CLOSE)


@pytest.mark.parametrize("everywhere", [False, True], ids=["a layer", "every module"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_whoever_looks_between_layers_sees_what_is_there(before: bool, everywhere: bool, steps: list[int]) -> None:
    model, seen = made(), list[Tensor]()
    backbone = Backbone(model)
    plain, place = decoded(backbone, READ), model.model.layers[1]
    count, modules = len(steps), torch.nn.modules.module

    def look(module: Any, given: Any, out: Any = None) -> None:
        if module is place and not (before and not given):
            seen.append(given[0] if before else out)

    if everywhere:
        hook = (modules.register_module_forward_pre_hook if before else modules.register_module_forward_hook)(look)
    else:
        hook = (place.register_forward_pre_hook if before else place.register_forward_hook)(look)
    with hook:
        assert decoded(backbone, READ).equal(plain)
    assert len(steps) == count and len(seen) == READ.shape[1] + 1 and not any(x.isnan().any() for x in seen)
    assert decoded(backbone, READ).equal(plain) and len(steps) == 2 * count


def test_one_decoding_inside_another() -> None:
    model = made()
    backbone, double = Backbone(model), reference(model, READ)
    with backbone.decoding():
        for _ in range(2):
            torch.testing.assert_close(decoded(backbone, READ).double(), double, **CLOSE)


def stepped(backbone: Backbone, cache: DecodeCache, **given: Any) -> Tensor:
    hidden = backbone.run(torch.tensor([5, 6, 7]), cache.positions(), cache, **given)
    cache.advance()
    return hidden


def begun(backbone: Backbone) -> DecodeCache:
    """Of one row for each prompt, two of whose tokens were read."""
    _, layers = backbone.prefill(PROMPTS)
    cache = DecodeCache(layers, torch.tensor([len(prompt) for prompt in PROMPTS]), torch.arange(len(PROMPTS)))
    stepped(backbone, cache)
    stepped(backbone, cache)
    return cache


@pytest.mark.parametrize("change", ["other weights", "the same elsewhere"])
def test_weights_that_stand_in_for_a_step(change: str, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = made(), list[Tensor]()
    backbone = Backbone(model)
    others = {name: 1.5 * parameter.detach() for name, parameter in model.named_parameters() if "layers.1.mlp" in name}
    for by_layers in (False, True):
        if by_layers:
            monkeypatch.setattr(turned._Chain, "_by_loops", lambda *_: None)
        with backbone.decoding():
            cache = begun(backbone)
            if change == "other weights":
                found += [stepped(backbone, cache, weights=others), stepped(backbone, cache)]
            else:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
                found += [stepped(backbone, cache), stepped(backbone, cache)]
    assert len(steps) == 4 and found[0].equal(found[2]) and found[1].equal(found[3])


def test_a_step_that_is_broken_off_while_it_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, found = Backbone(made()), list[Tensor]()
    for broken in (True, False):
        with backbone.decoding():
            cache = begun(backbone)
            while cache.written < loops.BLOCK:
                stepped(backbone, cache)
            if broken:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(layer.Stack, "__init__", interrupted)
                    stepped(backbone, cache)
            found += [stepped(backbone, cache), stepped(backbone, cache)]
    assert found[0].equal(found[2]) and found[1].equal(found[3])


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_one_cache_read_by_two_models_and_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model may make the cache move, and steps may be under another mode than the first was."""
    found = list[Tensor]()
    for by_layers in (False, True):
        if by_layers:
            monkeypatch.setattr(turned._Chain, "_by_loops", lambda *_: None)
        one, other = Backbone(made()), Backbone(made(seed=3))
        with one.decoding(), other.decoding(), torch.inference_mode():
            begun(other)
            cache = begun(one)
        with one.decoding(), other.decoding():
            while cache.written < loops.BLOCK:
                stepped(one, cache)
            with torch.inference_mode():
                found += [stepped(other, cache), stepped(one, cache)]
            found.append(stepped(one, cache))
    assert all(a.equal(b) for a, b in zip(found[:3], found[3:], strict=True))


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
            cache = begun(backbone)
            hidden, held, chain = stepped(backbone, cache), cache.held(), backbone._turned._chain
            assert held is not None and held is cache.held() and chain._stack is not None
            kept += [weakref.ref(x) for x in (hidden, chain._stack, *held[0][:4])]
            del cache, held, hidden
            if ended == "by a signal":
                chain.through(chain._layers[0], *given_to(chain))
                kept += [weakref.ref(x) for x in (chain._made, chain._passed)]
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not any(reference() is not None for reference in kept)


def given_to(chain: Any) -> tuple[Any, ...]:
    """What its first layer may be given, of what it attends to now."""
    cache, width = chain._of[0], chain._layers[0]._width
    rows = cache.row_group.shape[0]
    return torch.ones(1, rows, 32), (torch.ones(1, rows, width), torch.zeros(1, rows, width)), cache


def test_what_a_cache_held_goes_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, alive = Backbone(made()), list[int]()
    real = layer.Stack.__init__

    def counted(self: layer.Stack, *given: Any) -> None:
        alive.append(sum(reference() is not None for reference in before))
        real(self, *given)

    with backbone.decoding():
        cache, before = begun(backbone), list[Any]()
        while cache.written < loops.BLOCK - 1:
            stepped(backbone, cache)
        held = cache.held()
        assert held is not None
        before += [weakref.ref(x) for each in held.values() for x in (each.held_k, each.held_v)]
        del held
        monkeypatch.setattr(layer.Stack, "__init__", counted)
        stepped(backbone, cache)
        assert not alive
        stepped(backbone, cache)
    assert alive == [0]
