"""Whole decoder layers of a packed pass: their numbers and gradients beside the model's own in float64, and when they
step back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from selftaught.heap import in_a_row, keeping, together
from selftaught.kernels import loops, passes
from selftaught.optim import Teachers
from selftaught.records import View
from selftaught.score import Backbone, layers
from selftaught.tensors import Packed, pack

pytestmark = pytest.mark.skipif(not loops.usable(torch.ones(1)), reason="no compiler")
WHOLE = {"llama", "smollm"}  # without biases, norms of heads and norms of another form
IDS = torch.randint(4, 300, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
PROBED = 7  # tokens of a probe
NAMES = "q_proj", "k_proj", "v_proj"


def made(family: str = "llama", **more: Any) -> Any:
    """With heads of whole vectors, which the loops attend with."""
    return families.SUPPORTED[family](**{"head_dim": 16, **more})


def ragged() -> Packed:
    """Two prompts that begin alike, responses of three lengths, one of them of a single token."""
    long, short = tuple(IDS[0][:23]), (*IDS[0][:18], *IDS[1][:3])
    return pack([long, long, short, long], [tuple(IDS[2][:9]), tuple(IDS[3][:4]), tuple(IDS[2][5:12]), (7,)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each whole layer that was computed, probes aside."""
    seen, forward = list[int](), layers._Whole.forward

    def counted(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        seen.extend([x.shape[0]] if x.shape[0] > PROBED else [])
        return forward(ctx, x, *rest)

    monkeypatch.setattr(layers._Whole, "forward", staticmethod(counted))
    return seen


@pytest.fixture(params=["in one call", "part by part"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int] | None]:
    """How often a layer was computed in one call, wherever this is and however few its tokens; None: in parts."""
    in_one_call = request.param == "in one call"
    if in_one_call and passes.sgemm_address() is None:
        pytest.skip("torch multiplies by another library")
    monkeypatch.setattr(passes, "is_intel", lambda: in_one_call)
    monkeypatch.setattr(layers, "FEW", 0)
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        right = getattr(passes, name)

        def counted(*given: Any, name: str = name, right: Any = right) -> Any:
            counts[name] += given[1 if name == "backward" else 0].shape[0] > PROBED
            return right(*given)

        monkeypatch.setattr(passes, name, counted)
    yield counts if in_one_call else None
    assert in_one_call or counts == {"forward": 0, "backward": 0}


def exact(model: Any, packed: Packed, weight_NH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states (N, H) by the model's own forward in float64, row by row, and gradients of their weighted sum."""
    double = copy.deepcopy(model).double()
    double.zero_grad()
    hidden = torch.cat([
        double.model(input_ids=torch.tensor([prompt + response[:-1]]), use_cache=False)
        .last_hidden_state[0, len(prompt) - 1 :] for prompt, response in packed.rows])
    if not any(p.requires_grad for p in double.parameters()):
        return hidden.detach(), {}
    (hidden * weight_NH.double()).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in double.named_parameters() if p.grad is not None}


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], times: float = 1.0) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        gap = (found[name].double() - times * gradient).norm() / (times * gradient).norm()
        assert gap < 2e-5, (name, float(gap))


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_rows(backbone: Backbone) -> bool:
    """Do the weights of one input lie in a row, in every layer?"""
    return all(together(*(layer.self_attn.get_submodule(name).weight for name in NAMES)) is not None
               and together(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight) is not None
               for layer in backbone.model.model.layers)


def test_which_layers_are_replaced_and_that_nothing_stays_behind() -> None:
    for name, make in (families.SUPPORTED | families.UNSUPPORTED).items():
        backbone = Backbone(make() if name in families.UNSUPPORTED else make(head_dim=16))
        with backbone._fused.installed():
            forms = [m for m in backbone.model.modules() if isinstance(getattr(vars(m).get("forward"), "func", None),
                                                                       layers._Form)]
        assert len(forms) == (2 if name in WHOLE else 0), name
        assert not any("forward" in vars(module) for module in backbone.model.modules())


