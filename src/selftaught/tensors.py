"""The only place that knows about packing offsets, masks, -inf and float32 log-sum-exp.

Shape suffixes, used everywhere:

    N  response tokens of a batch       n  tokens of one chunk       B  rollouts of a batch
    T  tokens of a packed pass          V  vocabulary                H  hidden width
    G  rollouts of one group            P  tokens of one prompt      R  tokens of the longest response of a group
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from selftaught.processor import is_intel

NEIGHBOURS = 32  # numbers of which `largest` compares only the largest at first
MAX_LOG_RATIO = 20.0  # every log-ratio is clamped to +-20 before it is exponentiated: exp(20) is 5e8


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for; a function that is dear remembers what it made (`cache`)."""

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._make  # the default asks for the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


# ---------------------------------------------------------------------------------------------- precision and -inf


def upcast(x: Tensor) -> Tensor:
    """float64 stays float64; everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


FEW = 64  # rows up to which oneDNN reads a weight in place as the left factor, and is faster so
MANY = 256  # rows up to which it is ahead of torch's usual library with a vocabulary's weight on any processor
WIDE = 2**14  # rows of a weight that is too large to be copied for a product


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@cache
def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as TorchScript, which calls one operator after the other without Python between them.

    As it is, where this torch cannot. For small tensors Python takes its time: 64 tokens in 16 rows of a 135M model
    4.88 s, and 4.67 s so (medians of ten turns, on two cores).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is frozen, and says so
        try:
            return torch.jit.script(function)
        except Exception:  # of its compiler, or of a torch that has it no more
            return function


def fast_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (..., K) by (M, K) to (..., M); in autograd's graph the plain product.

    torch's usual library copies the weight into its own order first, which with few rows is most of the work, and takes
    its slower kernels in float32 where the processor is not Intel's. oneDNN copies its right factor alone: with few
    rows that is x, in W x^T. Weights of a 135M model out of memory, two cores with AVX-512, AMD's: 16 rows 52 against
    33 ms, 64 rows 128 against 93, 380 rows 490 against 430; a head of 49,152 rows 19 against 7, and 40 against 22,
    where it is not turned. Intel's, 384 rows: the usual library is ahead by a sixth, and by a third where W is turned.
    """
    if not _for_onednn(x, weight):
        return x @ weight.t()
    rows, width = x.numel() // x.shape[-1], weight.shape[0]
    if rows > (FEW if width < WIDE else FEW // 2) or not weight.is_contiguous():
        return _onednn(x, weight)
    flat, out = x.reshape(rows, -1), x.new_empty(rows, width)
    for start in range(0, width, WIDE):  # turned back while it is in a cache
        out[:, start : start + WIDE] = turned(flat, weight[start : start + WIDE]).t()
    return out if x.dim() == 2 else out.view(*x.shape[:-1], width)  # no view of what an autograd function returns


def linear_onto(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x W^T, (n, M); not in autograd's graph."""
    if _for_onednn(x, weight):
        return _onednn(x, weight).add_(residual)
    return torch.addmm(residual, x, weight.t())


def turns(x: Tensor, *weights: Tensor) -> bool:
    """Are the rows of x (rows, K) so few that `turned` is the fastest product with all of these?"""
    return x.shape[0] <= FEW and all(w.is_contiguous() and _for_onednn(x, w) for w in weights)


def turned(x: Tensor, weight: Tensor) -> Tensor:
    """W x^T, (M, rows) of x (rows, K)."""
    return _onednn(weight, x)


def _for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Is oneDNN the fastest for x W^T?"""
    if not (x.is_cpu and x.dtype == weight.dtype == torch.float32 and _has_onednn() and x.numel()):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if not is_intel():
        return True
    rows = x.numel() // x.shape[-1]
    return weight.is_contiguous() and rows <= (FEW if weight.shape[0] < WIDE else MANY)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def is_wide(x: Tensor, weight: Tensor) -> bool:
    """Does the device multiply these two 16-bit tensors into float32 sums and a float32 result?"""
    return x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda and _multiplies_wide()


@cache
def _multiplies_wide() -> bool:
    one = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        _into_wide(one, one, torch.zeros(16, 16, device="cuda"))
    except torch.OutOfMemoryError:  # says nothing of what the device can
        raise
    except (RuntimeError, TypeError):  # not of this kind of device, or not of this torch
        return False
    return True


def _into_wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A B, or out + A B in place: 16 bits in, float32 out."""
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (n, K) by (M, K) to (n, M), summed and kept in float32 (float64 of float64); 16 bits have no gradient."""
    if is_wide(x, weight):
        return _into_wide(x, weight.t())
    return fast_linear(upcast(x), upcast(weight))


def add_product(out: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """out + A^T B, in the memory of `out` where there is one: (M, K) of (n, M) by (n, K); of 16 bits in float32."""
    if is_wide(a, b):
        return _into_wide(a.t(), b, out)
    return a.t() @ b if out is None else out.addmm_(a.t(), b)


def largest(x_nV: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k largest numbers of each row, in no order.

    The k groups of neighbours with the largest maxima hold them, so that one pass over all numbers is enough, where
    selecting among all takes several: on two cores 100 of 49,152 in 2.1 ms instead of 3.2, for 64 rows.
    """
    n, size = x_nV.shape
    groups = size // NEIGHBOURS
    if groups < 8 * k:
        return x_nV.topk(k, dim=-1, sorted=False).indices
    maxima = x_nV[:, : groups * NEIGHBOURS].unflatten(1, (groups, NEIGHBOURS)).amax(-1)
    index = torch.arange(size, device=x_nV.device)
    first = maxima.topk(k, dim=-1, sorted=False).indices * NEIGHBOURS
    left = index[groups * NEIGHBOURS :].expand(n, -1)  # of no group
    likely = torch.cat([(first[:, :, None] + index[:NEIGHBOURS]).flatten(1), left], -1)
    return likely.gather(-1, x_nV.gather(-1, likely).topk(k, dim=-1, sorted=False).indices)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b of log-probs, 0 (without gradient) where that is undefined: -inf minus -inf is no evidence."""
    gap = a - b
    return torch.where(torch.isnan(gap), torch.zeros_like(gap), gap)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b) of log-probs, the difference clamped to +-20."""
    return difference(a, b).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def product(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio with 0 (value and gradient) where p is 0, so that 0 * inf is 0 and never NaN."""
    positive = p > 0
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    return torch.where(positive, p * torch.where(positive, log_ratio, zero), zero)


# ----------------------------------------------------------------------------------------------------- segments


def segment_sum(values_N: Tensor, ids_N: Tensor, count: int) -> Tensor:
    """Sum of `values` within each segment: (count,)."""
    return values_N.new_zeros(count).index_add_(0, ids_N, values_N)


def segment_mean(values_N: Tensor, ids_N: Tensor, count: int, where_N: Tensor | None = None) -> Tensor:
    """Mean of `values` within each segment over `where`; 0 for a segment without any: (count,)."""
    where = torch.ones_like(values_N) if where_N is None else where_N.to(values_N.dtype)
    total = segment_sum(torch.where(where > 0, values_N, torch.zeros_like(values_N)), ids_N, count)
    return total / segment_sum(where, ids_N, count).clamp_min(1)


class Reducer(Protocol):
    """What anything global to an optimiser batch goes through; with one process it is the identity."""

    def sum(self, x: Tensor) -> Tensor: ...

    def gather(self, x: Tensor) -> Tensor: ...

    def quantile(self, x: Tensor, q: float) -> Tensor: ...


class Local:
    """The reducer of a single process."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def quantile(self, x: Tensor, q: float) -> Tensor:
        """Linear between the two nearest values, 0 of none; torch.quantile refuses more than 16 million numbers."""
        if not x.numel():
            return x.new_zeros(())
        ordered, place = x.sort().values, q * (x.numel() - 1)
        low = math.floor(place)
        return torch.lerp(ordered[low], ordered[min(low + 1, x.numel() - 1)], place - low)


LOCAL: Reducer = Local()


# ------------------------------------------------------------------------------------------------------ packing


MIN_COMMON = 16  # a shorter common prefix (a chat template's opening) is not worth another segment


@dataclass(frozen=True)
class Group:
    """Where one prompt and its responses lie in a packed pass: prompt at [start, start + prompt), then responses.

    `prompt` counts the prompt's tokens after the pass's common prefix. `responses` counts the response tokens
    that are *inputs*: the last token of a response predicts nothing that is scored, so it is left out. Responses with
    the same inputs are one.
    """

    start: int
    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One pass through a backbone without padding: what prompts have in common, then group by group
    [rest of the prompt][response 1]...[response G].

    token_ids_T, positions_T: int64. `common`: tokens at the start that every prompt begins with (few-shot examples,
    a system prompt), computed once for the whole pass. predict_N: for each scored response token, in rollout order,
    the index into T of the hidden state that predicts it (for a first token, the prompt's last). `rows`: for each
    rollout its prompt and response ids, from which the plain layout is made.
    """

    token_ids: Tensor
    positions: Tensor
    predict: Tensor
    common: int
    groups: tuple[Group, ...]
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def common_prefix(prompts: Iterable[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, at least one of each left out; 0 for one prompt or under MIN_COMMON."""
    distinct = set(prompts)
    if len(distinct) < 2:
        return 0
    first, last = min(distinct), max(distinct)  # the extremes in order differ where any two do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = min(shared, *(len(prompt) - 1 for prompt in distinct))
    return shared if shared >= MIN_COMMON else 0


def pack(prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]], device: str = "cpu") -> Packed:
    """Lay out B rollouts so that every distinct prompt, and every distinct response to it, is computed once.

    Prompts and responses are never empty.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    common = common_prefix(members)
    tokens = list(prompts[0][:common])
    positions = list(range(common))
    groups = []
    predict: list[list[int]] = [[] for _ in prompts]
    for prompt, indices in members.items():
        start, size = len(tokens), len(prompt)
        tokens += prompt[common:]
        positions += range(common, size)
        last = len(tokens) - 1
        places: dict[tuple[int, ...], int] = {}
        for index in indices:
            inputs = responses[index][:-1]
            if inputs not in places:
                places[inputs] = len(tokens)
                tokens += inputs
                positions += range(size, size + len(inputs))
            predict[index] = [last, *range(places[inputs], places[inputs] + len(inputs))]
        groups.append(Group(start, size - common, tuple(map(len, places))))
    return Packed(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        predict=torch.tensor([t for row in predict for t in row], device=device),
        common=common,
        groups=tuple(groups),
        rows=tuple(zip(prompts, responses, strict=True)),
    )


def split_by_budget(contexts: Sequence[Sequence[tuple[int, ...]]], responses: Sequence[tuple[int, ...]],
                    budget: int) -> Iterator[list[int]]:
    """Cut rollouts 0..B-1, in order, into micro-batches whose every view packs into `budget` tokens.

    `contexts` holds for each view the prompt of each rollout. A single rollout above the budget is a
    micro-batch of its own: it is never cut.
    """
    commons = [common_prefix(view) for view in contexts]
    current: list[int] = []
    seen: list[set[_Part]] = [set() for _ in contexts]
    used = list(commons)
    for index, response in enumerate(responses):
        prompts = [view[index] for view in contexts]
        costs = _costs(prompts, response, seen, commons)
        if current and any(u + c > budget for u, c in zip(used, costs, strict=True)):
            yield current
            current, seen, used = [], [set() for _ in contexts], list(commons)
            costs = _costs(prompts, response, seen, commons)
        current.append(index)
        used = [u + c for u, c in zip(used, costs, strict=True)]
        for view_seen, prompt in zip(seen, prompts, strict=True):
            view_seen |= {(prompt, ()), (prompt, response[:-1])}
    if current:
        yield current


_Part = tuple[tuple[int, ...], tuple[int, ...]]  # of a pass: a prompt and a response's inputs, or () for it alone


def _costs(prompts: list[tuple[int, ...]], response: tuple[int, ...], seen: list[set[_Part]], commons: list[int]
           ) -> list[int]:
    """Tokens that one more rollout adds to the pass of each view."""
    inputs = response[:-1]
    return [(0 if (prompt, inputs) in known else len(inputs)) + (0 if (prompt, ()) in known else len(prompt) - common)
            for prompt, known, common in zip(prompts, seen, commons, strict=True)]


def split_padded(contexts: Sequence[Sequence[tuple[int, ...]]], responses: Sequence[tuple[int, ...]],
                 budget: int) -> Iterator[list[int]]:
    """As `split_by_budget` for one padded row per rollout: a view costs its rows times the longest of them."""
    current: list[int] = []
    longest = 0
    for index, response in enumerate(responses):
        row = max(len(view[index]) for view in contexts) + len(response) - 1
        longest = max(longest, row)
        if current and (len(current) + 1) * longest > budget:
            yield current
            current, longest = [], row
        current.append(index)
    if current:
        yield current


def offsets(lengths: Iterable[int]) -> list[int]:
    """[0, l0, l0 + l1, ...]."""
    out = [0]
    for length in lengths:
        out.append(out[-1] + length)
    return out
