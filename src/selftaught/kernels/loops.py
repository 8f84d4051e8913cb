"""Compiled loops for float32 on a CPU, where the machine has a C compiler (`compiled`); `usable` says whether.

Each has the numbers of torch's operators but for the order of roundings, and is held against them when it is loaded
(`probe`). Without them the callers take torch's operators.

Shapes: n rows, H hidden width, D of one head, T tokens of a pass, B rows of a decoding step, G prompts, P tokens of the
longest.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftaught.heap import again, empty, empty_like
from selftaught.kernels.base import is_off
from selftaught.kernels.compiled import libraries
from selftaught.processor import is_intel

COLUMNS, MANY = 32, 128  # of a product that is faster here than in oneDNN; of one by a vocabulary
WIDE = 2**13  # rows of a weight that is a vocabulary's
LANES, BLOCK, STRIPE, QUERIES, PANEL = 16, 32, 36, 6, 16  # as in cpu/, where they may be less
PLAIN = (Tensor, torch.nn.Parameter)  # what other kinds hold may lie elsewhere
_loops: ctypes.CDLL | None = None
_found: bool | None = None  # are there any? None: nobody has asked
_lock = threading.RLock()


def usable(*tensors: Tensor) -> bool:
    """Are these float32 on a CPU, with memory of their own, and are there loops for them?"""
    return not is_off() and all(type(x) in PLAIN and x.dtype == torch.float32 and x.is_cpu for x in tensors) \
        and _works()


# ------------------------------------------------------------------------------------------------------- update


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of x (..., H): (..., 1)."""
    x = x.contiguous()
    root, width = x.new_empty(*x.shape[:-1], 1), x.shape[-1]
    library().inverse_root(*_at(x, root), x.numel() // width, width, eps, torch.get_num_threads())
    return root


def norm(x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
    """x w root of x (..., H), w (H,) and the root (..., 1)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, width = empty_like(x), x.shape[-1]
    library().norm(*_at(x, weight, root, y), x.numel() // width, width, torch.get_num_threads())
    return y


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, root: Tensor, added: Tensor | None = None
                  ) -> tuple[Tensor, Tensor]:
    """The gradients of x, on top of what is `added`, and of the weight, from that of `norm`."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    threads, width, more = torch.get_num_threads(), x.shape[-1], None if added is None else added.data_ptr()
    of_x, of_weight = empty_like(x), x.new_empty(threads, width)
    given = *_at(grad, x, weight, root), more, *_at(of_x, of_weight)
    library().norm_backward(*given, x.numel() // width, width, threads)
    return of_x, of_weight.sum(0)


def gate(gated: Tensor, raised: Tensor, inplace: bool = False) -> Tensor:
    """silu(gated) raised, (..., I), in the memory of `gated` if asked for; of two matrices rows may be apart alike."""
    out, width = gated if inplace else empty(*gated.shape), gated.shape[-1]
    sizes = gated.numel() // width, width, _apart(gated), _apart(out)
    library().gate(*_at(gated, raised, out), *sizes, torch.get_num_threads())
    return out


def gate_backward(gated: Tensor, raised: Tensor, grad: Tensor, joined: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of both from that of `gate`, which becomes the gate's output in place.

    Where the two are halves of one matrix, so are their gradients, of `joined` (n, 2 I).
    """
    of_gated, of_raised = (empty_like(gated), empty_like(gated)) if joined is None else joined.chunk(2, -1)
    sizes = gated.numel() // gated.shape[-1], gated.shape[-1], _apart(gated)
    library().gate_backward(*_at(gated, raised, grad, of_gated, of_raised), *sizes, torch.get_num_threads())
    return of_gated, of_raised


def _apart(x: Tensor) -> int:
    """Numbers between neighbouring rows."""
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False, inplace: bool = False) -> Tensor:
    """x cos + rotate_half(x) sin of x (heads, n, D), in any order of memory whose last axis is D; cos and sin (n, D).

    `back` takes its gradient to that of x. In the memory of x, which need not be dense then, if asked for."""
    out = x if inplace else empty_like(x)
    library().rotate(*_at(x, cos, sin, out), *x.shape, *x.stride()[:2], back, torch.get_num_threads())
    return out


def accumulates(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Is `outer` the fastest for these? Intel's own library, on its own processors, is ahead of it by a fifth."""
    return not is_intel() and b.shape[1] % LANES == 0 and all(x.is_contiguous() for x in (out, a, b)) \
        and usable(out, a, b)


def outer(out_MK: Tensor, a_nM: Tensor, b_nK: Tensor, fresh: bool = False) -> Tensor:
    """out + A^T B in place, or A^T B alone where `fresh`: what is in `out` is not read then."""
    (n, height), width = a_nM.shape, b_nK.shape[1]
    library().outer(*_at(a_nM, b_nK, out_MK), n, height, width, fresh, torch.get_num_threads())
    torch.autograd.graph.increment_version(out_MK)
    return out_MK


# ----------------------------------------------------------------------------------------------------- decoding


class _Product(ctypes.Structure):
    """As in cpu/decoding.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "gated", "residual", "room", "out")),
        *((name, ctypes.c_int64) for name in ("M", "K", "B", "x_k", "x_b", "out_m", "out_b")),
        ("threads", ctypes.c_int),
    ]  # fmt: skip


def multiplies(x_KB: Tensor, *weights: Tensor) -> bool:
    """Is `product` the fastest for all of these?"""
    return x_KB.shape[-1] <= COLUMNS and all(w.is_contiguous() for w in weights) and usable(x_KB, *weights)


def product(x_KB: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None, gated_MB: Tensor | None = None,
            residual_MB: Tensor | None = None, out_MB: Tensor | None = None) -> Tensor:
    """silu(gated) (W x + bias) + residual, (M, B), for few columns x (K, B), in any order.

    What is given beside x and the weight must lie in memory as the result does.
    """
    (height, width), columns = weight_MK.shape, x_KB.shape[1]
    out = x_KB.new_empty(height, columns) if out_MB is None else out_MB
    room = x_KB.new_empty(width, -(-columns // PANEL) * PANEL)
    more = [None if x is None else x.data_ptr() for x in (bias_M, gated_MB, residual_MB)]
    library().product(ctypes.byref(_Product(
        *_at(x_KB, weight_MK), *more, *_at(room, out), height, width, columns, *x_KB.stride(), *out.stride(),
        torch.get_num_threads())))
    return out


def projects(x_nK: Tensor, weight_VK: Tensor, *more: Tensor) -> bool:
    """Is `logits` the fastest for these?"""
    given = (x_nK, weight_VK, *more)
    return COLUMNS < x_nK.shape[0] <= MANY and weight_VK.shape[0] >= WIDE and all(x.is_contiguous() for x in given) \
        and usable(*given)


def logits(x_nK: Tensor, weight_VK: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """x W^T + bias, (n, V), for some tens of rows and a vocabulary: the weight is read once, and not copied."""
    (n, width), size = x_nK.shape, weight_VK.shape[0]
    out, room = again(n, size), x_nK.new_empty(-(-n // LANES) * LANES, width)
    bias = None if bias_V is None else bias_V.data_ptr()
    library().logits(*_at(x_nK, weight_VK), bias, *_at(room, out), n, size, width, torch.get_num_threads())
    return out


class Held(NamedTuple):
    """What one layer of a decoding step attends to, as `attend` says."""

    prompt_k: Tensor
    prompt_v: Tensor
    held_k: Tensor
    held_v: Tensor
    group: Tensor
    length: Tensor


class Attention(ctypes.Structure):
    """As in cpu/decoding.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "prompt_k", "prompt_v", "held_k", "held_v",
                                               "group", "length", "scores", "out")),
        *((name, ctypes.c_int64) for name in ("kv_heads", "repeat", "rows", "groups", "prompt", "values", "capacity",
                                              "written", "width", "window")),
        ("scaling", ctypes.c_float), ("threads", ctypes.c_int),
    ]  # fmt: skip


def attends(width: int) -> bool:
    """Does `attend` take heads of so many numbers?"""
    return width % LANES == 0


def attend(query: Tensor, key: Tensor, value: Tensor, prompt_k: Tensor, prompt_v: Tensor, held_k: Tensor,
           held_v: Tensor, group: Tensor, length: Tensor, written: int, window: int | None, scaling: float) -> Tensor:
    """Attention of one token of every row over its prompt and what it has written, this token included: (B, Hq, D).

    query (Hq, B, D), key and value (Hkv, B, D); of the prompts (Hkv, G, D, P) and (Hkv, G, P' <= P, D); held
    (Hkv, B, D, capacity) and (Hkv, B, capacity, D), where this token's are put; P and capacity in whole blocks; the
    group of each row (B,) and the length of each group's prompt (G,), int64. `window`: keys that a token sees at most.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    held = Held(prompt_k, prompt_v, held_k, held_v, group.long(), length.long())
    scores, out = scores_of(held), query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    given = attention(_at(query, key, value), held, scores, out, query.shape[0], window, scaling)
    given.written = written
    library().attend(ctypes.byref(given))
    return out


def scores_of(held: Held) -> Tensor:
    """Room for the scores of every thread."""
    tokens = held.prompt_k.shape[3] + held.held_k.shape[3]
    return held.held_k.new_empty(torch.get_num_threads(), QUERIES, tokens)


def attention(given: Sequence[int], held: Held, scores: Tensor, out: Tensor, heads: int, window: int | None,
              scaling: float) -> Attention:
    """`attend` of query, key and value that lie where `given` says, but for how many tokens were written."""
    kv_heads, rows, capacity, width = held.held_v.shape
    groups, _, prompt = held.prompt_k.shape[1:]
    seen = prompt + capacity if window is None else window
    return Attention(*given, *_at(*held, scores, out), kv_heads, heads // kv_heads, rows, groups, prompt,
                     held.prompt_v.shape[2], capacity, 0, width, seen, scaling, torch.get_num_threads())


# ------------------------------------------------------------------------------------------------------- loading


def _at(*tensors: Tensor) -> list[int]:
    """Where they lie; whoever asks holds them until the loop has returned."""
    return [x.data_ptr() for x in tensors]


def library() -> Any:
    """The loops themselves, by name; `usable` was asked before."""
    assert _loops is not None, "no loops: `usable` was not asked"
    return _loops


def _works() -> bool:
    """Are there loops, and do they count right? Found out once."""
    global _found
    if _found is None:
        with _lock:  # whoever else asks waits, and calls nothing that is not checked
            if _found is None:
                _found = _load()
    return _found


def _load() -> bool:
    global _loops
    from selftaught.kernels import probe

    for _loops in libraries():
        try:
            _declare(_loops)
            probe.check()
            return True
        except (AttributeError, RuntimeError) as error:
            warnings.warn(f"the compiled loops are not used, torch's slower operators take their place: {error}",
                          stacklevel=2)
    _loops = None
    return False


def _declare(library: Any) -> None:
    """The types of what the loops are given; a size where nothing else is said."""
    at, size, real, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    given = {
        "inverse_root": [at] * 2 + [size, size, real, whole], "norm": [at] * 4 + [size, size, whole],
        "normed": [at] * 5 + [size, size, real, whole], "norm_backward": [at] * 7 + [size, size, whole],
        "gate": [at] * 3 + [size] * 4 + [whole], "gate_backward": [at] * 5 + [size] * 3 + [whole],
        "outer": [at] * 3 + [size] * 3 + [whole, whole], "rotate": [at] * 4 + [size] * 5 + [whole, whole],
        "norm_turned": [at] * 4 + [size] * 3 + [real, real], "rotate_turned": [at] * 4 + [size] * 3,
        "row_statistics": [at, at, size, size, at, whole], "row_sampled_gradient": [at] * 5 + [size, size, whole],
        "row_buckets": [at] * 4 + [size] * 3 + [at] * 3 + [whole],
        "row_buckets_gradient": [at] * 4 + [size, at, at, size, size, whole],
        "row_kl": [at] * 3 + [size, size, at, at, at, whole],
        "row_js": [at] * 4 + [real, real, size, size, at, at, whole],
        "row_blend": [at] * 4 + [real, size, size, at, at, whole],
        "row_blend_gradient": [at] * 4 + [real] + [at] * 4 + [size, size, whole],
        "row_clipped": [at] * 4 + [real, size, size, at, at, whole],
        "row_gradient": [whole] + [at] * 6 + [real, at, size, size, whole],
        "logits": [at] * 5 + [size] * 3 + [whole], "decode": [at, size, size],
        **{name: [at] for name in ("attend", "product", "before", "after", "attend_pass", "attend_pass_backward",
                                   "forward_layer", "backward_layer")},
    }  # fmt: skip
    for name, types in given.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