@pytest.mark.parametrize("rowed", [True, False], ids=["in a row", "apart"])
@pytest.mark.parametrize("mode", ["returned", "added", "recomputed"])
@pytest.mark.parametrize("family", sorted(WHOLE))
def test_numbers_and_gradients_are_the_models_own(family: str, mode: str, rowed: bool, calls: list[int],
                                                  whole: dict[str, int] | None) -> None:
    """Of two passes, the second of which adds to what is there."""
    model, packed = made(family), ragged()
    weight = torch.randn(len(packed.predict), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden, wanted = exact(model, packed, weight)
    backbone = Backbone(model)
    if not rowed:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert in_rows(backbone) is rowed
    if mode == "recomputed":
        backbone.checkpoint_activations()
    with nullcontext() if mode == "returned" else backbone.accumulating():
        for _ in range(2):
            found = backbone.hidden(packed)
            (found * weight).sum().backward()
    assert len(calls) == (0 if mode == "recomputed" else 4)
    if whole is not None:
        expected = len(calls) if rowed else 0
        assert whole == {"forward": expected, "backward": expected if mode == "added" else 0}
    torch.testing.assert_close(found.double(), hidden, atol=2e-5, rtol=2e-5)
    head = {} if mode == "returned" else {"lm_head.weight"} & wanted.keys()
    agree({name: g for name, g in gradients(model).items() if name in wanted or name in head}, wanted, times=2)


@pytest.mark.parametrize("frozen", ["q_proj", "input_layernorm", "post_attention_layernorm", "up_proj", "o_proj", "",
                                    "embed"])
def test_what_is_frozen_has_no_gradient_and_changes_no_other(frozen: str, calls: list[int],
                                                             whole: dict[str, int] | None) -> None:
    model, packed = made(), ragged()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    weight = torch.randn(len(packed.predict), 32, generator=torch.Generator().manual_seed(1))
    hidden, wanted = exact(model, packed, weight)
    backbone = Backbone(model)
    with backbone.accumulating():
        found = backbone.hidden(packed)
        if frozen:
            (found * weight).sum().backward()
    torch.testing.assert_close(found.detach().double(), hidden, atol=2e-5, rtol=2e-5)
    agree(gradients(model), wanted)
    assert len(calls) == 2
    if whole is not None:
        assert whole == {"forward": 2, "backward": 2 if "norm" in frozen else 0}  # "embed": nothing is added


def test_hooks_of_a_parameter_are_called_with_its_gradient(whole: dict[str, int] | None) -> None:
    """One of them changes it."""
    model, packed, told = made(), ragged(), list[str]()
    doubled = "model.layers.1.self_attn.k_proj.weight"
    model.get_parameter(doubled).register_hook(lambda grad: 2 * grad)
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: told.append(name))
    backbone = Backbone(model)
    weight = torch.randn(len(packed.predict), 32, generator=torch.Generator().manual_seed(1))
    wanted = exact(copy.deepcopy(model), packed, weight)[1]
    wanted[doubled] = 2 * exact(made(), packed, weight)[1][doubled]
    told.clear()
    with backbone.accumulating():
        (backbone.hidden(packed) * weight).sum().backward()
    assert sorted(told) == sorted(name for name, _ in model.named_parameters() if "layers.0" in name)
    agree(gradients(model), wanted)


def test_other_weights_are_used_where_they_stand_in(calls: list[int], whole: dict[str, int] | None) -> None:
    model, packed = made(), ragged()
    backbone, other = Backbone(model), made(seed=3)
    teachers = Teachers({"teacher": View("initial")}, other)
    weights = teachers.weights("teacher")
    assert weights is not None
    assert together(*(weights[f"model.layers.1.self_attn.{name}.weight"] for name in NAMES)) is not None
    hidden, _ = exact(other.requires_grad_(False), packed, torch.zeros(1))
    torch.testing.assert_close(backbone.hidden(packed, weights).double(), hidden, atol=2e-5, rtol=2e-5)
    assert len(calls) == 2 and whole in (None, {"forward": 2, "backward": 0})


