"""A decoder layer's small operations by hand, for a CPU: RMS norms, gated feed-forward layers and rotary positions.

transformers writes them as a dozen single operations. On a CPU each one writes a new block of memory, which costs more
than the arithmetic (the kernel hands out zeroed pages), and the backward pass keeps most of them: half of all
activations. Here each is one function that keeps no more than its gradient needs, and works in place. The numbers are
the same but for the order of roundings. Modules of a class are replaced only if the first of them gives the numbers of
its own forward on a probe, and work as before on anything but float32 on a CPU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from selftaught.tensors import fast_linear, turned, turns

CLOSE = 1e-5  # of the largest number of a probe
VECTORS = 32  # numbers that torch's elementwise loops take at a time
_MADE_OF = "_made_of"  # an attribute of a norm's result
_Source = tuple[Tensor, Tensor, Tensor] | None
Adds = Mapping[int, Tensor] | None  # memory for gradients by the parameter's id; None: gradients are not added in place
_Into = tuple[Tensor, Tensor | None] | None
ROTARY = "apply_rotary_pos_emb"  # the name of the function in every model file of transformers that has one


class _Norm(torch.autograd.Function):
    """x w / sqrt(mean(x^2) + eps) over the last axis, (..., H), by `_inverse` of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, inverse)
        return _normed(x, weight, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        of_weight = torch.linalg.vecdot(grad.flatten(0, -2), normed.flatten(0, -2), dim=0) if ctx.needs_input_grad[1] \
            else None
        of_x = grad * weight
        along = torch.linalg.vecdot(of_x, normed).div_(x.shape[-1]).unsqueeze(-1)
        return of_x.sub_(normed.mul_(along)).mul_(inverse), of_weight, None


@torch.no_grad()
def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps): (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return (x * inverse).mul_(weight)


def _source(y: Tensor) -> _Source:
    """What `_normed` makes y of, if y is as a norm has made it: three tensors that the norm's own gradient keeps.

    A product keeps them instead of y, and makes y again in its backward pass: 50 MB less of 380 tokens in a 135M model,
    for half a per cent of an update.
    """
    if not (y.requires_grad and hasattr(y, _MADE_OF)):
        return None
    version, source = getattr(y, _MADE_OF)
    return source if version == y._version else None


def _kept(x: Tensor, source: _Source) -> tuple[Tensor, ...]:
    """What a product keeps of its input x (n, K)."""
    return (x,) if source is None else source


def _anew(kept: Sequence[Tensor], width: int) -> Tensor:
    """The input (n, K) of which a product kept `_kept`."""
    return (kept[0] if len(kept) == 1 else _normed(*kept)).view(-1, width)


class _Gated(torch.autograd.Function):
    """(silu(x G^T) * x U^T) D^T, keeping x, or its source, and the two products: (n, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, source: _Source, adds: Adds) -> Tensor:
        # Turned it has the bits of separate layers only where no element is left over by a thread's vectors.
        whole = gate.shape[0] % (VECTORS * torch.get_num_threads()) == 0
        if whole and not any(ctx.needs_input_grad) and turns(x, gate, up):
            inner = silu(turned(x, gate), inplace=True).mul_(turned(x, up))
            return fast_linear(inner.t().contiguous(), down)
        gated, raised = fast_linear(x, gate), fast_linear(x, up)
        ctx.into = tuple(_into(weight, adds) for weight in (gate, up, down))
        ctx.save_for_backward(gated, raised, gate, up, down, *_kept(x, source))
        return fast_linear(silu(gated, inplace=not any(ctx.needs_input_grad)).mul_(raised), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gated, raised, gate, up, down, *kept = ctx.saved_tensors
        active = silu(gated)
        of_gate = of_up = of_down = of_x = None
        if ctx.needs_input_grad[3]:
            of_down = _of_weight(grad, active * raised, ctx.into[2])
        inner = fast_linear(grad, down.t())
        of_raised = active.mul_(inner)
        of_gated = torch.ops.aten.silu_backward(inner.mul_(raised), gated)
        if any(ctx.needs_input_grad[1:3]):
            x = _anew(kept, gate.shape[1])
            of_gate = _of_weight(of_gated, x, ctx.into[0]) if ctx.needs_input_grad[1] else None
            of_up = _of_weight(of_raised, x, ctx.into[1]) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            of_x = fast_linear(of_gated, gate.t()).add_(fast_linear(of_raised, up.t()))
        return of_x, of_gate, of_up, of_down, None, None


class _Linear(torch.autograd.Function):
    """x W^T without a bias: (n, K) to (n, M)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, source: _Source, adds: Adds) -> Tensor:
        ctx.into = _into(weight, adds)
        ctx.save_for_backward(weight, *(_kept(x, source) if ctx.needs_input_grad[1] else ()))
        return fast_linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        of_x = fast_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(grad, _anew(kept, weight.shape[1]), ctx.into) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None


