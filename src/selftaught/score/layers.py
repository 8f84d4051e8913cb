"""Decoder layers of a packed pass, for float32 on a CPU: each is one function of autograd, forward and back by hand.

Module by module (`fused`) a layer is fourteen functions, and some of its seven products are small. Here layers of one
input are one product where their weights lie in a row: queries, keys and values, and both factors of the
gated layer; so are their gradients. Residual sums are done by the products, gradients are written to where the next
product reads them, and rotations take no memory. Where the loops can call the fastest product themselves, and weights
and gradients lie so, either way is one call (`kernels.passes`), whose numbers are held against float64 once. A layer is
replaced only if its parts give the numbers of its own forward on a probe, which also shows how it calls its attention.

Shapes: n tokens of a pass, H hidden, I inner width, D of one head, A = (Hq + 2 Hkv) D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from selftaught.heap import empty, in_a_row, together
from selftaught.kernels import layer as by_loops
from selftaught.kernels import loops, passes
from selftaught.score.attention import Segments
from selftaught.score.fused import Fused, close, is_silu
from selftaught.score.operations import (
    Adds,
    fused,
    gradient_row,
    into_of,
    joint_backward,
    joint_linear,
    of_weights,
    run,
)  # fmt: skip
from selftaught.score.turned import PARTS, Shown, is_looked_at
from selftaught.tensors import FEW, fast_linear, linear_onto, pack

_WEIGHTS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # as `_Whole` takes them
_MATRICES = slice(2, 5), slice(5, 6), slice(6, 8), slice(8, 9)  # those of one input


class _Whole(torch.autograd.Function):
    """Norm, attention, sum, norm, gated layer, sum: (n, H) to (n, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments, form: _Form, adds: Adds,
                *weights: Tensor) -> Tensor:
        x, trains = x.contiguous(), any(ctx.needs_input_grad)
        joined = form.in_one_call(x, segments, weights)
        if joined is None:
            result, kept = _forward(x, cos, sin, segments, form, weights, trains)
        else:
            result, kept = passes.forward(x, cos, sin, joined, segments.sequences, form.shape, trains)
        if kept is not None:
            ctx.form, ctx.segments = form, segments
            ctx.into = [into_of(weight, adds) for weight in weights]
            ctx.save_for_backward(x, cos, sin, *kept, *weights)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *rest = ctx.saved_tensors
        kept, weights = passes.Kept(*rest[: -len(_WEIGHTS)]), rest[-len(_WEIGHTS) :]
        form, grad, needs = ctx.form, grad.contiguous(), ctx.needs_input_grad[-len(weights) :]
        joined = form.in_one_call(x, ctx.segments, weights)
        rows = [row for of in _MATRICES if (row := gradient_row(ctx.into[of], needs[of])) is not None]
        of_matrices: list[Tensor | None] = [None] * (len(weights) - 2)
        if joined is None or len(rows) < len(_MATRICES):
            of_x, of_norms, of_matrices = _backward(grad, x, cos, sin, kept, weights, ctx, needs)
        else:
            of_x, *of_norms = passes.backward(grad, x, cos, sin, joined, kept, ctx.segments.sequences, form.shape,
                                              [(row.whole, row.adds) for row in rows])
            for row in rows:
                row.written()
        of_trained = (g if need else None for g, need in zip(of_norms, needs, strict=False))
        return of_x, *(None,) * 5, *of_trained, *of_matrices


def _forward(x: Tensor, cos: Tensor, sin: Tensor, segments: Segments, form: _Form, weights: Sequence[Tensor],
             trains: bool) -> tuple[Tensor, passes.Kept | None]:
    """The layer of x, part by part, and what is kept of it."""
    (norm, between, query, key, value, out, gate, up, down), (number, scaling, window) = weights, form.attends
    normed, root = by_loops.normed(x, norm, form.shape.eps[0])
    at = joint_linear(normed, (query, key, value))
    del normed
    q, k, v = form.heads(at)
    loops.rotate(q, cos, sin, inplace=True)
    loops.rotate(k, cos, sin, inplace=True)
    if trains:
        seen, sums = passes.attend_pass(q, k, v, segments.sequences, scaling)
    else:
        seen, sums = segments.attend(number, q, k, v, scaling, window), root[:0]  # of which nothing is kept
    middle = fast_linear(seen.flatten(1), out)
    normed, again = by_loops.normed(middle, between, form.shape.eps[1], added=x)
    both = joint_linear(normed, (gate, up))
    del normed
    gated, raised = both.chunk(2, -1)
    result = linear_onto(middle, loops.gate(gated, raised), down)
    return result, passes.Kept(root, at, seen, sums, middle, again, both) if trains else None


