"""Compiled loops over rows of logits on a CPU, by `cpu/rows.c`: the functions of `rows`, by the same names.

What each one takes and returns is said there.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from selftaught.heap import again
from selftaught.kernels.base import Side, Statistics
from selftaught.kernels.loops import library

KINDS = ("kl_to", "kl_from", "js", "clipped")  # as in cpu/rows.c


def statistics(logits_nV: Tensor, tokens_n: Tensor, scale: float) -> Statistics:
    """One read of the logits."""
    found, tokens = _empty(logits_nV), tokens_n.long().contiguous()
    library().row_statistics(_logits(logits_nV, scale), tokens.data_ptr(), *logits_nV.shape, _statistics(found),
                             torch.get_num_threads())
    return found


def sampled_gradient(logits_nV: Tensor, tokens_n: Tensor, scale: float, lse: Tensor, grad_n: Tensor) -> Tensor:
    """grad (1[v = token] - p_v), (n, V): of the sampled tokens' log-probs in the logits."""
    out, tokens, grad = _like(logits_nV), tokens_n.long().contiguous(), grad_n.contiguous()
    library().row_sampled_gradient(_logits(logits_nV, scale), *_at(tokens, lse, grad, out), *logits_nV.shape,
                                   torch.get_num_threads())
    return out


def buckets(logits_nV: Tensor, tokens_n: Tensor, scale: float, named_nV: Tensor, top_nk: Tensor
            ) -> tuple[Tensor, Tensor, Statistics]:
    """Log-probs (n, k + 1) of the top and of all others together, and the log-sum-exp (n,) of the others' logits."""
    (n, k), found = top_nk.shape, _empty(logits_nV)
    out, rest = logits_nV.new_empty(n, k + 1), logits_nV.new_empty(n)
    tokens, top = tokens_n.long().contiguous(), top_nk.long().contiguous()
    library().row_buckets(_logits(logits_nV, scale), *_at(tokens, named_nV, top), k, *logits_nV.shape,
                          *_at(out, rest), _statistics(found), torch.get_num_threads())
    return out, rest, found


def buckets_gradient(logits_nV: Tensor, scale: float, lse: Tensor, rest: Tensor, top_nk: Tensor, grad: Tensor
                     ) -> Tensor:
    """(n, V), of the buckets (n, k + 1), whose own gradient is `grad`."""
    out, top, grad = _like(logits_nV), top_nk.long().contiguous(), grad.contiguous()
    library().row_buckets_gradient(_logits(logits_nV, scale), *_at(lse, rest, top), top.shape[1], *_at(grad, out),
                                   *logits_nV.shape, torch.get_num_threads())
    return out


def kl(p_nV: Tensor, q_nV: Tensor, tokens_n: Tensor, p_scale: float, q_scale: float
       ) -> tuple[Tensor, Statistics, Statistics]:
    """KL(P||Q) (n,), and the statistics of both."""
    out, of_p, of_q, tokens = p_nV.new_empty(p_nV.shape[0]), _empty(p_nV), _empty(q_nV), tokens_n.long().contiguous()
    library().row_kl(_logits(p_nV, p_scale), _logits(q_nV, q_scale), tokens.data_ptr(), *p_nV.shape, out.data_ptr(),
                     _statistics(of_p), _statistics(of_q), torch.get_num_threads())
    return out, of_p, of_q


def js(p_nV: Tensor, q_nV: Tensor, p_scale: float, q_scale: float, p_lse: Tensor, q_lse: Tensor, weight: float,
       low: float) -> tuple[Tensor, Tensor]:
    """KL(P||M) and KL(Q||M), (n,) each, M = weight P + (1 - weight) Q, of log-probs that are raised to `low` first."""
    of_p, of_q = torch.empty_like(p_lse), torch.empty_like(p_lse)
    library().row_js(_logits(p_nV, p_scale), _logits(q_nV, q_scale), *_at(p_lse, q_lse), weight, low, *p_nV.shape,
                     *_at(of_p, of_q), torch.get_num_threads())
    return of_p, of_q


