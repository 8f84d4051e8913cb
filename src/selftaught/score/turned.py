"""Decoder layers for the few rows of a decoding step, on a CPU: the rows are the last axis from layer to layer.

With few rows W x^T is the fastest product (`tensors.fast_linear`), and gives its numbers turned, (M, rows). Here they
stay so: nothing is turned back between products, the gate, its product and both residual sums are done by the product
before them, and the angles of a step are turned once for all layers. A layer is replaced only if it gives the numbers
of its own forward on a probe, which also shows how it calls its attention.

Shapes: B rows, H hidden, D of one head, in the order of memory: x_HB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selftaught.kernels import layer as by_loops
from selftaught.kernels import loops
from selftaught.score.attention import Attends, Decodes
from selftaught.score.fused import Fused, close, is_silu
from selftaught.score.operations import fused
from selftaught.tensors import FEW, scripted, turns

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROBE_ROWS = 3


def _norm(x: Tensor, weight: Tensor, eps: Tensor, offset: float) -> Tensor:
    """x (w + offset) / sqrt(mean(x^2) + eps) over the axis before the last."""
    mean = torch.add(eps, torch.linalg.vecdot(x, x, dim=-2), alpha=1 / x.shape[-2])
    weight = weight + offset if offset != 0 else weight
    return (x * mean.rsqrt_().unsqueeze(-2)).mul_(weight[:, None])


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin of both, the halves of the middle axis turned against each other: (heads, B, D).

    Given are (heads, D, B), cos and sin as (2, D / 2, B), the sines of the first half negative.
    """
    both = torch.cat([query, key])
    halves = both.view(-1, cos.shape[0], cos.shape[1], cos.shape[2])
    turned = torch.addcmul(halves * cos, halves.flip(1), sin).view(both.shape).mT
    return turned[: query.shape[0]], turned[query.shape[0] :]


