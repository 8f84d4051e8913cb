"""The vocabulary head, and the next-token distributions that it makes, computed only as far as somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selftaught.kernels import loops, rows_of, usable
from selftaught.tensors import is_wide, product, upcast, wide_linear

if TYPE_CHECKING:
    from selftaught.kernels.base import Statistics

ROWS = 32  # a chunk is a multiple of it: matrix kernels read whole blocks
NO_MASS = -1e4  # a log-prob whose exponential is 0, in float64 too
FEWEST = 64  # rows of a chunk, however large the vocabulary: its weight is read four times for each
CHUNK_ELEMENTS = 2**21  # logits of one chunk, about: 8 MiB in float32
BLOCK_ELEMENTS = 2**18  # of a chunk's logits that a CPU works on at a time where it can: 1 MiB in float32
CUDA_ROWS = 128  # of a chunk on a GPU
CUDA_ELEMENTS = 2**26  # there: 256 MiB, which keeps the multiplying units busy


@dataclass(frozen=True)
class Head:
    """A vocabulary head: logits = softcap tanh(z / softcap), z = scale (h W^T + b); without a softcap, z.

    weight (V, H), bias (V,) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def as_head(head: Head | Tensor | tuple[Tensor, Tensor]) -> Head:
    """A (V, H) weight, or a pair of weight and bias, as a `Head`."""
    if isinstance(head, Head):
        return head
    return Head(head) if isinstance(head, Tensor) else Head(*head)


