"""What the kernels over rows of logits have in common: blocks of a row, and lanes that take them in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def row_block(z_ptr, stride, row, start, offsets, size, scale):
    """One block of a row, scaled; -inf beyond its end."""
    at = start + offsets
    z = tl.load(z_ptr + row * stride + at, mask=at < size, other=float("-inf"))
    return z * scale


@triton.jit
def offsets_of(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(BLOCK / LANES, LANES): a column is a lane, which lies in one thread."""
    return tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def finite(m):
    """A maximum to subtract: 0 where every logit was -inf, so that nothing is inf - inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def weighed(e, x):
    """e x, and 0 where e is 0: 0 inf is 0. NaN stays NaN, so that a step is refused."""
    return e * tl.where(e == 0, 0.0, x)


@triton.jit
def at_token(z_ptr, row_start, token, size):
    """The logit of a token; NaN of an id that the vocabulary does not have."""
    return tl.load(z_ptr + row_start + token, mask=(token >= 0) & (token < size), other=float("nan"))


@triton.jit
def moved(total, mass, fade, shift):
    """sum e^(z - high) (x - x_high), where mass is sum e^(z - high): high falls by log fade, and x_high by shift."""
    return weighed(fade, total + mass * shift)


@triton.jit
def added(high, mass, dot, z):
    """Lanes (LANES,) that take in a block: maximum, sum of e^(z - high), sum of e^(z - high) (z - high)."""
    higher = tl.maximum(high, tl.max(z, 0))
    x, shift = z - higher[None, :], high - higher
    e, fade = tl.exp(x), tl.exp(shift)
    return higher, mass * fade + tl.sum(e, 0), moved(dot, mass, fade, shift) + tl.sum(weighed(e, x), 0)


@triton.jit
def joined(high, mass, dot):
    """The same three of a row, from those of its lanes."""
    top = tl.max(high, 0)
    shift = high - top
    fade = tl.exp(shift)
    return top, tl.sum(mass * fade, 0), tl.sum(moved(dot, mass, fade, shift), 0)


@triton.jit
def log_mean(a, b, weight):
    """log(weight e^a + (1 - weight) e^b), -inf where both are."""
    high = finite(tl.maximum(a, b))
    return high + tl.log(weight * tl.exp(a - high) + (1 - weight) * tl.exp(b - high))


@triton.jit
def raised(x, low):
    """At least `low`. NaN stays NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def times(share, x):
    """share x, and 0 where the share is 0: P^0 is 1, also of P = 0."""
    return tl.where(share == 0, 0.0, share * x)


@triton.jit
def blended(s, t, r, share, low):
    """log T^(1 - share) R^share of log-probs raised to `low`; -inf where S holds it to be impossible too."""
    out = times(1 - share, raised(t, low)) + times(share, raised(r, low))
    impossible = float("-inf")
    return tl.where((s == impossible) & (t == impossible) & (r == impossible), impossible, out)


@triton.jit
def nothing(out_ptr, row, size, offsets, BLOCK: tl.constexpr):
    """A row of zeros."""
    for start in range(0, size, BLOCK):
        at = start + offsets
        tl.store(out_ptr + row * size + at, tl.zeros([BLOCK], dtype=tl.float32), mask=at < size)
