"""Triton kernels over rows of logits: one program per row, which reads it block by block and never stores it again.

Everything is in float32 and in nats. `scale` multiplies logits as they are read (1 / temperature). P and Q are
softmaxes of logits; a token of probability 0 under P adds 0 to KL(P||Q), one that is impossible under Q alone makes it
infinite. A row of a divergence whose incoming gradient is 0 gets a gradient of 0 and is not read: an infinite loss
that nobody weighs stays nobody's. Maxima and masses are kept up while a row is read (online softmax, arXiv 1805.02867),
each lane its own, as warps that wait for one another's maxima leave the memory idle; lanes are joined at the row's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selftaught.kernels.base import Side, Statistics
from selftaught.kernels.lanes import (
    LOWEST,
    added,
    at_token,
    blended,
    finite,
    joined,
    log_mean,
    moved,
    nothing,
    offsets_of,
    raised,
    row_block,
    weighed,
)  # fmt: skip

BLOCK = 4096  # logits that a program holds at a time
WARPS = 8
VECTOR = 4  # of them, those that a thread reads at once: 16 bytes


def check(device: torch.device) -> None:
    """Raises RuntimeError where KL(P||Q) and its gradient are not torch's, on a few drawn logits."""
    p, q = 3 * torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.tensor([7, 299], device=device)
    value, of_p, of_q = kl(p, q, tokens, 1.0, 1.0)
    found = gradient("kl_to", q, p, 1.0, 1.0, of_q.lse, of_p.lse, torch.ones_like(value), value)
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    for name, ours, torchs in (("KL", value, (logp.exp() * (logp - logq)).sum(-1)),
                               ("its gradient", found, logq.exp() - logp.exp()),
                               ("entropy", of_p.entropy, -(logp.exp() * logp).sum(-1)),
                               ("log-prob", of_q.logp, logq.gather(-1, tokens[:, None])[:, 0])):
        gap = float((ours - torchs).abs().max())
        if not gap < 1e-4:
            raise RuntimeError(f"{name} is {gap:.1e} from what it should be")


# ------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def _statistics(z_ptr, stride, scale, tokens_ptr, size, lse_ptr, logp_ptr, entropy_ptr, BLOCK: tl.constexpr,
                LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = offsets_of(BLOCK, LANES)
    high = tl.full((LANES,), LOWEST, tl.float32)  # finite: a lane that sees only -inf has no mass, and no inf - inf
    mass = tl.full((LANES,), 0.0, tl.float32)
    dot = mass
    for start in range(0, size, BLOCK):
        high, mass, dot = added(high, mass, dot, row_block(z_ptr, stride, row, start, offsets, size, scale))
    high, mass, dot = joined(high, mass, dot)
    lse = high + tl.log(mass)
    token = tl.load(tokens_ptr + row)
    tl.store(lse_ptr + row, lse)
    tl.store(logp_ptr + row, at_token(z_ptr, row * stride, token, size) * scale - lse)
    tl.store(entropy_ptr + row, tl.log(mass) - dot / mass)


def _shape(block: int) -> dict[str, int]:
    """Of a program with lanes: as many as its threads read at once, so that what a lane adds up crosses no threads."""
    return {"BLOCK": block, "LANES": min(block, 32 * WARPS * VECTOR), "num_warps": WARPS}


def statistics(logits_nV: Tensor, tokens_n: Tensor, scale: float) -> Statistics:
    """One read of the logits."""
    lse, logp, entropy = (logits_nV.new_empty(logits_nV.shape[0]) for _ in range(3))
    _statistics[(logits_nV.shape[0],)](
        logits_nV, logits_nV.stride(0), scale, tokens_n.contiguous(), logits_nV.shape[1], lse, logp, entropy,
        **_shape(BLOCK))
    return Statistics(lse, logp, entropy)


