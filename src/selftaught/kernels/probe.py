"""Every compiled loop beside torch's operators in float64, on a few drawn numbers: asked once, before any is used.

Compilers err, and a processor may not be what its flags say; a loop that counts wrong would teach a model nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from selftaught.kernels import cpu_rows, loops

CLOSE = 2e-5  # of the largest number of a result
_Pair = tuple[str, Tensor, Tensor]


def check() -> None:
    """Raises RuntimeError where a loop's numbers are not torch's."""
    draw = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):  # wherever the first caller may be
        for part in (_layers, _decoding, _passes, _statistics, _divergences):
            for name, ours, exact in part(draw):
                gap = float((ours.double() - exact).abs().max())
                if not gap <= CLOSE * float(exact.abs().max()):
                    raise RuntimeError(f"{name} is {gap:.1e} from what it should be")


def _drawn(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float32)


def _exact(function: Callable[..., Tensor], grad: Tensor, *given: Tensor) -> list[Tensor]:
    """The value in float64, and the gradients of what it was given."""
    inputs = [x.double().requires_grad_() for x in given]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _layers(draw: torch.Generator) -> Iterator[_Pair]:
    x, up, grad = _drawn(draw, 3, 5, 72)
    weight = _drawn(draw, 72)
    value, of_x, of_weight = _exact(_norm, grad, x, weight)
    root = loops.inverse_root(x, 1e-6)
    yield "norm", loops.norm(x, weight, root), value
    for name, ours, exact in zip(("of x", "of w"), loops.norm_backward(grad, x, weight, root), (of_x, of_weight),
                                 strict=True):
        yield f"norm's gradient {name}", ours, exact
    value, *slopes = _exact(lambda g, u: silu(g) * u, grad, x, up)
    again = grad.clone()
    yield "gate", loops.gate(x, up), value
    for ours, exact in zip(loops.gate_backward(x, up, again), slopes, strict=True):
        yield "gate's gradient", ours, exact
    yield "gate again", again, value
    a, b, before = _drawn(draw, 5, 21), _drawn(draw, 5, 80), _drawn(draw, 21, 80)
    exact = a.double().t() @ b.double()
    yield "outer", loops.outer(before.clone(), a, b), before.double() + exact
    yield "outer, fresh", loops.outer(before.clone(), a, b, fresh=True), exact
    (heads, grad), (cos, sin) = _drawn(draw, 2, 3, 5, 40), _drawn(draw, 2, 5, 40)
    value, of_x, *_ = _exact(_rotated, grad, heads, cos, sin)
    yield "rotate", loops.rotate(heads, cos, sin), value
    yield "rotate's gradient", loops.rotate(grad, cos, sin, back=True), of_x


def _decoding(draw: torch.Generator) -> Iterator[_Pair]:
    for columns in (5, 16):
        x, weight, bias = _drawn(draw, 40, columns), _drawn(draw, 19, 40), _drawn(draw, 19)
        gated, residual = _drawn(draw, 2, 19, columns)
        exact = silu(gated.double()) * (weight.double() @ x.double() + bias[:, None]) + residual
        yield "product", loops.product(x, weight, bias, gated, residual), exact
        yield "norm_turned", loops.norm_turned(x, weight[0], 1e-6, 1.0), _norm(x.double().mT, weight[0].double() + 1).mT
        heads, angles = _drawn(draw, 3, 8, columns), _drawn(draw, 2, columns, 8)
        yield "rotate_turned", loops.rotate_turned(heads, *angles), _rotated(heads.double().mT, *angles.double())
    query, key, value = _drawn(draw, 6, 3, 80), _drawn(draw, 2, 3, 80), _drawn(draw, 2, 3, 80)
    prompt_k, prompt_v = _drawn(draw, 2, 2, 80, loops.BLOCK), _drawn(draw, 2, 2, 9, 80)
    held_k, held_v = _drawn(draw, 2, 3, 80, loops.BLOCK), _drawn(draw, 2, 3, loops.BLOCK, 80)
    group, length, written = torch.tensor([0, 1, 1]), torch.tensor([9, 4]), 3
    found = loops.attend(query, key, value, prompt_k, prompt_v, held_k, held_v, group, length, written, None, 0.2)
    for row in range(3):
        seen = int(length[group[row]])
        keys = torch.cat([prompt_k[:, group[row], :, :seen], held_k[:, row, :, : written + 1]], -1).double()
        values = torch.cat([prompt_v[:, group[row], :seen], held_v[:, row, : written + 1]], 1).double()
        scores = query[:, row].double().view(2, 3, 80) @ keys * 0.2
        yield "attend", found[row].view(2, 3, 80), scores.softmax(-1) @ values


def _passes(draw: torch.Generator) -> Iterator[_Pair]:
    layout = loops.Layout.of([(0, 2, 0, 0, 0), (2, 3, 2, 0, 0), (5, 41, 2, 2, 3), (46, 5, 2, 2, 3)])
    seen = torch.ones(51, 51, dtype=torch.bool).tril()
    seen[46:, 5:46] = False
    query, grad = _drawn(draw, 2, 6, 51, 80)
    key, value = _drawn(draw, 2, 2, 51, 80)

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.repeat_interleave(3, 0).mT * 0.2
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 0)

    out, sums = loops.attend_pass(query, key, value, layout, 0.2)
    exact = _exact(attended, grad, query, key, value)
    slopes = loops.attend_pass_backward(grad.transpose(0, 1).contiguous(), query, key, value, out, sums, layout, 0.2)
    yield "attend_pass", out.transpose(0, 1), exact[0]
    for ours, wanted in zip(slopes, exact[1:], strict=True):
        yield "attend_pass's gradient", ours, wanted


def _statistics(draw: torch.Generator) -> Iterator[_Pair]:
    z, tokens, scale = 3 * _drawn(draw, 3, 150), torch.tensor([0, 77, 149]), 0.7
    logp = (z.double() * scale).log_softmax(-1)
    top = z.topk(5).indices
    named = torch.zeros(z.shape, dtype=torch.uint8).scatter_(-1, top, 1)
    grad = _drawn(draw, 3, 6)

    def bucketed(z: Tensor) -> Tensor:
        logp = (z * scale).log_softmax(-1)
        rest = logp.masked_fill(named.bool(), -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logp.gather(-1, top), rest], -1)

    out, rest, found = cpu_rows.buckets(z, tokens, scale, named, top)
    value, slope = _exact(bucketed, grad, z)
    yield "buckets", out, value
    yield "buckets' gradient", cpu_rows.buckets_gradient(z, scale, found.lse, rest, top, grad), slope
    exact = (z.double() * scale).logsumexp(-1), logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    for each in (found, cpu_rows.statistics(z, tokens, scale)):
        for name, ours, wanted in zip(each._fields, each, exact, strict=True):
            yield f"statistics: {name}", ours, wanted
    slope = _exact(lambda z: (z * scale).log_softmax(-1).gather(-1, tokens[:, None])[:, 0], grad[:, 0], z)[1]
    yield "sampled_gradient", cpu_rows.sampled_gradient(z, tokens, scale, found.lse, grad[:, 0]), slope


def _divergences(draw: torch.Generator) -> Iterator[_Pair]:
    s, t, tokens, weight = *(3 * _drawn(draw, 2, 3, 150)), torch.tensor([0, 77, 149]), 0.3
    grad, a, b = _drawn(draw, 3), 0.7, 1.0  # what multiplies either side's logits

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    def js(p: Tensor, q: Tensor) -> Tensor:
        mixed = torch.logaddexp(p + torch.tensor(weight).double().log(), q + torch.tensor(1 - weight).double().log())
        return weight * kl(p, mixed) + (1 - weight) * kl(q, mixed)

    def clipped(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).clamp(max=0.01).sum(-1)

    value, of_s, of_t = cpu_rows.kl(s, t, tokens, a, b)
    of_mixed = cpu_rows.js(s, t, a, b, of_s.lse, of_t.lse, weight)
    capped, mass = cpu_rows.clipped(t, s, b, a, of_t.lse, of_s.lse, 0.01)
    forms: dict[str, tuple[Tensor, Tensor, float, Callable[[Tensor, Tensor], Tensor]]] = {
        "kl_from": (value, value, 0.0, kl),
        "kl_to": (cpu_rows.kl(t, s, tokens, b, a)[0], value, 0.0, lambda s, t: kl(t, s)),
        "js": (weight * of_mixed[0] + (1 - weight) * of_mixed[1], of_mixed[0], weight, js),
        "clipped": (capped, mass, 0.01, lambda s, t: clipped(t, s)),
    }  # fmt: skip
    for kind, (ours, known, number, form) in forms.items():
        exact, slope, _ = _exact(lambda s, t, form=form: form((s * a).log_softmax(-1), (t * b).log_softmax(-1)), grad,
                                 s, t)
        yield kind, ours, exact
        found = cpu_rows.gradient(kind, s, t, a, b, of_s.lse, of_t.lse, grad, known, number)
        yield f"{kind}: gradient", found, slope
