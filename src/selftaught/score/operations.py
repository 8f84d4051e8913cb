"""The operations of a decoder layer by hand, for float32 on a CPU: RMS norms, products, gated layers, rotary positions.

Each is one function of autograd that keeps no more than its gradient needs and works in place: by the compiled loops
of `kernels.loops` where there are any, by torch's operators elsewhere, with the same numbers but for roundings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from selftaught.heap import together
from selftaught.kernels import loops
from selftaught.tensors import fast_linear, turned, turns

VECTORS = 32  # numbers that torch's elementwise loops take at a time
_MADE_OF = "_made_of"  # an attribute of a norm's result
Source = tuple[Tensor, Tensor, Tensor] | None
Adds = Mapping[int, Tensor] | None  # memory for gradients by the parameter's id; None: gradients are not added in place
_Into = tuple[Tensor, Tensor | None] | None


def fused(x: Tensor) -> bool:
    """Is this what the functions here are for?"""
    return x.device.type == "cpu" and x.dtype == torch.float32


class Norm(torch.autograd.Function):
    """x w / sqrt(mean(x^2) + eps) over the last axis, (..., H), by `inverse_root` of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, inverse)
        return _normed(x, weight, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if loops.usable(x):
            return *loops.norm_backward(grad.contiguous(), x, weight, inverse), None
        normed = x * inverse
        of_weight = torch.linalg.vecdot(grad.flatten(0, -2), normed.flatten(0, -2), dim=0) if ctx.needs_input_grad[1] \
            else None
        of_x = grad * weight
        along = torch.linalg.vecdot(of_x, normed).div_(x.shape[-1]).unsqueeze(-1)
        return of_x.sub_(normed.mul_(along)).mul_(inverse), of_weight, None


@torch.no_grad()
def inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps): (..., 1)."""
    if loops.usable(x):
        return loops.inverse_root(x, eps)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """x w inverse."""
    return loops.norm(x, weight, inverse) if loops.usable(x) else (x * inverse).mul_(weight)


def remember_source(y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """y, which is `Norm` of the others, and knows it where there will be a gradient."""
    if y.requires_grad:
        setattr(y, _MADE_OF, (y._version, (x.detach(), weight.detach(), inverse)))
    return y


def source(y: Tensor) -> Source:
    """What `_normed` makes y of, if y is as a norm has made it: three tensors that the norm's own gradient keeps.

    A product keeps them instead of y, and makes y again in its backward pass: 50 MB less of 380 tokens in a 135M model,
    for half a per cent of an update.
    """
    if not (y.requires_grad and hasattr(y, _MADE_OF)):
        return None
    version, made_of = getattr(y, _MADE_OF)
    return made_of if version == y._version else None


def _kept(x: Tensor, source: Source) -> tuple[Tensor, ...]:
    """What a product keeps of its input x (n, K)."""
    return (x,) if source is None else source


def _anew(kept: Sequence[Tensor], width: int) -> Tensor:
    """The input (n, K) of which a product kept `_kept`."""
    return (kept[0] if len(kept) == 1 else _normed(*kept)).view(-1, width)


class Gate(torch.autograd.Function):
    """silu(gated) * raised, of two products (..., I) that are kept."""

    @staticmethod
    def forward(ctx: Any, gated: Tensor, raised: Tensor) -> Tensor:
        ctx.save_for_backward(gated, raised)
        return _gate(gated.contiguous(), raised.contiguous(), inplace=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gated, raised = ctx.saved_tensors
        own = grad.clone(memory_format=torch.contiguous_format)
        _, of_gated, of_raised = _gate_backward(gated.contiguous(), raised.contiguous(), own)
        return of_gated, of_raised


class Gated(torch.autograd.Function):
    """(silu(x G^T) * x U^T) D^T, keeping x, or its source, and the two products: (n, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, source: Source, adds: Adds) -> Tensor:
        # Turned it has the bits of separate layers only where no element is left over by a thread's vectors.
        trains = any(ctx.needs_input_grad)
        whole = gate.shape[0] % (VECTORS * torch.get_num_threads()) == 0
        if whole and not trains and turns(x, gate, up):
            inner = _gate(turned(x, gate), turned(x, up), inplace=True)
            return fast_linear(inner.t().contiguous(), down)
        gated, raised = fast_linear(x, gate), fast_linear(x, up)
        ctx.into = tuple(into_of(weight, adds) for weight in (gate, up, down))
        ctx.save_for_backward(gated, raised, gate, up, down, *_kept(x, source))
        return fast_linear(_gate(gated, raised, inplace=not trains), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gated, raised, gate, up, down, *kept = ctx.saved_tensors
        of_gate = of_up = of_down = of_x = None
        inner, of_gated, of_raised = _gate_backward(gated, raised, fast_linear(grad, down.t()))
        if ctx.needs_input_grad[3]:
            of_down = _of_weight(grad, inner, ctx.into[2])
        if any(ctx.needs_input_grad[1:3]):
            x = _anew(kept, gate.shape[1])
            of_gate = _of_weight(of_gated, x, ctx.into[0]) if ctx.needs_input_grad[1] else None
            of_up = _of_weight(of_raised, x, ctx.into[1]) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            of_x = fast_linear(of_gated, gate.t()).add_(fast_linear(of_raised, up.t()))
        return of_x, of_gate, of_up, of_down, None, None


def _gate(gated: Tensor, raised: Tensor, inplace: bool) -> Tensor:
    """silu(gated) raised."""
    if loops.usable(gated):
        return loops.gate(gated, raised, inplace)
    return silu(gated, inplace=inplace).mul_(raised)


def _gate_backward(gated: Tensor, raised: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_gate` again, and the gradients of both factors from its own, which is overwritten."""
    if loops.usable(gated):
        of_gated, of_raised = loops.gate_backward(gated, raised, grad)
        return grad, of_gated, of_raised
    active = silu(gated)
    inner = active * raised
    of_raised = active.mul_(grad)
    return inner, torch.ops.aten.silu_backward(grad.mul_(raised), gated), of_raised


class Linear(torch.autograd.Function):
    """x W^T without a bias: (n, K) to (n, M)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, source: Source, adds: Adds) -> Tensor:
        ctx.into = into_of(weight, adds)
        ctx.save_for_backward(weight, *(_kept(x, source) if ctx.needs_input_grad[1] else ()))
        return fast_linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        of_x = fast_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(grad, _anew(kept, weight.shape[1]), ctx.into) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None


def into_of(weight: Tensor, adds: Adds) -> _Into:
    """Where the weight's gradient is added, and the memory for it, if there is any, while it has none."""
    return None if adds is None else (weight, adds.get(id(weight)))


def _addable(into: _Into) -> Tensor | None:
    """The parameter, if its gradient is one that nobody is told of."""
    parameter = None if into is None else into[0]
    hooked = parameter is None or not parameter.is_leaf or parameter._backward_hooks \
        or parameter._post_accumulate_grad_hooks
    return None if hooked else parameter


def _of_weight(grad: Tensor, x: Tensor, into: _Into) -> Tensor | None:
    """The gradient of W in x W^T, (M, K) from (n, M) and (n, K); None where it was added to that of `into`.

    `into` holds the parameter itself: what a recomputed layer saved of it is a copy without a gradient.
    """
    parameter = _addable(into)
    if into is None or parameter is None:
        return grad.t() @ x
    grad, x, room = grad.contiguous(), x.contiguous(), into[1]
    if parameter.grad is not None:
        _add_product(parameter.grad, grad, x, fresh=False)
    elif room is None:
        return grad.t() @ x
    else:
        parameter.grad = _add_product(room, grad, x, fresh=True)
    return None


def _add_product(out: Tensor, grad: Tensor, x: Tensor, fresh: bool) -> Tensor:
    """out + grad^T x in place, or the product alone."""
    if loops.accumulates(out, grad, x):
        return loops.outer(out, grad, x, fresh=fresh)
    return torch.mm(grad.t(), x, out=out) if fresh else out.addmm_(grad.t(), x)


def joint_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x W^T of all weights side by side, (n, sum of M): one product where they lie in a row."""
    whole = together(*weights)
    return torch.cat([fast_linear(x, w) for w in weights], 1) if whole is None else fast_linear(x, whole)


def joint_backward(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of x from that of `joint_linear`."""
    whole = together(*weights)
    if whole is not None:
        return fast_linear(grad, whole.t())
    first, *rest = (fast_linear(g, w.t()) for g, w in zip(_parts(grad, weights), weights, strict=True))
    for more in rest:
        first.add_(more)
    return first


def of_weights(grad: Tensor, x: Tensor, weights: Sequence[Tensor], into: Sequence[_Into], needs: Sequence[bool]
               ) -> list[Tensor | None]:
    """The gradients of the weights of `joint_linear`; None of each that was added to what is there, or needs none.

    `into` is as `into_of` says. Where all of them are added and lie in a row, by one product.
    """
    if (row := gradient_row(into, needs)) is not None:
        _add_product(row.whole, grad, x, not row.adds)
        row.written()
        return [None] * len(weights)
    return [_of_weight(g, x, each) if need else None
            for g, each, need in zip(_parts(grad, weights), into, needs, strict=True)]


@dataclass(frozen=True)
class GradientRow:
    """Where the gradients of some weights of one input are added together: they lie in a row."""

    whole: Tensor
    adds: bool  # to what is there
    _parts: list[tuple[torch.nn.Parameter, Tensor]]

    def written(self) -> None:
        """Make it known."""
        for parameter, part in self._parts:
            parameter.grad = part
            torch.autograd.graph.increment_version(part)


def gradient_row(into: Sequence[_Into], needs: Sequence[bool]) -> GradientRow | None:
    """That of all of them; None where one needs no gradient, or somebody is to be told of it."""
    parameters: list[Any] = [_addable(each) for each in into]
    if not all(needs) or any(parameter is None for parameter in parameters):
        return None
    fresh = all(parameter.grad is None for parameter in parameters)
    rooms: list[Any] = [each[1] if fresh else each[0].grad for each in into if each is not None]
    whole = None if any(room is None for room in rooms) else together(*rooms)
    return None if whole is None else GradientRow(whole, not fresh, [*zip(parameters, rooms, strict=True)])


def _parts(grad: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    return [part.contiguous() for part in grad.split([w.shape[0] for w in weights], 1)]


class Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, the halves of the last axis turned against each other: as x, (..., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if (turned_by := _by_loop(x, cos, sin, back=False)) is not None:
            return turned_by
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if (turned_by := _by_loop(grad, cos, sin, back=True)) is not None:
            return turned_by, None, None
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


def _by_loop(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor | None:
    """By the loop, if x is (1, heads, T, D) and the angles are (1, 1, T, D)."""
    if x.shape[0] != 1 or cos.shape != (1, 1, *x.shape[2:]) or not loops.usable(x, cos, sin):
        return None
    dense = x if x.stride(-1) == 1 and torch.empty_like(x).stride() == x.stride() else x.contiguous()
    return loops.rotate(dense[0], cos.contiguous(), sin.contiguous(), back)[None]


class Embedded(torch.autograd.Function):
    """Rows of an embedding (V, H) by ids (...), whose gradient is added to `into` (V, H) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, into: Tensor, padding: int | None) -> Tensor:
        ctx.ids, ctx.into, ctx.padding = ids, into, padding
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if ctx.padding is not None:
            grad = grad.masked_fill((ctx.ids == ctx.padding)[..., None], 0)
        ctx.into.index_add_(0, ctx.ids.flatten(), grad.flatten(0, -2))
        return None, None, None, None


class Forgets:
    """A context in which nothing is kept, where no gradient is taken: `apply` costs as much as a small operation."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *_: Any) -> None:
        pass


def run(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    """The function, in autograd's graph if there is one."""
    out: Tensor = function.apply(*given) if torch.is_grad_enabled() else function.forward(Forgets(), *given)
    return out