def clipped(p_nV: Tensor, q_nV: Tensor, p_scale: float, q_scale: float, p_lse: Tensor, q_lse: Tensor, clip: float
            ) -> tuple[Tensor, Tensor]:
    """sum_v min(P_v log(P_v / Q_v), clip), and the mass of P whose summands are not capped: (n,) each."""
    out, mass = torch.empty_like(p_lse), torch.empty_like(p_lse)
    library().row_clipped(_logits(p_nV, p_scale), _logits(q_nV, q_scale), *_at(p_lse, q_lse), clip, *p_nV.shape,
                          *_at(out, mass), torch.get_num_threads())
    return out, mass


def gradient(kind: str, s_nV: Tensor, t_nV: Tensor, s_scale: float, t_scale: float, s_lse: Tensor, t_lse: Tensor,
             grad_n: Tensor, known_n: Tensor, number: float = 0.0) -> Tensor:
    """(n, V), in the logits of S, of a divergence between S and a constant T."""
    out, grad = _like(s_nV), grad_n.contiguous()
    library().row_gradient(KINDS.index(kind), _logits(s_nV, s_scale), _logits(t_nV, t_scale),
                           *_at(s_lse, t_lse, grad, known_n), number, out.data_ptr(), *s_nV.shape,
                           torch.get_num_threads())
    return out


def blend(s: Side, t: Side, r: Side, share_n: Tensor, low: float) -> tuple[Tensor, Tensor]:
    """KL(S||B), B proportional to T^(1 - share) R^share of log-probs raised to `low`, and the log of B's mass: (n,)."""
    value, log_mass, share = torch.empty_like(s.lse), torch.empty_like(s.lse), share_n.contiguous()
    library().row_blend(*_sides(s, t, r), share.data_ptr(), low, *s.logits.shape, *_at(value, log_mass),
                        torch.get_num_threads())
    return value, log_mass


def blend_gradient(s: Side, t: Side, r: Side, share_n: Tensor, low: float, value: Tensor, log_mass: Tensor,
                   grad_n: Tensor) -> Tensor:
    """(n, V), in the logits of S, of what `blend` has found; B is constant."""
    out, share, grad = _like(s.logits), share_n.contiguous(), grad_n.contiguous()
    library().row_blend_gradient(*_sides(s, t, r), share.data_ptr(), low, *_at(value, log_mass, grad, out),
                                 *s.logits.shape, torch.get_num_threads())
    return out


class _Logits(ctypes.Structure):
    """As in cpu/rows.c."""

    _fields_ = [("z", ctypes.c_void_p), ("stride", ctypes.c_int64), ("scale", ctypes.c_float)]


class _Side(ctypes.Structure):
    """As in cpu/rows.c."""

    _fields_ = [("of", _Logits), ("lse", ctypes.c_void_p)]


class _Statistics(ctypes.Structure):
    """As in cpu/rows.c."""

    _fields_ = [("lse", ctypes.c_void_p), ("logp", ctypes.c_void_p), ("entropy", ctypes.c_void_p)]


def _logits(logits_nV: Tensor, scale: float) -> Any:
    return ctypes.byref(_Logits(logits_nV.data_ptr(), logits_nV.stride(0), scale))


def _sides(*sides: Side) -> list[Any]:
    return [ctypes.byref(_Side(_Logits(side.logits.data_ptr(), side.logits.stride(0), side.scale), side.lse.data_ptr()))
            for side in sides]


def _statistics(of: Statistics) -> Any:
    return ctypes.byref(_Statistics(*_at(*of)))


def _empty(logits_nV: Tensor) -> Statistics:
    return Statistics(*(logits_nV.new_empty(logits_nV.shape[0]) for _ in range(3)))


def _like(logits_nV: Tensor) -> Tensor:
    return again(*logits_nV.shape)


def _at(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]