@triton.jit
def _buckets(z_ptr, stride, scale, tokens_ptr, size, mask_ptr, top_ptr, k, lse_ptr, logp_ptr, entropy_ptr, rest_ptr,
             out_ptr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = offsets_of(BLOCK, LANES)
    high = tl.full((LANES,), LOWEST, tl.float32)
    mass = tl.full((LANES,), 0.0, tl.float32)
    dot = mass
    for start in range(0, size, BLOCK):
        z = row_block(z_ptr, stride, row, start, offsets, size, scale)
        at = tl.max_contiguous(start + offsets, [1, 4])  # 16 bytes at once, and a lane would be many threads'
        named = tl.load(mask_ptr + row * size + at, mask=at < size, other=1)
        high, mass, dot = added(high, mass, dot, tl.where(named == 0, z, float("-inf")))
    rest_high, rest, _ = joined(high, mass, dot)
    rest = rest_high + tl.log(rest)
    few = tl.arange(0, LANES)  # the top comes last, as all others may lie far below it
    for start in range(0, k, LANES):
        index = tl.load(top_ptr + row * k + start + few, mask=start + few < k, other=-1)
        z = tl.load(z_ptr + row * stride + index, mask=index >= 0, other=float("-inf")) * scale
        high, mass, dot = added(high, mass, dot, z[None, :])
    high, mass, dot = joined(high, mass, dot)
    lse = high + tl.log(mass)
    for start in range(0, k, LANES):
        index = tl.load(top_ptr + row * k + start + few, mask=start + few < k, other=-1)
        z = tl.load(z_ptr + row * stride + index, mask=index >= 0, other=0.0) * scale
        tl.store(out_ptr + row * (k + 1) + start + few, z - lse, mask=index >= 0)
    token = tl.load(tokens_ptr + row)
    tl.store(out_ptr + row * (k + 1) + k, rest - lse)
    tl.store(rest_ptr + row, rest)
    tl.store(lse_ptr + row, lse)
    tl.store(logp_ptr + row, at_token(z_ptr, row * stride, token, size) * scale - lse)
    tl.store(entropy_ptr + row, tl.log(mass) - dot / mass)


def buckets(logits_nV: Tensor, tokens_n: Tensor, scale: float, named_nV: Tensor, top_nk: Tensor
            ) -> tuple[Tensor, Tensor, Statistics]:
    """Log-probs (n, k + 1) of the top and of all others together, and the log-sum-exp (n,) of the others' logits.

    `named`, of bytes, is 1 at the top's tokens and 0 elsewhere. One read of the logits.
    """
    n, k = top_nk.shape
    lse, logp, entropy, rest = (logits_nV.new_empty(n) for _ in range(4))
    out = logits_nV.new_empty(n, k + 1)
    _buckets[(n,)](logits_nV, logits_nV.stride(0), scale, tokens_n.contiguous(), logits_nV.shape[1], named_nV,
                   top_nk.contiguous(), k, lse, logp, entropy, rest, out, **_shape(BLOCK))
    return out, rest, Statistics(lse, logp, entropy)


# ----------------------------------------------------------------------------------------------------------- values


@triton.jit
def _kl(p_ptr, p_stride, p_scale, q_ptr, q_stride, q_scale, tokens_ptr, size, kl_ptr, p_lse_ptr, p_logp_ptr,
        p_entropy_ptr, q_lse_ptr, q_logp_ptr, q_entropy_ptr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = offsets_of(BLOCK, LANES)
    p_high = tl.full((LANES,), LOWEST, tl.float32)
    q_high = p_high
    p_mass = tl.full((LANES,), 0.0, tl.float32)
    q_mass, p_dot, q_dot = p_mass, p_mass, p_mass
    gap = p_mass  # sum of e^(p - p_high) ((p - p_high) - (q - q_high)): of equal sides 0, however it is rounded
    for start in range(0, size, BLOCK):
        p = row_block(p_ptr, p_stride, row, start, offsets, size, p_scale)
        q = row_block(q_ptr, q_stride, row, start, offsets, size, q_scale)
        p_higher, q_higher = tl.maximum(p_high, tl.max(p, 0)), tl.maximum(q_high, tl.max(q, 0))
        p_shift, q_shift = p_high - p_higher, q_high - q_higher
        p_fade, q_fade = tl.exp(p_shift), tl.exp(q_shift)
        p_x, q_x = p - p_higher[None, :], q - q_higher[None, :]
        p_e, q_e = tl.exp(p_x), tl.exp(q_x)
        gap = moved(gap, p_mass, p_fade, p_shift - q_shift) + tl.sum(weighed(p_e, p_x - q_x), 0)
        p_dot = moved(p_dot, p_mass, p_fade, p_shift) + tl.sum(weighed(p_e, p_x), 0)
        q_dot = moved(q_dot, q_mass, q_fade, q_shift) + tl.sum(weighed(q_e, q_x), 0)
        p_mass, q_mass = p_mass * p_fade + tl.sum(p_e, 0), q_mass * q_fade + tl.sum(q_e, 0)
        p_high, q_high = p_higher, q_higher
    p_top, q_top = tl.max(p_high, 0), tl.max(q_high, 0)
    p_shift, q_shift = p_high - p_top, q_high - q_top
    p_fade, q_fade = tl.exp(p_shift), tl.exp(q_shift)
    gap = tl.sum(moved(gap, p_mass, p_fade, p_shift - q_shift), 0)
    p_dot = tl.sum(moved(p_dot, p_mass, p_fade, p_shift), 0)
    q_dot = tl.sum(moved(q_dot, q_mass, q_fade, q_shift), 0)
    p_mass, q_mass = tl.sum(p_mass * p_fade, 0), tl.sum(q_mass * q_fade, 0)
    token = tl.load(tokens_ptr + row)
    p_lse, q_lse = p_top + tl.log(p_mass), q_top + tl.log(q_mass)
    tl.store(kl_ptr + row, gap / p_mass + (tl.log(q_mass) - tl.log(p_mass)))
    tl.store(p_lse_ptr + row, p_lse)
    tl.store(q_lse_ptr + row, q_lse)
    tl.store(p_logp_ptr + row, at_token(p_ptr, row * p_stride, token, size) * p_scale - p_lse)
    tl.store(q_logp_ptr + row, at_token(q_ptr, row * q_stride, token, size) * q_scale - q_lse)
    tl.store(p_entropy_ptr + row, tl.log(p_mass) - p_dot / p_mass)
    tl.store(q_entropy_ptr + row, tl.log(q_mass) - q_dot / q_mass)


def kl(p_nV: Tensor, q_nV: Tensor, tokens_n: Tensor, p_scale: float, q_scale: float
       ) -> tuple[Tensor, Statistics, Statistics]:
    """KL(P||Q) (n,), and the statistics of both: one read of each."""
    out, *each = (p_nV.new_empty(p_nV.shape[0]) for _ in range(7))
    _kl[(p_nV.shape[0],)](p_nV, p_nV.stride(0), p_scale, q_nV, q_nV.stride(0), q_scale,
                          tokens_n.contiguous(), p_nV.shape[1], out, *each, **_shape(BLOCK // 2))
    return out, Statistics(*each[:3]), Statistics(*each[3:])


@triton.jit
def _js(p_ptr, p_stride, p_scale, p_lse_ptr, q_ptr, q_stride, q_scale, q_lse_ptr, size, weight, low, p_kl_ptr, q_kl_ptr,
        BLOCK: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = offsets_of(BLOCK, LANES)
    p_lse, q_lse = tl.load(p_lse_ptr + row), tl.load(q_lse_ptr + row)
    p_kl = tl.full((LANES,), 0.0, tl.float32)
    q_kl = p_kl
    for start in range(0, size, BLOCK):
        p = raised(row_block(p_ptr, p_stride, row, start, offsets, size, p_scale) - p_lse, low)
        q = raised(row_block(q_ptr, q_stride, row, start, offsets, size, q_scale) - q_lse, low)
        m = log_mean(p, q, weight)
        p_kl += tl.sum(weighed(tl.exp(p), p - m), 0)
        q_kl += tl.sum(weighed(tl.exp(q), q - m), 0)
    tl.store(p_kl_ptr + row, tl.sum(p_kl, 0))
    tl.store(q_kl_ptr + row, tl.sum(q_kl, 0))


def js(p_nV: Tensor, q_nV: Tensor, p_scale: float, q_scale: float, p_lse: Tensor, q_lse: Tensor, weight: float,
       low: float) -> tuple[Tensor, Tensor]:
    """KL(P||M) and KL(Q||M), (n,) each, M = weight P + (1 - weight) Q, of log-probs that are raised to `low` first."""
    p_kl, q_kl = torch.empty_like(p_lse), torch.empty_like(p_lse)
    _js[(p_nV.shape[0],)](p_nV, p_nV.stride(0), p_scale, p_lse, q_nV, q_nV.stride(0), q_scale, q_lse, p_nV.shape[1],
                          weight, low, p_kl, q_kl, **_shape(BLOCK // 2))
    return p_kl, q_kl


@triton.jit
def _clipped(p_ptr, p_stride, p_scale, p_lse_ptr, q_ptr, q_stride, q_scale, q_lse_ptr, size, clip, out_ptr, mass_ptr,
             BLOCK: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = offsets_of(BLOCK, LANES)
    p_lse, q_lse = tl.load(p_lse_ptr + row), tl.load(q_lse_ptr + row)
    out = tl.full((LANES,), 0.0, tl.float32)
    mass = out
    for start in range(0, size, BLOCK):
        p = row_block(p_ptr, p_stride, row, start, offsets, size, p_scale) - p_lse
        q = row_block(q_ptr, q_stride, row, start, offsets, size, q_scale) - q_lse
        e = tl.exp(p)
        term = weighed(e, p - q)
        out += tl.sum(tl.where(term > clip, clip, term), 0)
        mass += tl.sum(tl.where(term > clip, 0.0, e), 0)
    tl.store(out_ptr + row, tl.sum(out, 0))
    tl.store(mass_ptr + row, tl.sum(mass, 0))


def clipped(p_nV: Tensor, q_nV: Tensor, p_scale: float, q_scale: float, p_lse: Tensor, q_lse: Tensor, clip: float
            ) -> tuple[Tensor, Tensor]:
    """sum_v min(P_v log(P_v / Q_v), clip), and the mass of P whose summands are not capped: (n,) each."""
    out, mass = torch.empty_like(p_lse), torch.empty_like(p_lse)
    _clipped[(p_nV.shape[0],)](p_nV, p_nV.stride(0), p_scale, p_lse, q_nV, q_nV.stride(0), q_scale, q_lse,
                               p_nV.shape[1], clip, out, mass, **_shape(BLOCK // 2))
    return out, mass


@triton.jit
def _blend(s_ptr, s_stride, s_scale, s_lse_ptr, t_ptr, t_stride, t_scale, t_lse_ptr, r_ptr, r_stride, r_scale,
           r_lse_ptr, share_ptr, low, size, kl_ptr, mass_ptr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = offsets_of(BLOCK, LANES)
    s_lse, t_lse, r_lse = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row), tl.load(r_lse_ptr + row)
    share = tl.load(share_ptr + row)
    high = tl.full((LANES,), LOWEST, tl.float32)
    mass = tl.full((LANES,), 0.0, tl.float32)
    gap = mass
    for start in range(0, size, BLOCK):
        s = row_block(s_ptr, s_stride, row, start, offsets, size, s_scale) - s_lse
        t = row_block(t_ptr, t_stride, row, start, offsets, size, t_scale) - t_lse
        r = row_block(r_ptr, r_stride, row, start, offsets, size, r_scale) - r_lse
        b = blended(s, t, r, share, low)
        higher = tl.maximum(high, tl.max(b, 0))
        mass = mass * tl.exp(high - higher) + tl.sum(tl.exp(b - higher[None, :]), 0)
        gap += tl.sum(weighed(tl.exp(s), s - b), 0)
        high = higher
    top = tl.max(high, 0)
    log_mass = top + tl.log(tl.sum(mass * tl.exp(high - top), 0))
    tl.store(kl_ptr + row, tl.sum(gap, 0) + log_mass)
    tl.store(mass_ptr + row, log_mass)


def blend(s: Side, t: Side, r: Side, share_n: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """KL(S||B), B proportional to T^(1 - share) R^share of log-probs raised to `low`, and the log of B's mass: (n,)."""
    value, log_mass = torch.empty_like(s.lse), torch.empty_like(s.lse)
    _blend[(s.logits.shape[0],)](*s.given, *t.given, *r.given, share_n.contiguous(), low, s.logits.shape[1], value,
                                log_mass, **_shape(BLOCK // 2))
    return value, log_mass


# -------------------------------------------------------------------------------------------------------- gradients


@triton.jit
def _gradient(s_ptr, s_stride, s_scale, s_lse_ptr, t_ptr, t_stride, t_scale, t_lse_ptr, size, grad_ptr, known_ptr,
              number, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + row)
    if grad == 0:
        nothing(out_ptr, row, size, offsets, BLOCK)
    else:
        s_lse, t_lse, known = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row), tl.load(known_ptr + row)
        grad = grad * s_scale
        for start in range(0, size, BLOCK):
            at = start + offsets
            s = row_block(s_ptr, s_stride, row, start, offsets, size, s_scale) - s_lse
            t = row_block(t_ptr, t_stride, row, start, offsets, size, t_scale) - t_lse
            if KIND == "kl_to":  # KL(T||S)
                out = tl.exp(s) - tl.exp(t)
            elif KIND == "kl_from":  # KL(S||T), which is `known`
                out = weighed(tl.exp(s), s - t - known)
            elif KIND == "js":  # `number` is the weight of S, `known` KL(S||M)
                out = number * weighed(tl.exp(s), s - log_mean(s, t, number) - known)
            else:  # KL(T||S) with summands capped at `number`, `known` the mass of those that are not
                e = tl.exp(t)
                out = tl.exp(s) * known - tl.where(weighed(e, t - s) > number, 0.0, e)
            tl.store(out_ptr + row * size + at, out * grad, mask=at < size)


def gradient(kind: str, s_nV: Tensor, t_nV: Tensor, s_scale: float, t_scale: float, s_lse: Tensor, t_lse: Tensor,
             grad_n: Tensor, known_n: Tensor, number: float = 0.0) -> Tensor:
    """(n, V), in the logits of S, of a divergence between S and a constant T; the kinds stand in the kernel."""
    out = torch.empty(s_nV.shape, dtype=s_nV.dtype, device=s_nV.device)
    _gradient[(s_nV.shape[0],)](s_nV, s_nV.stride(0), s_scale, s_lse, t_nV, t_nV.stride(0), t_scale, t_lse,
                                s_nV.shape[1], grad_n.contiguous(), known_n, number, out, KIND=kind, BLOCK=BLOCK // 2,
                                num_warps=WARPS)
    return out


@triton.jit
def _sampled_gradient(z_ptr, stride, scale, lse_ptr, tokens_ptr, size, grad_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    grad, lse, token = tl.load(grad_ptr + row) * scale, tl.load(lse_ptr + row), tl.load(tokens_ptr + row)
    for start in range(0, size, BLOCK):
        at = start + offsets
        p = tl.exp(row_block(z_ptr, stride, row, start, offsets, size, scale) - lse)
        tl.store(out_ptr + row * size + at, grad * (tl.where(at == token, 1.0, 0.0) - p), mask=at < size)


def sampled_gradient(logits_nV: Tensor, tokens_n: Tensor, scale: float, lse: Tensor, grad_n: Tensor) -> Tensor:
    """grad (1[v = token] - p_v), (n, V): of the sampled tokens' log-probs in the logits."""
    out = torch.empty(logits_nV.shape, dtype=logits_nV.dtype, device=logits_nV.device)
    _sampled_gradient[(logits_nV.shape[0],)](logits_nV, logits_nV.stride(0), scale, lse, tokens_n.contiguous(),
                                             logits_nV.shape[1], grad_n.contiguous(), out, BLOCK=BLOCK, num_warps=WARPS)
    return out


@triton.jit
def _buckets_gradient(z_ptr, stride, scale, lse_ptr, rest_ptr, top_ptr, k, size, grad_ptr, out_ptr,
                      BLOCK: tl.constexpr, FEW: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets, few = tl.arange(0, BLOCK), tl.arange(0, FEW)
    lse, rest = tl.load(lse_ptr + row), finite(tl.load(rest_ptr + row))
    tail = tl.load(grad_ptr + row * (k + 1) + k) * scale
    total = tl.zeros([FEW], dtype=tl.float32)
    for start in range(0, k, FEW):
        total += tl.load(grad_ptr + row * (k + 1) + start + few, mask=start + few < k, other=0.0)
    total = tl.sum(total, 0) * scale + tail
    for start in range(0, size, BLOCK):
        at = start + offsets
        z = row_block(z_ptr, stride, row, start, offsets, size, scale)
        tl.store(out_ptr + row * size + at, tail * tl.exp(z - rest) - total * tl.exp(z - lse), mask=at < size)
    tl.debug_barrier()  # what other threads have written of the top is wrong, and gets written over
    for start in range(0, k, FEW):
        at = start + few
        index = tl.load(top_ptr + row * k + at, mask=at < k, other=0)
        z = tl.load(z_ptr + row * stride + index, mask=at < k, other=0.0) * scale
        grad = tl.load(grad_ptr + row * (k + 1) + at, mask=at < k, other=0.0) * scale
        tl.store(out_ptr + row * size + index, grad - total * tl.exp(z - lse), mask=at < k)


def buckets_gradient(logits_nV: Tensor, scale: float, lse: Tensor, rest: Tensor, top_nk: Tensor, grad: Tensor
                     ) -> Tensor:
    """(n, V), of the buckets (n, k + 1), whose own gradient is `grad`."""
    out = torch.empty(logits_nV.shape, dtype=logits_nV.dtype, device=logits_nV.device)
    _buckets_gradient[(logits_nV.shape[0],)](logits_nV, logits_nV.stride(0), scale, lse, rest, top_nk.contiguous(),
                                             top_nk.shape[1], logits_nV.shape[1], grad.contiguous(), out, BLOCK=BLOCK,
                                             FEW=32 * WARPS, num_warps=WARPS)
    return out


@triton.jit
def _blend_gradient(s_ptr, s_stride, s_scale, s_lse_ptr, t_ptr, t_stride, t_scale, t_lse_ptr, r_ptr, r_stride, r_scale,
                    r_lse_ptr, share_ptr, low, size, kl_ptr, mass_ptr, grad_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + row)
    if grad == 0:
        nothing(out_ptr, row, size, offsets, BLOCK)
    else:
        s_lse, t_lse, r_lse = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row), tl.load(r_lse_ptr + row)
        share, less = tl.load(share_ptr + row), tl.load(kl_ptr + row) - tl.load(mass_ptr + row)
        grad = grad * s_scale
        for start in range(0, size, BLOCK):
            at = start + offsets
            s = row_block(s_ptr, s_stride, row, start, offsets, size, s_scale) - s_lse
            t = row_block(t_ptr, t_stride, row, start, offsets, size, t_scale) - t_lse
            r = row_block(r_ptr, r_stride, row, start, offsets, size, r_scale) - r_lse
            out = weighed(tl.exp(s), s - blended(s, t, r, share, low) - less)
            tl.store(out_ptr + row * size + at, out * grad, mask=at < size)


def blend_gradient(s: Side, t: Side, r: Side, share_n: Tensor, low: float, value: Tensor, log_mass: Tensor,
                   grad_n: Tensor) -> Tensor:
    """(n, V), in the logits of S, of what `blend` has found; B is constant."""
    out = torch.empty(s.logits.shape, dtype=s.logits.dtype, device=s.logits.device)
    _blend_gradient[(s.logits.shape[0],)](*s.given, *t.given, *r.given, share_n.contiguous(), low, s.logits.shape[1],
                                         value, log_mass, grad_n.contiguous(), out, BLOCK=BLOCK // 2, num_warps=WARPS)
    return out