def test_a_pass_that_keeps_what_its_attention_is_shown_is_shown_it(whole: dict[str, int] | None) -> None:
    """As that of the prompts, from which decoding goes on."""
    model, prompts = made(), [tuple(IDS[0]), tuple(IDS[1][:9])]
    backbone = Backbone(model)
    with backbone.frozen():
        _, layers_of = backbone.prefill(prompts)
    double = copy.deepcopy(model).double()
    for row, prompt in enumerate(prompts):
        cache = double.model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        for layer, (keys, values) in layers_of.items():
            for found, own in ((keys, cache.layers[layer].keys), (values, cache.layers[layer].values)):
                torch.testing.assert_close(found[:, row, : len(prompt)].double(), own[0], atol=2e-5, rtol=2e-5)
    assert len(layers_of) == 2


@pytest.mark.skipif(not passes.take_layers(), reason="torch multiplies by another library")
@pytest.mark.parametrize(("inner", "threads"), [(48, 1), (49, 3), (200, 2)], ids=str)
def test_a_layer_in_one_call_has_the_bits_of_its_parts(monkeypatch: pytest.MonkeyPatch, inner: int, threads: int
                                                       ) -> None:
    """Of three groups, whose gradients are added; and without gradient, in memory that is taken again."""
    packed = pack([tuple(IDS[0]), tuple(IDS[1])] * 2, [tuple(IDS[2]), tuple(IDS[3][:9]), tuple(IDS[3]), (5, 6)])
    weight = torch.randn(len(packed.predict), 32, generator=torch.Generator().manual_seed(1))
    found, before = [], torch.get_num_threads()
    for whole_layer in (True, False):
        monkeypatch.setattr(layers._Form, "in_one_call", layers._Form.in_one_call if whole_layer else lambda *_: None)
        model = made(intermediate_size=inner)
        backbone = Backbone(model)
        torch.set_num_threads(threads)
        try:
            with backbone.accumulating():
                for _ in range(3):
                    (backbone.hidden(packed) * weight).sum().backward()
            with backbone.frozen(), keeping():
                found.append({"frozen": backbone.hidden(packed), **gradients(model)})
        finally:
            torch.set_num_threads(before)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name


def hooked(model: Any) -> Iterator[list[str]]:
    seen = list[str]()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append("called"))
    yield seen
    handle.remove()
    yield seen


def test_a_layer_into_which_somebody_looks_runs_module_by_module(calls: list[int]) -> None:
    model, packed = made(), ragged()
    backbone = Backbone(model)
    looking = hooked(model)
    seen = next(looking)
    with_hook = backbone.hidden(packed)
    assert seen == ["called"] and len(calls) == 1
    next(looking)
    torch.testing.assert_close(backbone.hidden(packed), with_hook, atol=1e-5, rtol=1e-5)
    assert seen == ["called"] and len(calls) == 3