def _backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, kept: passes.Kept, weights: Sequence[Tensor], ctx: Any,
              needs: Sequence[bool]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The gradients of x, of both norms' weights, and of the matrices."""
    norm, between, query, key, value, out, gate, up, down = weights
    form, into = ctx.form, ctx.into
    active, of_both = fast_linear(grad, down.t()), empty(*kept.both.shape)
    gated, raised = kept.both.chunk(2, -1)
    loops.gate_backward(gated, raised, active, of_both)
    of_down = of_weights(grad, active, (down,), into[8:], needs[8:])
    of_gated = of_weights(of_both, loops.norm(kept.middle, between, kept.again), (gate, up), into[6:8], needs[6:8])
    of_middle, of_between = loops.norm_backward(joint_backward(of_both, (gate, up)), kept.middle, between, kept.again,
                                                grad)
    of_out = of_weights(of_middle, kept.seen.flatten(1), (out,), into[5:6], needs[5:6])
    of_at = empty(*kept.at.shape)
    of_seen = fast_linear(of_middle, out.t()).view(kept.seen.shape)
    q, k, v = form.heads(kept.at)
    of_q, of_k, _ = passes.attend_pass_backward(
        of_seen, q, k, v, kept.seen, kept.sums, ctx.segments.sequences, form.attends[1],
        joined=of_at.unflatten(1, (-1, form.width)))
    loops.rotate(of_q, cos, sin, back=True, inplace=True)
    loops.rotate(of_k, cos, sin, back=True, inplace=True)
    of_heads = of_weights(of_at, loops.norm(x, norm, kept.root), (query, key, value), into[2:5], needs[2:5])
    of_x, of_norm = loops.norm_backward(joint_backward(of_at, (query, key, value)), x, norm, kept.root, of_middle)
    return of_x, [of_norm, of_between], [*of_heads, *of_out, *of_gated, *of_down]


