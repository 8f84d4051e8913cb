"""A decoder layer's modules by `operations`, for a CPU: RMS norms, products, gated layers and rotary positions.

transformers writes them as a dozen single operations. On a CPU each one writes a new block of memory, which costs more
than the arithmetic (the kernel hands out zeroed pages), and the backward pass keeps most of them: half of all
activations. The numbers are the same but for the order of roundings. Modules of a class are replaced only if the first
of them gives the numbers of its own forward on a probe, and work as before on anything but float32 on a CPU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from selftaught.score.operations import (
    Adds,
    Embedded,
    Gate,
    Gated,
    Linear,
    Norm,
    Rotated,
    fused,
    inverse_root,
    remember_source,
    run,
    source,
)  # fmt: skip

CLOSE = 1e-5  # of the largest number of a probe
ROTARY = "apply_rotary_pos_emb"  # the name of the function in every model file of transformers that has one


def _norm(module: nn.Module, x: Tensor, *, eps: float, offset: float) -> Tensor:
    weight: Any = module.weight
    if not fused(x) or weight.dtype != x.dtype:
        return type(module).forward(module, x)
    weight = weight + offset if offset else weight
    inverse = inverse_root(x, eps)
    return remember_source(run(Norm, x, weight, inverse), x, weight, inverse)


def _gated(module: Any, x: Tensor, *, adds: Adds = None) -> Tensor:
    projections = (module.gate_proj, module.up_proj, module.down_proj)
    if not fused(x) or x.dim() < 2 or projections[0].weight.dtype != x.dtype:
        return type(module).forward(module, x)
    if not all(type(p) is nn.Linear and p.bias is None for p in projections):  # adapted, for one
        out: Tensor = module.down_proj(run(Gate, module.gate_proj(x), module.up_proj(x)))
        return out
    return _by_rows(Gated, x, *(p.weight for p in projections), adds)


def _linear(module: Any, x: Tensor, *, adds: Adds = None) -> Tensor:
    if not fused(x) or x.dim() < 2 or module.weight.dtype != x.dtype:
        return type(module).forward(module, x)
    product = _by_rows(Linear, x, module.weight, adds)
    return product if module.bias is None else product + module.bias


def _by_rows(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Tensor:
    """On (n, K) whatever the shape before it: a view that is made inside a function cannot be changed in place."""
    *weights, adds = rest
    return run(function, x.flatten(0, -2), *weights, source(x), adds).unflatten(0, x.shape[:-1])


def _embedded(module: nn.Embedding, ids: Tensor) -> Tensor:
    weight = module.weight
    if not (fused(weight) and weight.is_leaf and weight.requires_grad and weight.grad is not None):
        return type(module).forward(module, ids)
    return Embedded.apply(weight, ids, weight.grad, module.padding_idx)


def _rotary(original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any,
            unsqueeze_dim: int = 1, **more: Any) -> tuple[Tensor, Tensor]:
    if rest or more or not fused(q) or cos.dtype != q.dtype or cos.shape[-1] != q.shape[-1]:
        return original(q, k, cos, sin, *rest, unsqueeze_dim=unsqueeze_dim, **more)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return run(Rotated, q, cos, sin), run(Rotated, k, cos, sin)


class Fused:
    """The fused forms of one model's modules, installed while it runs under this library."""

    def __init__(self, model: nn.Module) -> None:
        """Look at every module of `model`; nothing is changed yet."""
        own = [module for module in model.modules() if "forward" not in vars(module)]  # a patched one is left as it is
        self._multiplies = {module for module in own if any(p.dim() > 1 for p in module.parameters())}
        self._forwards: list[tuple[nn.Module, partial[Tensor]]] = []
        self._rotaries: dict[str, Callable[..., Any]] = {}  # by model file, the function in place of its own
        self._embeddings = [(module, partial(_embedded, module)) for module in own
                            if type(module) is nn.Embedding and module.max_norm is None]
        self._placed: dict[nn.Module, Callable[..., Tensor]] = {}  # while they are installed
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

    def add(self, forms: Iterable[tuple[nn.Module, Callable[..., Tensor]]]) -> None:
        """Further modules, whole layers of them, and what is called in place of their forward."""
        self._forwards += [(module, partial(form)) for module, form in forms]

    def form(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """What stands in for the module's own forward while these are installed."""
        return self._placed.get(module)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside this block the model's modules are the fused ones; a block inside another changes nothing more."""
        if self._open:
            yield
            return
        new = self._forwards
        if self.adds is not None:
            new = [(module, partial(forward, adds=self.adds) if module in self._multiplies else forward)
                   for module, forward in new]
            new = [*new, *self._embeddings]
        files = {sys.modules[name]: function for name, function in self._rotaries.items()}
        before = {file: vars(file)[ROTARY] for file in files}
        self._open = True
        try:
            self._placed = {module: forward for module, forward in new if "forward" not in vars(module)}
            for module, forward in self._placed.items():
                vars(module)["forward"] = forward  # an assignment would look among its parameters first
            for file, function in files.items():
                setattr(file, ROTARY, function)
            yield
        finally:
            for file, function in before.items():
                setattr(file, ROTARY, function)
            for module in self._placed:
                del vars(module)["forward"]
            self._open, self._placed = False, {}


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
    elif {name.split(".")[0] for name in names} == {"gate_proj", "up_proj", "down_proj"} and is_silu(module):
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
