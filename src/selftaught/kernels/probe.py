"""Every compiled loop beside torch's operators in float64, on a few drawn numbers: asked once, before any is used.

Compilers err, and a processor may not be what its flags say; a loop that counts wrong would teach a model nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from selftaught.kernels import cpu_rows, layer, loops, passes
from selftaught.kernels.base import Side

CLOSE = 2e-5  # of the largest number of a result
_Pair = tuple[str, Tensor, Tensor]


def check() -> None:
    """Raises RuntimeError where a loop's numbers are not torch's."""
    draw = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):  # wherever the first caller may be
        for part in (_layers, _decoding, _decoded_layer, _stacked, _passes, _whole_layer, _statistics, _divergences):
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
    rows, below = x.clone().view(-1, 72), up.view(-1, 72)
    for added, exact in ((None, value), (below, _norm(x.double() + up, weight.double()))):
        ours, inverse = layer.normed(rows, weight, 1e-6, added)
        yield "normed", ours, exact.view(-1, 72)
        yield "normed's root", inverse, torch.rsqrt(rows.double().square().mean(-1, keepdim=True) + 1e-6)
    yield "normed's sum", rows, (x.double() + up).view(-1, 72)
    for name, ours, exact in zip(("of x", "of w"), loops.norm_backward(grad, x, weight, root), (of_x, of_weight),
                                 strict=True):
        yield f"norm's gradient {name}", ours, exact
    yield "norm's gradient on top", loops.norm_backward(grad, x, weight, root, up)[0], of_x + up
    value, *slopes = _exact(lambda g, u: silu(g) * u, grad, x, up)
    halves = torch.cat([x, up], -1)
    for joined in (None, torch.empty_like(halves)):  # each by itself, and halves of one matrix
        (gated, raised), again = (x, up) if joined is None else halves.chunk(2, -1), grad.clone()
        yield "gate", loops.gate(gated, raised), value
        for ours, exact in zip(loops.gate_backward(gated, raised, again, joined), slopes, strict=True):
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
    yield "rotate in place", loops.rotate(heads.clone(), cos, sin, inplace=True), value
    yield "rotate's gradient in place", loops.rotate(grad.clone(), cos, sin, back=True, inplace=True), of_x


def _decoding(draw: torch.Generator) -> Iterator[_Pair]:
    for columns in (5, 16):
        x, weight, bias = _drawn(draw, 40, columns), _drawn(draw, 19, 40), _drawn(draw, 19)
        gated, residual = _drawn(draw, 2, 19, columns)
        exact = silu(gated.double()) * (weight.double() @ x.double() + bias[:, None]) + residual
        yield "product", loops.product(x, weight, bias, gated, residual), exact
        yield "norm_turned", layer.norm_turned(x, weight[0], 1e-6, 1.0), _norm(x.double().mT, weight[0].double() + 1).mT
        heads, angles = _drawn(draw, 3, 8, columns), _drawn(draw, 2, columns, 8)
        yield "rotate_turned", layer.rotate_turned(heads, *angles), _rotated(heads.double().mT, *angles.double())
    for rows in (33, 71):
        x, weight, bias = _drawn(draw, rows, 40), _drawn(draw, 53, 40), _drawn(draw, 53)
        yield "logits", loops.logits(x, weight, bias), x.double() @ weight.double().mT + bias
    query, key, value = _drawn(draw, 6, 3, 80), _drawn(draw, 2, 3, 80), _drawn(draw, 2, 3, 80)
    prompt_k, prompt_v = _drawn(draw, 2, 2, 80, loops.BLOCK), _drawn(draw, 2, 2, 9, 80)
    held_k, held_v = _drawn(draw, 2, 3, 80, loops.BLOCK), _drawn(draw, 2, 3, loops.BLOCK, 80)
    group, length, written = torch.tensor([0, 1, 1]), torch.tensor([9, 4]), 3
    for window in (None, 7):
        found = loops.attend(query, key, value, prompt_k, prompt_v, held_k, held_v, group, length, written, window, 0.2)
        for row in range(3):
            seen = int(length[group[row]])
            keys = torch.cat([prompt_k[:, group[row], :, :seen], held_k[:, row, :, : written + 1]], -1).double()
            values = torch.cat([prompt_v[:, group[row], :seen], held_v[:, row, : written + 1]], 1).double()
            keys, values = keys[..., -(window or 99) :], values[:, -(window or 99) :]
            scores = query[:, row].double().view(2, 3, 80) @ keys * 0.2
            yield "attend", found[row].view(2, 3, 80), scores.softmax(-1) @ values


def _decoded_layer(draw: torch.Generator) -> Iterator[_Pair]:
    for columns in (5, 16, 19):
        x, seen, (cos, sin) = _drawn(draw, 40, columns), _drawn(draw, columns, 24), _drawn(draw, 2, columns, 8)
        norm, between, *of_heads = (layer.Norm(_drawn(draw, size), 1e-6, 1.0) for size in (40, 40, 8, 8))
        linears = [layer.Linear(_drawn(draw, 8 * heads, 40), _drawn(draw, 8 * heads)) for heads in (3, 2, 2)]
        out, gate, up, down = (_drawn(draw, *shape) for shape in ((40, 24), (19, 40), (19, 40), (40, 19)))
        normed = _norm(x.double().mT, norm.weight.double() + 1)
        parts = layer.Parts(norm, linears, of_heads, layer.Linear(out, None), between, gate, up, down)
        for i, ours in enumerate(layer.before(x, parts, cos, sin)):
            weight, bias = linears[i]
            exact = (normed @ weight.double().mT + (0 if bias is None else bias)).unflatten(-1, (-1, 8)).transpose(0, 1)
            if i < 2:
                exact = _rotated(_norm(exact, of_heads[i].weight.double() + 1), cos, sin)
            yield "a layer before its attention", ours, exact
        middle = x.double().mT + seen.double() @ out.double().mT
        normed = _norm(middle, between.weight.double() + 1)
        inner = silu(normed @ gate.double().mT) * (normed @ up.double().mT)
        found = layer.after(seen, x, parts)
        yield "a layer after it", found.mT, middle + inner @ down.double().mT


def _stacked(draw: torch.Generator) -> Iterator[_Pair]:
    """Two layers in one call, beside each by its own calls, which were looked at before."""
    x, (cos, sin), window = _drawn(draw, 40, 5), _drawn(draw, 2, 5, 16), 6
    group, length, prompt, written = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([9, 4]), (2, 2, 16), 3
    layers, held = list[tuple[layer.Parts, float, int | None]](), list[loops.Held]()
    for _ in range(2):
        norm, between = (layer.Norm(_drawn(draw, 40), 1e-6, 0.0) for _ in range(2))
        linears = [layer.Linear(_drawn(draw, 16 * heads, 40) / 6, None) for heads in (4, 2, 2)]
        mlp = (_drawn(draw, *shape) / 6 for shape in ((19, 40), (19, 40), (40, 19)))
        layers.append((layer.Parts(norm, linears, [], layer.Linear(_drawn(draw, 40, 64) / 8, None), between, *mlp), 0.2,
                       window))
        held.append(loops.Held(_drawn(draw, *prompt, loops.BLOCK), _drawn(draw, 2, 2, 9, 16),
                               _drawn(draw, 2, 5, 16, loops.BLOCK), _drawn(draw, 2, 5, loops.BLOCK, 16), group, length))
    ours, exact = layer.Stack(layers, held, 16).step(x, cos, sin, written), x
    for (parts, scaling, _), its in zip(layers, held, strict=True):
        query, key, value = layer.before(exact, parts, cos, sin)
        seen = loops.attend(query, key, value, *its, written, window, scaling)
        exact = layer.after(seen.flatten(1), exact, parts)
    yield "layers in one call", ours, exact.double()


_SEQUENCES = [(0, 2, 0, 0, 0), (2, 3, 2, 0, 0), (5, 41, 2, 2, 3), (46, 5, 2, 2, 3)]  # of a packed pass


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of these sequences, three query heads to a key's: (Hq, T, D)."""
    seen = torch.ones(51, 51, dtype=torch.bool).tril()
    seen[46:, 5:46] = False
    scores = query @ key.repeat_interleave(3, 0).mT * 0.2
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 0)