def _product(x_KB: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b, (M, B)."""
    out = torch.ops.mkldnn._linear_pointwise(weight, x_KB.t(), None, "none", [], "")
    return out if bias is None else out.add_(bias[:, None])


def _sum(x_KB: Tensor, residual_MB: Tensor, weight: Tensor) -> Tensor:
    """W x + the residual."""
    return torch.ops.mkldnn._linear_pointwise(weight, residual_MB, x_KB.t(), None, "add")


def _gated_sum(x_HB: Tensor, residual_HB: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """D (silu(G x) U x) + the residual."""
    active = torch.ops.mkldnn._linear_pointwise(gate, x_HB.t(), None, "swish", [], "")
    inner = torch.ops.mkldnn._linear_pointwise(up, active, x_HB.t(), None, "mul")
    return torch.ops.mkldnn._linear_pointwise(down, residual_HB, inner.t(), None, "add")


class _Norm:
    """An RMS norm's numbers."""

    def __init__(self, module: Any, eps: float, offset: float) -> None:
        self._module, self._eps, self._offset = module, eps, offset
        self._added = torch.tensor(eps)

    @property
    def numbers(self) -> by_loops.Norm:
        return by_loops.Norm(self._module.weight, self._eps, self._offset)

    def __call__(self, x: Tensor) -> Tensor:
        if loops.usable(x):
            return by_loops.norm_turned(x.contiguous(), self._module.weight, self._eps, self._offset)
        out: Tensor = scripted(_norm)(x, self._module.weight, self._added, self._offset)
        return out


class _Angles:
    """Cosines and sines of a step, given as (1, B, D): as `_rotated` takes them."""

    def __init__(self) -> None:
        self._given: Tensor | None = None

    def rotate(self, query: Tensor, key: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both (heads, D, B), turned against each other and back: (heads, B, D)."""
        if loops.usable(query, key, *tables):
            cos, sin = (table[0].contiguous() for table in tables)
            return by_loops.rotate_turned(query, cos, sin), by_loops.rotate_turned(key, cos, sin)
        found: tuple[Tensor, Tensor] = scripted(_rotated)(query, key, *self._turned(tables))
        return found

    def _turned(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self._given is not tables[0]:
            self._given = tables[0]  # kept, so that no other step's can be taken for it
            self._cos, sin = (table[0].t().contiguous().unflatten(0, (2, -1)) for table in tables)
            self._sin = torch.stack([-sin[0], sin[1]])
        return self._cos, self._sin


class _Layer:
    """Norm, attention, sum, norm, gated layer, sum."""

    def __init__(self, module: Any, norms: Fused, angles: _Angles, chain: _Chain) -> None:
        """Raises AttributeError, KeyError or TypeError where the module is no such layer."""
        self.module, self._angles, self._chain = module, angles, chain
        self._mlp, attention = module.mlp, module.self_attn
        self._width: int = attention.head_dim
        self._projections = attention.q_proj, attention.k_proj, attention.v_proj
        self._out = attention.o_proj
        self._before, self._between = (_Norm(part, **norms.known_norm(part))
                                       for part in (module.input_layernorm, module.post_attention_layernorm))
        self._of_heads = [_Norm(part, **norms.known_norm(part)) for name in ("q_norm", "k_norm")
                          if (part := getattr(attention, name, None)) is not None]
        if {name for name, _ in module.named_children()} != PARTS:
            raise TypeError("a layer of other parts")
        self._gated = is_silu(self._mlp) and all(map(_plain, (
            self._mlp.gate_proj, self._mlp.up_proj, self._mlp.down_proj)))
        self.modules = list(module.modules())
        self.attends: tuple[int, float, int | None] = (0, 1.0, None)  # its number, scaling and window
        self.otherwise: Callable[..., Tensor] | None = None  # for what is no step of decoding; None: the module's own

    def forward(self, hidden_states: Tensor, *rest: Any, position_embeddings: Any = None,
                segments: Attends | None = None, **named: Any) -> Tensor:
        """In place of the module's own, which runs where this one is not made for what it is given."""
        given = {"position_embeddings": position_embeddings, "segments": segments, **named}
        suits = segments is not None and not rest and named.get("past_key_values") is None \
            and hidden_states.shape[0] == 1 and hidden_states.shape[1] <= FEW and not torch.is_grad_enabled() \
            and position_embeddings[0].shape == (1, hidden_states.shape[1], self._width)
        if segments is None or not suits:
            own = self.otherwise or partial(type(self.module).forward, self.module)
            return own(hidden_states, *rest, **given)
        return self._chain.through(self, hidden_states, position_embeddings, segments)

    def weights(self) -> Iterator[int]:
        """Where they lie; others may stand in for them, and come back."""
        for module in self.modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    yield parameter.data_ptr()

    def run(self, x_HB: Tensor, tables: tuple[Tensor, Tensor], segments: Attends) -> Tensor:
        """The layer itself: (H, B) to (H, B)."""
        if (found := self._by_loops(x_HB, tables, segments)) is not None:
            return found
        normed = self._before(x_HB)
        query, key, value = [_through(part, normed).view(-1, self._width, normed.shape[1])
                             for part in self._projections]
        if self._of_heads:
            query, key = (norm(x) for norm, x in zip(self._of_heads, (query, key), strict=True))
        query, key = self._angles.rotate(query, key, tables)
        layer, scaling, window = self.attends
        seen = segments.attend(layer, query, key, value.mT, scaling, window).flatten(1).t()  # (heads D, B)
        x_HB = _through(self._out, seen, x_HB)
        normed, mlp = self._between(x_HB), self._mlp
        if not self._gated:
            return x_HB + mlp(normed.t()).t()
        weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        if loops.multiplies(normed, *weights):
            gate, up, down = weights
            inner = loops.product(normed, up, gated_MB=loops.product(normed, gate))
            return loops.product(inner, down, residual_MB=x_HB)
        out: Tensor = scripted(_gated_sum)(normed, x_HB, *weights)
        return out

    def _by_loops(self, x_HB: Tensor, tables: tuple[Tensor, Tensor], segments: Attends) -> Tensor | None:
        """The same in two calls and its attention; None where a part is none of theirs, or adapted."""
        cos, sin = (table[0] for table in tables)
        parts = self.parts(x_HB, cos, sin)
        if parts is None:
            return None
        query, key, value = by_loops.before(x_HB, parts, cos, sin)
        layer, scaling, window = self.attends
        seen = segments.attend(layer, query, key, value, scaling, window).flatten(1).contiguous().to(x_HB.dtype)
        return by_loops.after(seen, x_HB, parts)

    def parts(self, x_HB: Tensor, *given: Tensor) -> by_loops.Parts | None:
        """All its numbers, if it is one that the loops take, with x and what is given."""
        linears = *self._projections, self._out
        if not self._gated or not all(type(linear) is nn.Linear for linear in linears):
            return None
        *projections, out = (by_loops.Linear(linear.weight, linear.bias) for linear in linears)
        norm, between, *of_heads = (norm.numbers for norm in (self._before, self._between, *self._of_heads))
        mlp = self._mlp.gate_proj.weight, self._mlp.up_proj.weight, self._mlp.down_proj.weight
        more = [*given, *(n.weight for n in (norm, between, *of_heads)),
                *(bias for _, bias in (*projections, out) if bias is not None)]
        if not (loops.multiplies(x_HB, *(w for w, _ in (*projections, out)), *mlp) and loops.usable(*more)
                and all(x.is_contiguous() for x in (x_HB, *more))):
            return None
        return by_loops.Parts(norm, projections, of_heads, out, between, *mlp)


class _Chain:
    """All layers of a model: one call of the loops, once a pass has shown that each is handed the last one's output.

    The first of them makes it all and the last one gives it out. What goes from hand to hand between them is no number,
    and cannot be written to: whoever does something with it will know.
    """

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        self._follow = False  # is each one's output handed to the next as it is, with the same angles?
        self._shown: list[_Layer] = []
        self._last: tuple[Any, Any, Any] = None, None, None  # the last one's output, its numbers, and the angles
        self._made: Tensor | None = None  # what the last of them will give out
        self._passed: Tensor | None = None  # what the others hand on
        self._at = 0  # the one that is handed it next
        self._stack: by_loops.Stack | None = None
        self._of: tuple[Any, ...] = ()  # what it attends to, as it lies, and where its weights lie

    def begin(self, layers: list[_Layer]) -> None:
        """These are the layers, in some order."""
        if layers != self._layers:
            self._layers, self._follow = layers, False

    def forget(self) -> None:
        """What was made: nothing of it outlives the decoding."""
        self._shown, self._last = [], (None, None, None)
        self._made = self._passed = self._stack = None
        self._of = ()

    def through(self, layer: _Layer, hidden: Tensor, tables: tuple[Tensor, Tensor], segments: Attends) -> Tensor:
        """(1, B, H) to (1, B, H). Raises RuntimeError where a model has ceased to hand on what it is given."""
        first = self._follow and layer is self._layers[0]
        if self._made is not None and not first:
            return self._hand_on(layer, hidden)
        self._made, x_HB = None, hidden[0].t().contiguous()
        if first and len(self._layers) > 1 and (made := self._by_loops(x_HB, tables, segments)) is not None:
            self._made, self._at = made.t()[None], 1
            self._passed = x_HB.new_full((1, 1, 1), math.nan).expand(self._made.shape)
            return self._passed
        out = layer.run(x_HB, tables, segments).t()[None]
        if not self._follow:
            before, numbers, angles = self._last
            follows = hidden is before and tables is angles and hidden.equal(numbers)
            self._shown = [*self._shown, layer] if follows else [layer]
            self._last = out, out.clone(), tables
            if self._shown == self._layers:
                self._follow, self._last = True, (None, None, None)
        return out

    def _hand_on(self, layer: _Layer, hidden: Tensor) -> Tensor:
        if hidden is not self._passed or layer is not self._layers[self._at]:
            raise RuntimeError("a model that now does something between its layers where it did nothing before")
        self._at += 1
        if self._at < len(self._layers):
            return hidden
        made, self._made, self._passed = self._made, None, None
        assert made is not None
        return made

    def _by_loops(self, x_HB: Tensor, tables: tuple[Tensor, Tensor], segments: Attends) -> Tensor | None:
        if is_looked_at([layer.module for layer in self._layers]) or not isinstance(segments, Decodes):
            return None
        if (held := segments.held()) is None:
            return None
        cos, sin = (table[0] for table in tables)
        of = segments, segments.moves, *(at for layer in self._layers for at in layer.weights())
        if of != self._of:
            self._stack, self._of = None, ()
            self._stack = self._stacked(x_HB, cos, sin, held)
            self._of = of
        return None if self._stack is None else self._stack.step(x_HB, cos, sin, segments.written)

    def _stacked(self, x_HB: Tensor, cos: Tensor, sin: Tensor, held: Mapping[int, loops.Held]) -> by_loops.Stack | None:
        """All of them, where the loops take each."""
        layers, ours = [], []
        for layer in self._layers:
            parts, (number, scaling, window) = layer.parts(x_HB, cos, sin), layer.attends
            if parts is None or number not in held:
                return None
            layers.append((parts, scaling, window))
            ours.append(held[number])
        with torch.inference_mode(False), torch.no_grad():  # its room is written to wherever a step may be
            return by_loops.Stack(layers, ours, cos.shape[1])


def is_looked_at(modules: Sequence[nn.Module]) -> bool:
    """Does anybody see, or change, what goes into one of these or comes out?"""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(torch.nn.modules.module, f"_global{name}") for name in hooks) \
        or any(getattr(module, name) for module in modules for name in hooks)


def _plain(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.bias is None


def _through(linear: Any, x_KB: Tensor, residual_MB: Tensor | None = None) -> Tensor:
    """The layer's product and the residual, (M, B); of an adapted one by its own forward."""
    if type(linear) is nn.Linear and loops.multiplies(x_KB, *linear.parameters()):
        return loops.product(x_KB, linear.weight, linear.bias, residual_MB=residual_MB)
    if residual_MB is not None and _plain(linear):
        out: Tensor = scripted(_sum)(x_KB, residual_MB, linear.weight)
        return out
    out = scripted(_product)(x_KB, linear.weight, linear.bias) if type(linear) is nn.Linear else linear(x_KB.t()).t()
    return out if residual_MB is None else residual_MB + out


class Shown:
    """Attention of a probe: depends on all that a layer gives it, and remembers how it was called."""

    called: tuple[int, float, int | None] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
               window: int | None) -> Tensor:
        self.called = layer, scaling, window
        mixed = (key * value).repeat_interleave(query.shape[0] // key.shape[0], 0)
        return (query * scaling + mixed).transpose(0, 1)


class TurnedLayers:
    """The turned forms of one model's layers, installed while it decodes."""

    def __init__(self, model: nn.Module, norms: Fused) -> None:
        self._model, self._norms = model, norms
        self._layers: list[tuple[nn.Module, _Layer]] | None = None
        self._chain = _Chain()

    def prepare(self) -> None:
        """Look at every layer, once. Without gradient, and with `attention.NAME` as the model's attention."""
        if self._layers is None:
            angles = _Angles()
            made = ((module, _form_of(module, self._norms, angles, self._chain)) for module in self._model.modules()
                    if hasattr(module, "self_attn") and "forward" not in vars(module))
            self._layers = [(module, layer) for module, layer in made if layer is not None]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside this block the model's layers are the turned ones."""
        parts = set(self._model.modules())
        before = {module: self._norms.form(module) for module, _ in self._layers or ()}
        here = [(module, layer) for module, layer in self._layers or ()
                if module in parts and vars(module).get("forward") is before[module]]
        if here:  # or this is inside another such block
            self._chain.begin([layer for _, layer in here])
        try:
            for module, layer in here:
                layer.otherwise = before[module]
                module.forward = layer.forward
            yield
        finally:
            if here:
                self._chain.forget()
            for module, _ in here:
                del module.forward
                if (form := before[module]) is not None:
                    module.forward = form


def _form_of(module: Any, norms: Fused, angles: _Angles, chain: _Chain) -> _Layer | None:
    """The turned form of this layer, if it gives the same numbers on a probe."""
    try:
        layer = _Layer(module, norms, angles, chain)
        weights = [weight for weight in module.parameters() if weight.dim() > 1]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, PROBE_ROWS, module.input_layernorm.weight.shape[0], generator=generator)
        turn = torch.randn(1, PROBE_ROWS, layer._width // 2, generator=generator).repeat(1, 1, 2)
        if not fused(weights[0]) or not turns(x[0], *weights):
            return None
        shown, angle = Shown(), (turn.cos(), turn.sin())
        forward = partial(type(module).forward, module, x, position_embeddings=angle, attention_mask=None,
                          position_ids=torch.arange(PROBE_ROWS)[None], past_key_values=None, use_cache=False)
        own = forward(segments=shown)
        if shown.called is None:
            return None
        layer.attends = shown.called
        return layer if close(layer.forward(x, position_embeddings=angle, segments=shown), own) else None
    except Exception:  # a module that only looks like a known one may raise anything
        return None