def test_what_a_layer_gives_out_may_be_changed_in_place(whole: dict[str, int] | None) -> None:
    """As by a hook that steers it."""
    model, packed = made(), ragged()
    weight = torch.randn(len(packed.predict), 32, generator=torch.Generator().manual_seed(1))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, output: output.mul_(2))
    hidden, wanted = exact(model, packed, weight)
    found = Backbone(model).hidden(packed)
    (found * weight).sum().backward()
    torch.testing.assert_close(found.detach().double(), hidden, atol=2e-5, rtol=2e-5)
    agree(gradients(model), wanted)
    assert whole in (None, {"forward": 2, "backward": 0})


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other_class(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = Doubled


def with_bias(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(64))


def patched(model: Any) -> None:
    layer = model.model.layers[0]
    layer.forward = lambda hidden_states, **named: 3 * hidden_states


def patched_inside(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: 2 * x


def replaced(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = copy.deepcopy(model.model.layers[1].mlp.up_proj)


def scaled(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


def trained(model: Any) -> None:
    model.model.layers[0].train()


@pytest.mark.parametrize("change", [other_class, with_bias, patched, patched_inside, replaced, scaled, trained],
                         ids=lambda f: f.__name__)
def test_a_layer_that_was_changed_later_is_computed_as_it_is(change: Callable[[Any], None], calls: list[int]) -> None:
    model, packed = made(), ragged()
    backbone = Backbone(model)
    change(model)
    if change is other_class:  # product by product the fused form is found once: another story
        backbone._fused._forwards = [(m, f) for m, f in backbone._fused._forwards if isinstance(f.func, layers._Form)]
    hidden, _ = exact(model.requires_grad_(False), packed, torch.zeros(1))
    torch.testing.assert_close(backbone.hidden(packed).double(), hidden, atol=2e-5, rtol=2e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("window", [5, 200])
def test_a_window_that_hides_something_is_left_to_the_model(window: int, calls: list[int]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model = families._made(MistralForCausalLM, MistralConfig(**families.COMMON, head_dim=16, sliding_window=window), 0)
    hidden, _ = exact(model.requires_grad_(False), ragged(), torch.zeros(1))
    torch.testing.assert_close(Backbone(model).hidden(ragged()).double(), hidden, atol=2e-5, rtol=2e-5)
    assert len(calls) == (2 if window == 200 else 0)


def test_a_layer_that_was_patched_before_is_left_as_it_is(calls: list[int]) -> None:
    model = made()
    patched_inside(model)
    hidden, _ = exact(model.requires_grad_(False), ragged(), torch.zeros(1))
    torch.testing.assert_close(Backbone(model).hidden(ragged()).double(), hidden, atol=2e-5, rtol=2e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("unshown", ["in training mode", "under autocast", "heads of no whole vectors"])
def test_a_layer_of_which_a_probe_shows_nothing_is_left_as_it_is(unshown: str, calls: list[int]) -> None:
    model = made(**({"head_dim": 8} if "heads" in unshown else {}))
    places = [p.data_ptr() for p in model.parameters()]
    model.train("training" in unshown)
    with torch.autocast("cpu", enabled="autocast" in unshown):
        backbone = Backbone(model)
    model.eval()
    hidden, _ = exact(model.requires_grad_(False), ragged(), torch.zeros(1))
    torch.testing.assert_close(backbone.hidden(ragged()).double(), hidden, atol=2e-5, rtol=2e-5)
    assert not calls and places == [p.data_ptr() for p in model.parameters()]


def test_under_autocast_a_layer_is_the_models_own(calls: list[int]) -> None:
    """Products are of 16 bits there, which the loops would read as 32."""
    packed = pack([tuple(IDS[0]), tuple(IDS[1])], [tuple(IDS[2]), tuple(IDS[3])])
    backbone = Backbone(made())
    wanted = backbone.hidden(packed).detach()
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = backbone.hidden(packed)
    assert not calls and float((found - wanted).norm() / wanted.norm()) < 0.1


def test_a_backbone_made_where_nothing_is_recorded_can_be_trained() -> None:
    model = made()
    with torch.inference_mode():
        backbone = Backbone(model)
    backbone.hidden(ragged()).square().sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.model.layers.parameters())


def test_weights_that_other_processes_see_stay_where_they_are() -> None:
    model = made().share_memory()
    backbone = Backbone(model)
    assert all(p.is_shared() for p in model.parameters()) and not in_rows(backbone)


def test_a_model_is_saved_and_read_as_ever(tmp_path: Any) -> None:
    """Weights in a row are tensors of their own to whoever writes them."""
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = Backbone(model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    backbone.save(tmp_path, "")
    again = type(model).from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert value.equal(before[name]), name
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 4 * sum(p.numel() for p in model.parameters()) + 20_000


def test_together_are_matrices_that_lie_behind_one_another_and_no_others() -> None:
    row = in_a_row({"a": torch.randn(3, 4), "b": torch.randn(2, 4), "c": torch.randn(2, 5), "bias": torch.randn(4),
                    "double": torch.randn(2, 2, dtype=torch.float64)})
    assert row.keys() == {"a", "b", "c"}
    a, b, c = row.values()
    whole = together(a, b)
    assert whole is not None and whole.equal(torch.cat([a, b]))
    whole.mul_(2)
    assert whole.equal(torch.cat([a, b]))
    for parts in ((b, a), (a, c), (a, b, c), (a, a), (a, b.clone()), (a[:2], b), (a.t(), b), (a, b.double())):
        assert together(*parts) is None
    assert together(a[:2], a[2:]) is not None