def _passes(draw: torch.Generator) -> Iterator[_Pair]:
    layout = passes.Layout.of(_SEQUENCES)
    query, grad = _drawn(draw, 2, 6, 51, 80)
    key, value = _drawn(draw, 2, 2, 51, 80)
    out, sums = passes.attend_pass(query, key, value, layout, 0.2)
    exact = _exact(_attended, grad, query, key, value)
    yield "attend_pass", out.transpose(0, 1), exact[0]
    for joined in (None, query.new_empty(51, 10, 80)):
        slopes = passes.attend_pass_backward(
            grad.transpose(0, 1).contiguous(), query, key, value, out, sums, layout, 0.2, joined)
        for ours, wanted in zip(slopes, exact[1:], strict=True):
            yield "attend_pass's gradient", ours, wanted


def _whole_layer(draw: torch.Generator) -> Iterator[_Pair]:
    if not passes.take_layers():
        return
    layout, shape = passes.Layout.of(_SEQUENCES), passes.Shape((1e-6, 1e-6), (6, 2), 16, 0.2)
    (x, grad), (cos, sin) = _drawn(draw, 2, 51, 40), _drawn(draw, 2, 51, 16)
    sizes = (40,), (40,), (160, 40), (40, 96), (2 * 19, 40), (40, 19)
    weights = passes.Weights(*(_drawn(draw, *size) / (1 if len(size) == 1 else 6) for size in sizes))

    def layer_of(x: Tensor, norm: Tensor, between: Tensor, heads: Tensor, out: Tensor, inner: Tensor, down: Tensor
                 ) -> Tensor:
        query, key, value = (_norm(x, norm) @ heads.mT).unflatten(-1, (-1, 16)).transpose(0, 1).split((6, 2, 2))
        seen = _attended(_rotated(query, cos, sin), _rotated(key, cos, sin), value)
        middle = x + seen.transpose(0, 1).flatten(1) @ out.mT
        gated, raised = (_norm(middle, between) @ inner.mT).chunk(2, -1)
        return middle + (silu(gated) * raised) @ down.mT

    exact, of_x, *slopes = _exact(layer_of, grad, x, *weights)
    for keeps in (False, True):
        ours, kept = passes.forward(x, cos, sin, weights, layout, shape, keeps)
        yield "a layer in one call", ours, exact
    assert kept is not None
    before = [_drawn(draw, *size) for size in sizes[2:]]
    for adds in (False, True):
        into = [(x.clone(), adds) for x in before]
        found = passes.backward(grad, x, cos, sin, weights, kept, layout, shape, into)
        for ours, wanted in zip(found, (of_x, *slopes[:2]), strict=True):
            yield "its gradient", ours, wanted
        for (ours, _), known, wanted in zip(into, before, slopes[2:], strict=True):
            yield "its weights' gradient", ours, wanted + known if adds else wanted


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

    for low in (-torch.inf, -4.0):  # which some log-probs are below
        yield from _three_sides(draw, low)
    value, of_s, of_t = cpu_rows.kl(s, t, tokens, a, b)
    of_mixed = cpu_rows.js(s, t, a, b, of_s.lse, of_t.lse, weight, -torch.inf)
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