def _into(weight: Tensor, adds: Adds) -> _Into:
    """Where the weight's gradient is added, and the memory for it, if there is any, while it has none."""
    return None if adds is None else (weight, adds.get(id(weight)))


def _of_weight(grad: Tensor, x: Tensor, into: _Into) -> Tensor | None:
    """The gradient of W in x W^T, (M, K) from (n, M) and (n, K); None where it was added to that of `into`.

    `into` holds the parameter itself: what a recomputed layer saved of it is a copy without a gradient.
    """
    parameter, room = into or (None, None)
    if parameter is None or not parameter.is_leaf or parameter._backward_hooks or \
            parameter._post_accumulate_grad_hooks:
        return grad.t() @ x
    if parameter.grad is not None:
        parameter.grad.addmm_(grad.t(), x)
    elif room is not None:
        parameter.grad = torch.mm(grad.t(), x, out=room)
    else:
        return grad.t() @ x
    return None


class _Rotated(torch.autograd.Function):
    """x cos + rotate_half(x) sin, the halves of the last axis turned against each other: as x, (..., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


class _Embedded(torch.autograd.Function):
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


class _Forgets:
    """A context in which nothing is kept, where no gradient is taken: `apply` costs as much as a small operation."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *_: Any) -> None:
        pass


def _run(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    out: Tensor = function.apply(*given) if torch.is_grad_enabled() else function.forward(_Forgets(), *given)
    return out


def fused(x: Tensor) -> bool:
    """Is this what the functions here are for?"""
    return x.device.type == "cpu" and x.dtype == torch.float32


def _norm(module: nn.Module, x: Tensor, *, eps: float, offset: float) -> Tensor:
    weight: Any = module.weight
    if not fused(x) or weight.dtype != x.dtype:
        return type(module).forward(module, x)
    weight = weight + offset if offset else weight
    inverse = _inverse(x, eps)
    y = _run(_Norm, x, weight, inverse)
    if y.requires_grad:
        setattr(y, _MADE_OF, (y._version, (x.detach(), weight.detach(), inverse)))
    return y


def _gated(module: Any, x: Tensor, *, adds: Adds = None) -> Tensor:
    projections = (module.gate_proj, module.up_proj, module.down_proj)
    plain = all(type(p) is nn.Linear and p.bias is None for p in projections)
    if not fused(x) or x.dim() < 2 or not plain or projections[0].weight.dtype != x.dtype:
        return type(module).forward(module, x)
    return _by_rows(_Gated, x, *(p.weight for p in projections), adds)


def _linear(module: Any, x: Tensor, *, adds: Adds = None) -> Tensor:
    if not fused(x) or x.dim() < 2 or module.weight.dtype != x.dtype:
        return type(module).forward(module, x)
    product = _by_rows(_Linear, x, module.weight, adds)
    return product if module.bias is None else product + module.bias


def _by_rows(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Tensor:
    """On (n, K) whatever the shape before it: a view that is made inside a function cannot be changed in place."""
    *weights, adds = rest
    return _run(function, x.flatten(0, -2), *weights, _source(x), adds).unflatten(0, x.shape[:-1])


def _embedded(module: nn.Embedding, ids: Tensor) -> Tensor:
    weight = module.weight
    if not (fused(weight) and weight.is_leaf and weight.requires_grad and weight.grad is not None):
        return type(module).forward(module, ids)
    return _Embedded.apply(weight, ids, weight.grad, module.padding_idx)


def _rotary(original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any,
            unsqueeze_dim: int = 1, **more: Any) -> tuple[Tensor, Tensor]:
    if rest or more or not fused(q) or cos.dtype != q.dtype or cos.shape[-1] != q.shape[-1]:
        return original(q, k, cos, sin, *rest, unsqueeze_dim=unsqueeze_dim, **more)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _run(_Rotated, q, cos, sin), _run(_Rotated, k, cos, sin)


class Fused:
    """The fused forms of one model's modules, installed while it runs under this library."""

    def __init__(self, model: nn.Module) -> None:
        """Look at every module of `model`; nothing is changed yet."""
        own = [module for module in model.modules() if "forward" not in vars(module)]  # a patched one is left as it is
        self._forwards: list[tuple[nn.Module, partial[Tensor]]] = []
        self._rotaries: dict[str, Callable[..., Any]] = {}  # by model file, the function in place of its own
        self._embeddings = [(module, partial(_embedded, module)) for module in own
                            if type(module) is nn.Embedding and module.max_norm is None]
        self._open = False
        self.adds: Adds = None  # if any, embeddings and products add to the gradient that is there, or make it in here
        known: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
        for module in own:
            key = (type(module), frozenset(name for name, _ in module.named_parameters()), _eps(module),
                   type(getattr(module, "act_fn", None)))
            if key not in known:
                known[key] = _form_of(module)
            form = known[key]
            if form is not None:
                self._forwards.append((module, partial(form, module)))
            file = sys.modules[type(module).__module__]
            if ROTARY in vars(file) and file.__name__ not in self._rotaries and _turns_halves(vars(file)[ROTARY]):
                self._rotaries[file.__name__] = partial(_rotary, vars(file)[ROTARY])

    def known_norm(self, module: nn.Module) -> dict[str, float]:
        """`eps` and `offset` of an RMS norm that is fused; KeyError of any other module."""
        forms: dict[nn.Module, Any] = {other: form for other, form in self._forwards if form.func is _norm}
        return dict(forms[module].keywords)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside this block the model's modules are the fused ones; a block inside another changes nothing more."""
        if self._open:
            yield
            return
        new = self._forwards
        if self.adds is not None:
            new = [(module, partial(forward, adds=self.adds) if _multiplies(module) else forward)
                   for module, forward in new]
            new = [*new, *self._embeddings]
        files = {sys.modules[name]: function for name, function in self._rotaries.items()}
        before = {file: vars(file)[ROTARY] for file in files}
        self._open = True
        try:
            for module, forward in new:
                module.forward = forward
            for file, function in files.items():
                setattr(file, ROTARY, function)
            yield
        finally:
            self._open = False
            for file, function in before.items():
                setattr(file, ROTARY, function)
            for module, _ in new:
                del module.forward


def _multiplies(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _form_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """The fused forward of a module of this kind, if one gives the same numbers on a probe."""
    names = {name for name, _ in module.named_parameters()}
    if type(module) is nn.Linear and "weight" in names:
        return _linear
    forms: list[Callable[..., Tensor]] = []
    if names == {"weight"} and "RMSNorm" in type(module).__name__ and isinstance(_eps(module), float):
        forms = [partial(_norm, eps=_eps(module), offset=offset) for offset in (0.0, 1.0)]
    elif names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"} and is_silu(module):
        forms = [_gated]
    if not forms or len(inspect.signature(type(module).forward).parameters) != 2:  # itself and x
        return None
    weight = next(module.parameters())
    noise = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    x = noise.to(weight.device, weight.dtype)
    if not fused(x):
        return None
    try:
        with torch.no_grad():
            own = type(module).forward(module, x)
            return next((form for form in forms if close(form(module, x=x), own)), None)
    except Exception:  # a module that only looks like a known one may raise anything
        return None


def is_silu(module: Any) -> bool:
    x = torch.linspace(-6, 6, 49)
    try:
        return bool(torch.allclose(module.act_fn(x), silu(x), atol=1e-6))
    except Exception:  # no such function, or one of more arguments
        return False


def _turns_halves(function: Callable[..., Any]) -> bool:
    """Is this model file's function the usual one?"""
    q, k, cos, sin = torch.randn(4, 1, 1, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()
    try:
        own = function(q, k, cos[0], sin[0])
        ours = _rotary(function, q, k, cos[0], sin[0])
    except Exception:  # another signature or another layout: it may raise anything
        return False
    return all(close(a, b) for a, b in zip(ours, own, strict=True))


def close(ours: Tensor, own: Tensor) -> bool:
    """Equal but for roundings, and not because all is zero."""
    size = own.abs().max()
    return ours.shape == own.shape and bool(size > 0) and bool((ours - own).abs().max() <= CLOSE * size)