class _Form:
    """One layer's, in place of its own forward."""

    def __init__(self, module: Any, norms: Fused) -> None:
        """Raises AttributeError, KeyError or TypeError where the module is no such layer."""
        attention, mlp = module.self_attn, module.mlp
        self._module, self._norms, self.width = module, norms, int(attention.head_dim)
        self._parts = [module.get_submodule(name) for name in _WEIGHTS]
        known = [norms.known_norm(part) for part in self._parts[:2]]
        self._eps = known[0]["eps"], known[1]["eps"]
        self._modules = list(module.modules())
        self._numbers = self._those_of_the_forward()
        others = [part for part in self._modules if part not in (module, attention, mlp, *self._parts)]
        if {name for name, _ in module.named_children()} != PARTS or any(each["offset"] for each in known) \
                or not is_silu(mlp) or any(part._parameters for part in others) \
                or any(part.bias is not None for part in self._parts[2:]) \
                or any("forward" in vars(part) for part in self._modules):
            raise TypeError("a layer of other parts")
        self.attends: tuple[int, float, int | None] = (0, 1.0, None)  # its number, scaling and window

    def __call__(self, hidden_states: Tensor, *rest: Any, position_embeddings: Any = None, segments: Any = None,
                 adds: Adds = None, **named: Any) -> Tensor:
        weights = [part.weight for part in self._parts]
        if rest or not self._suits(hidden_states, position_embeddings, segments, weights, named):
            own: Tensor = type(self._module).forward(self._module, hidden_states, *rest, segments=segments,
                                                     position_embeddings=position_embeddings, **named)
            return own
        cos, sin = (table[0].contiguous() for table in position_embeddings)
        return run(_Whole, hidden_states.flatten(0, 1), cos, sin, segments, self, adds, *weights)[None]

    @property
    def shape(self) -> passes.Shape:
        query, key = (part.weight.shape[0] // self.width for part in self._parts[2:4])
        return passes.Shape(self._eps, (query, key), self.width, self.attends[1])

    def in_one_call(self, x: Tensor, segments: Segments, weights: Sequence[Tensor]) -> passes.Weights | None:
        """All its weights, those of one input as one matrix, if a call for the whole layer is the fastest.

        Not where the attention itself is asked, which may keep what it is shown.
        """
        if not (passes.take_layers() and x.shape[0] > FEW and type(segments).attend is Segments.attend):
            return None
        joined = [together(*weights[of]) for of in _MATRICES]
        heads, out, inner, down = joined
        if heads is None or out is None or inner is None or down is None:
            return None
        return passes.Weights(weights[0], weights[1], heads, out, inner, down)

    def _suits(self, x: Tensor, angles: Any, segments: Any, weights: Sequence[Tensor], named: dict[str, Any]) -> bool:
        """Is this a packed pass whose attention the loops compute, in float32, through a layer that is as it was?

        Not where a layer is in training mode, in which it may drop something out, and recomputes its activations.
        """
        return isinstance(segments, Segments) \
            and not (torch.is_grad_enabled() and type(segments).attend is not Segments.attend) \
            and x.shape[0] == 1 and named.get("past_key_values") is None and not torch.is_autocast_enabled("cpu") \
            and self._is_as_it_was() and segments.sees_all(self.attends[2]) and loops.attends(self.width) \
            and all(table.shape == (1, x.shape[1], self.width) for table in angles) \
            and loops.usable(x, *angles, *weights) and all(w.is_contiguous() for w in weights)

    def _is_as_it_was(self) -> bool:
        """Has nobody replaced, patched or hooked a part of it, or set it to train?"""
        return list(self._module.modules()) == self._modules and self._those_of_the_forward() == self._numbers \
            and all(type(part) is nn.Linear and part.bias is None for part in self._parts[2:]) \
            and not is_looked_at(self._modules[1:]) \
            and not any(part.training for part in self._modules) \
            and all(vars(part).get("forward") is self._norms.form(part) for part in self._modules[1:])

    def _those_of_the_forward(self) -> tuple[Any, ...]:
        """What its forward reads that is no module's own."""
        return getattr(self._module.self_attn, "scaling", None), getattr(self._module.mlp, "act_fn", None)

    def heads(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (Hq, n, D), keys and values (Hkv, n, D), where they lie in (n, A)."""
        counts = [part.weight.shape[0] // self.width for part in self._parts[2:5]]
        query, key, value = at.unflatten(1, (-1, self.width)).transpose(0, 1).split(counts)
        return query, key, value


def packed_layers(model: nn.Module, norms: Fused) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Each layer of the model that there is a form of, and the form; the weights of each are moved to lie in a row.

    Without gradient, and with `attention.NAME` as the model's attention.
    """
    found = [(module, form) for module in model.modules() if hasattr(module, "self_attn")
             and "forward" not in vars(module) and (form := _form_of(module, norms)) is not None]
    if found:
        _lay_out(model, [module for module, _ in found])
    return [*found]


@torch.inference_mode(False)
@torch.no_grad()
def _lay_out(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Move the weights of each layer into a row, and copy all others too: nothing of the file from which they were
    read need stay mapped. What is shared with another process stays where it is."""
    moved = set[nn.Parameter]()
    for module in layers:
        parameters = {name: p for name, p in module.named_parameters() if not p.is_shared()}
        for name, copy in in_a_row(parameters).items():
            parameters[name].data = copy
            moved.add(parameters[name])
    for parameter in model.parameters():
        if parameter not in moved and fused(parameter) and not parameter.is_shared():
            parameter.data = parameter.data.clone()


def _form_of(module: Any, norms: Fused) -> _Form | None:
    """The form of this layer, if it gives the same numbers on a probe."""
    try:
        form = _Form(module, norms)
        weight = form._parts[2].weight
        if not all(fused(part.weight) and part.weight.any() for part in form._parts):  # zeros would hide what is before
            return None
        segments = Segments(pack([(1, 2), (1, 2), (3,)], [(4, 5, 6), (7, 8), (9, 1)]))
        size = int(segments.sequences.sequences[1].sum())
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        x, turn = draw(1, size, weight.shape[1]), draw(1, size, form.width // 2).repeat(1, 1, 2)
        given: dict[str, Any] = {
            "position_embeddings": (turn.cos(), turn.sin()), "position_ids": torch.arange(size)[None],
            "attention_mask": None, "past_key_values": None, "use_cache": False}
        shown = Shown()
        type(module).forward(module, x, segments=shown, **given)
        if shown.called is None:
            return None
        form.attends = shown.called
        weights = [part.weight for part in form._parts]
        if not form._suits(x, given["position_embeddings"], segments, weights, {}):  # nothing would be shown of it
            return None
        own = type(module).forward(module, x, segments=segments, **given)
        return form if close(form(x, segments=segments, **given), own) else None
    except Exception:  # a module that only looks like a known one may raise anything
        return None