def chunk_size(vocabulary: int, device: str = "cpu") -> int:
    """Tokens per chunk: of V, the kind of device and whether a CPU has loops, never of free memory: runs repeat.

    The loops take a chunk's memory again for the next one's, and gradients of a head are faster products of more rows;
    by torch's operators each chunk that is mapped by itself costs its pages.
    """
    if device == "cuda":
        return max(1, min(32, CUDA_ELEMENTS // (vocabulary * CUDA_ROWS))) * CUDA_ROWS
    return max(loops.MANY if loops.usable() else FEWEST, min(32, -(-CHUNK_ELEMENTS // (vocabulary * ROWS))) * ROWS)


def affine(hidden_nH: Tensor, weight_VH: Tensor, bias: Tensor | None) -> Tensor:
    """h W^T + b, accumulated and kept in float32 (float64 for float64): (n, V)."""
    given = [x for x in (hidden_nH, weight_VH, bias) if x is not None]
    taught = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if not taught and loops.multiplies(hidden_nH.t(), *given[1:]):
        logits = hidden_nH.new_empty(hidden_nH.shape[0], weight_VH.shape[0])
        return loops.product(hidden_nH.t(), weight_VH, bias, out_MB=logits.t()).t()
    if not taught and loops.projects(*given):
        return loops.logits(*given)
    logits = wide_linear(hidden_nH, weight_VH)
    return logits if bias is None else logits + upcast(bias)


def finish(raw_nV: Tensor, head: Head) -> Tensor:
    """Logits from the affine map: scaled, then soft-capped."""
    logits = raw_nV if head.scale == 1.0 else raw_nV * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def project(hidden_nH: Tensor, head: Head) -> Tensor:
    """Logits (n, V) in float32."""
    return finish(affine(hidden_nH, head.weight, head.bias), head)


class _AtSampled(torch.autograd.Function):
    """Log-probs of the sampled tokens, (n,) of logits (n, V), and beside them the entropies (n,), without a gradient.

    For a loss that takes nothing else: the gradient is made in the memory of the probabilities, with no row of zeros to
    scatter into.
    """

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(logits_nV, dim=-1)  # bit for bit what all others gather from
        ctx.save_for_backward(logits_nV, tokens_n)
        sampled_n = log_probs.gather(-1, tokens_n[:, None]).squeeze(-1)
        entropy_n = torch.empty_like(sampled_n)
        for rows in row_blocks(log_probs):  # each becomes its probabilities, while it is in a cache
            probs = log_probs[rows].exp()
            entropy_n[rows] = _entropy(probs, log_probs[rows])
            log_probs[rows] = probs
        ctx.probs = log_probs
        ctx.mark_non_differentiable(entropy_n)
        ctx.set_materialize_grads(False)
        return sampled_n, entropy_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad_n is None:
            return None, None
        logits_nV, tokens_n = ctx.saved_tensors
        probs, ctx.probs = ctx.probs, None  # of a retained graph None: anew
        return _sampled_gradient(logits_nV, tokens_n, grad_n, probs), None


def _sampled_gradient(logits_nV: Tensor, tokens_n: Tensor, grad_n: Tensor, probs_nV: Tensor | None = None) -> Tensor:
    """(n, V), of the sampled tokens' log-probs in the logits; in the memory of the probabilities, if they are given."""
    probs = torch.log_softmax(logits_nV, dim=-1).exp_() if probs_nV is None else probs_nV
    return probs.mul_(-grad_n[:, None]).scatter_add_(-1, tokens_n[:, None], grad_n[:, None])


def keeps_graph() -> bool:
    """Was the running backward pass asked to retain its graph? True where this torch does not say."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:
        return True


class Known(torch.autograd.Function):
    """A value that is known already, and the function that makes its gradient in the logits (n, V) from its own."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, value: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError("backward was called before; call it with retain_graph=True the first time")
        if not keeps_graph():
            ctx.gradient = None  # with all that it holds
        return gradient(grad), None, None


def _entropy(probs_nV: Tensor, log_probs_nV: Tensor) -> Tensor:
    """In nats: (n,), where 0 * -inf is 0."""
    entropy_n = -dot(probs_nV, log_probs_nV)
    return -dot(probs_nV, log_probs_nV.clamp(min=NO_MASS)) if torch.isnan(entropy_n).any() else entropy_n


def dot(p_nV: Tensor, q_nV: Tensor) -> Tensor:
    """sum_v p_v q_v: (n,), with few products at a time, and of the precision of its factors whatever matrices have."""
    return torch.cat([(p_nV[rows] * q_nV[rows]).sum(-1) for rows in row_blocks(p_nV)])


def row_blocks(x_nV: Tensor) -> list[slice]:
    """Rows of x, as many at a time as a CPU's cache holds; at least one block."""
    count = max(1, BLOCK_ELEMENTS // x_nV.shape[1]) if x_nV.is_cpu else max(1, x_nV.shape[0])
    return [slice(start, start + count) for start in range(0, max(1, x_nV.shape[0]), count)]


class TokenDist:
    """Lazy next-token distributions under one view.

    `logits` is (n, V) or a function that makes it, called at most once: a view whose vocabulary is never
    touched is never projected. With `some`, which makes the logits of given rows, nor are rows that nobody takes.
    Everything is in float32, or in float64 for float64 logits. The temperature divides the logits; `at` replaces it.
    """

    def __init__(self, logits: Tensor | Callable[[], Tensor], tokens_n: Tensor, temperature: float = 1.0,
                 some: Callable[[Tensor], Tensor] | None = None) -> None:
        self._logits = logits
        self._some = some
        self.tokens = tokens_n
        self.temperature = temperature
        self._sampled: Tensor | None = None  # both outside autograd, where somebody found them on the way
        self._entropy: Tensor | None = None

    @cached_property
    def _raw(self) -> Tensor:
        return upcast(self._logits if isinstance(self._logits, Tensor) else self._logits())

    @property
    def raw(self) -> Tensor:
        """(n, V), before the temperature."""
        return self._raw

    @property
    def in_place(self) -> bool:
        """Do kernels read `raw` where it lies, so that neither `logits` nor `log_probs` need be made?"""
        return usable(self.raw)

    @property
    def scale(self) -> float:
        """What multiplies `raw` there."""
        return 1.0 / self.temperature

    @cached_property
    def statistics(self) -> Statistics:
        """Of `raw` at the temperature, where it is read in place; outside autograd."""
        return rows_of(self.raw).statistics(self.raw.detach(), self.tokens, self.scale)

    @cached_property
    def logits(self) -> Tensor:
        """(n, V), divided by the temperature."""
        return self._raw if self.temperature == 1.0 else self._raw / self.temperature

    def note(self, log_probs: Tensor, probs: Tensor | None) -> None:
        """What others will ask of these log-probs (n, V), and probabilities, which whoever made them does not leave."""
        self._sampled = log_probs.gather(-1, self.tokens[:, None]).squeeze(-1)
        if probs is not None and self._entropy is None:
            self._entropy = _entropy(probs, log_probs)

    @cached_property
    def at_sampled(self) -> Tensor:
        """Log-prob of the sampled token in nats: (n,)."""
        if self.in_place:
            return self._at_sampled_in_place()
        if self._sampled is not None:
            gradient = partial(_sampled_gradient, self.logits.detach(), self.tokens)
            return Known.apply(self.logits, self._sampled, gradient)
        if "log_probs" not in self.__dict__ and self.logits.requires_grad and torch.is_grad_enabled():
            sampled_n, self._entropy = _AtSampled.apply(self.logits, self.tokens)
            return sampled_n
        return self.log_probs.gather(-1, self.tokens[:, None]).squeeze(-1)

    def _at_sampled_in_place(self) -> Tensor:
        logits, tokens, scale, (lse, logp, _) = self.raw.detach(), self.tokens, self.scale, self.statistics
        rows = rows_of(logits)
        return Known.apply(self.raw, logp, lambda grad: rows.sampled_gradient(logits, tokens, scale, lse, grad))

    @cached_property
    def log_probs(self) -> Tensor:
        """(n, V) in nats."""
        return torch.log_softmax(self.logits, dim=-1)  # one pass forward and one back, where its parts are five

    def entropy(self) -> Tensor:
        """In nats: (n,)."""
        if torch.is_grad_enabled():
            return -product(self.log_probs.exp(), self.log_probs).sum(-1)
        if self.in_place:
            return self.statistics.entropy
        return _entropy(self.log_probs.exp(), self.log_probs) if self._entropy is None else self._entropy

    def at(self, temperature: float) -> TokenDist:
        """The same logits at another temperature."""
        if temperature == self.temperature:
            return self
        return TokenDist(lambda: self._raw, self.tokens, temperature, self._raw_of)

    def _raw_of(self, rows: Tensor) -> Tensor:
        return self._raw[rows] if self._some is None or "_raw" in self.__dict__ else self._some(rows)

    def __getitem__(self, rows: Tensor) -> TokenDist:
        """The distributions of some of the tokens, by mask or index."""
        part = TokenDist(lambda: self._raw_of(rows), self.tokens[rows], self.temperature)
        if "log_probs" in self.__dict__:
            part.log_probs = self.log_probs[rows]
        return part


class Mixture(TokenDist):
    """One distribution whose probabilities are the mean of those of K others: log mean exp of their log-probs.

    `present_nK` says which of the K count for each token; one of them at least. Each is taken at the temperature
    first, so that the mixture is the optimum of their mean KL(T_k||S) at any temperature.
    """

    def __init__(self, parts: Sequence[TokenDist], present_nK: Tensor) -> None:
        super().__init__(lambda: self.log_probs, parts[0].tokens, parts[0].temperature)
        self._parts, self._present = parts, present_nK

    @property
    def in_place(self) -> bool:
        """No: its log-probs are made of several."""
        return False

    @cached_property
    def logits(self) -> Tensor:
        """(n, V): the log-probs themselves."""
        return log_mean_exp([part.log_probs for part in self._parts], self._present)

    @cached_property
    def at_sampled(self) -> Tensor:
        """Log-prob of the sampled token in nats: (n,)."""
        return log_mean_exp([part.at_sampled for part in self._parts], self._present)

    @cached_property
    def log_probs(self) -> Tensor:
        """(n, V) in nats."""
        return self.logits

    def at(self, temperature: float) -> TokenDist:
        """The mixture of the same distributions at another temperature."""
        if temperature == self.temperature:
            return self
        return Mixture([part.at(temperature) for part in self._parts], self._present)

    def __getitem__(self, rows: Tensor) -> TokenDist:
        return Mixture([part[rows] for part in self._parts], self._present[rows])


def log_mean_exp(log_probs: Sequence[Tensor], present_nK: Tensor) -> Tensor:
    """log of the mean of the K probabilities that are present, from K log-probs (n,) or (n, V); never log of a mean."""
    total = log_probs[0].masked_fill(~_beside(present_nK[:, 0], log_probs[0]), -torch.inf)
    for k, log_p in enumerate(log_probs[1:], 1):
        total = torch.logaddexp(total, log_p.masked_fill(~_beside(present_nK[:, k], log_p), -torch.inf))
    return total - _beside(present_nK.sum(1).to(total.dtype).log(), total)


def _beside(value_n: Tensor, like: Tensor) -> Tensor:
    return value_n if like.dim() == 1 else value_n[:, None]


def sampled_log_probs(hidden_NH: Tensor, head: Head, tokens_N: Tensor, *, chunk: int | None = None,
                      temperature: float = 1.0, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the sampled tokens (N,), and the entropies (N,) if asked for; no gradient, chunk by chunk."""
    step = chunk or chunk_size(head.weight.shape[0], hidden_NH.device.type)
    logps, entropies = [], []
    with torch.no_grad():
        weight = head.weight if is_wide(hidden_NH, head.weight) else upcast(head.weight)
        for start in range(0, tokens_N.shape[0], step):
            rows = slice(start, start + step)
            raw = affine(hidden_NH[rows], weight, head.bias)
            dist = TokenDist(finish(raw, head), tokens_N[rows], temperature)
            logps.append(dist.at_sampled)
            if entropy:
                entropies.append(dist.entropy())
    return torch.cat(logps), torch.cat(entropies) if entropy else None