def _three_sides(draw: torch.Generator, low: float) -> Iterator[_Pair]:
    drawn, grad = 3 * _drawn(draw, 3, 3, 150), _drawn(draw, 3)
    share = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float32)
    scales = 0.7, 1.0, 1.2
    s, t, r = (Side(z, scale, (z * scale).logsumexp(-1)) for z, scale in zip(drawn, scales, strict=True))

    def log_probs(z: Tensor, scale: float) -> Tensor:
        return (z * scale).log_softmax(-1)

    raised = [log_probs(side.logits.double(), side.scale).clamp(min=low) for side in (t, r)]

    def to_barycenter(s: Tensor) -> Tensor:
        logp = log_probs(s, scales[0])
        blend = (1 - share[:, None]).double() * raised[0] + share[:, None].double() * raised[1]
        return (logp.exp() * (logp - blend.log_softmax(-1))).sum(-1)

    value, log_mass = cpu_rows.blend(s, t, r, share, low)
    exact, slope = _exact(to_barycenter, grad, s.logits)
    yield "blend", value, exact
    yield "blend: gradient", cpu_rows.blend_gradient(s, t, r, share, low, value, log_mass, grad), slope
    mixed = torch.logaddexp(*raised) - torch.tensor(2.0).double().log()
    found = cpu_rows.js(t.logits, r.logits, t.scale, r.scale, t.lse, r.lse, 0.5, low)
    for ours, side in zip(found, raised, strict=True):
        yield "js, raised", ours, (side.exp() * (side - mixed)).sum(-1)
