"""The chunked vocabulary head: any method's loss and gradients without a tensor of shape (N, V).

`chunk` tokens at a time, the hidden states are projected, the method's loss is taken, and its gradient flows to
those logits there and then; from the logits' gradient come the rows of the hidden states' gradient and one sum
into the head's. The backward pass only scales what the forward pass found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selftaught.heap import keeping
from selftaught.records import Credit, TokenLoss
from selftaught.tensors import add_product, fast_linear, is_wide, upcast
from selftaught.vocabulary import Head, TokenDist, affine, chunk_size, finish, keeps_graph, project

_LOSS = ""  # among the metrics' names
GATHERED = 8  # chunks of 16-bit gradients per product with the states: each goes through all of the head's gradient
LossFunction = Callable[[TokenDist, Mapping[str, TokenDist], Credit], TokenLoss]


@dataclass(frozen=True)
class Reduced:
    """loss: scalar, differentiable in the student's hidden states and head. token_loss (N,), metrics (N,): detached."""

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]


class _Gradients:
    """What the student's side is multiplied with, chunk after chunk, and the gradients that come of it.

    Where the device multiplies bfloat16 into float32 sums, the logits' gradients are rounded to bfloat16 and those of
    several chunks are gathered for one product; elsewhere all is in float32, chunk by chunk.
    """

    def __init__(self, states_NH: Tensor, head: Head, needs: Sequence[bool], head_grad: Tensor | None) -> None:
        weight_VH, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self.narrow = weight_VH.dtype == torch.bfloat16 and is_wide(states_NH, weight_VH)  # float16 is too short for it
        self.states: Tensor = states_NH
        self.weights: Tensor = weight_VH if self.narrow else upcast(weight_VH)
        self.offsets = None if bias is None else upcast(bias)
        self._dtype, self.wide = weight_VH.dtype, upcast(weight_VH[:0]).dtype
        self.any = any(needs)
        self.hidden = torch.zeros_like(states_NH) if needs[0] else None
        self.weight = head_grad if needs[1] else None  # None: the first product makes it, faster than filling zeros
        self.bias = torch.zeros_like(self.offsets) if needs[2] and self.offsets is not None else None
        self.placed = needs[1] and head_grad is not None  # the weight's is where it belongs already
        self._needs_weight = needs[1]
        self._gathered: Tensor | None = None  # (rows, V), of which `_filled` are from `_first` on
        self._first = self._filled = 0
        self._spent = False

    def add(self, rows: slice, grad_nV: Tensor) -> None:
        """The gradient of one chunk's logits, before scale and softcap; chunks come in order."""
        if self.bias is not None:
            self.bias.add_(grad_nV.sum(0))
        if not self.narrow:
            self._multiply(rows, grad_nV, upcast(self.states[rows]))
            return
        count = grad_nV.shape[0]
        if self._gathered is None:
            most = min(GATHERED * count, self.states.shape[0])
            self._gathered = torch.empty(most, grad_nV.shape[1], dtype=self.states.dtype, device=grad_nV.device)
        if self._first + self._filled != rows.start or self._filled + count > self._gathered.shape[0]:
            self._flush()
            self._first = rows.start
        self._gathered[self._filled : self._filled + count] = grad_nV
        self._filled += count

    def _flush(self) -> None:
        if self._gathered is not None and self._filled:
            rows = slice(self._first, self._first + self._filled)
            self._multiply(rows, self._gathered[: self._filled], self.states[rows])
        self._filled = 0

    def _multiply(self, rows: slice, grad_nV: Tensor, states_nH: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[rows] = fast_linear(grad_nV, self.weights.t()).to(self.hidden.dtype)
        if self._needs_weight:
            self.weight = add_product(self.weight, grad_nV, states_nH)

    def finish(self) -> None:
        """No more chunks: what is left is multiplied, and the head's gradient is in the head's own type."""
        self._flush()
        self._gathered = None
        if self._needs_weight:
            weight = torch.zeros_like(self.weights, dtype=self.wide) if self.weight is None else self.weight
            self.weight = weight if self.placed else weight.to(self._dtype)
        del self.weights, self.states, self.offsets  # autograd keeps this object until the backward pass

    def hand_out(self, scale: Tensor, keep: bool) -> list[Tensor | None]:
        """The gradients times `scale`; unless they are to be kept, the last reference to them.

        The head's is the largest tensor here: autograd copies what somebody else still holds, and takes over the rest.
        """
        if self._spent:
            raise RuntimeError("backward was called on this loss before; call it with retain_graph=True the first time")
        found = [self.hidden, None if self.placed else self.weight, self.bias]
        factor = scale.item()
        if self.placed and factor != 1:
            raise RuntimeError(f"the gradient of this loss's head was added in the forward pass, and the backward pass "
                               f"scales it by {factor}; put the factor into the weights of the tokens")
        if keep:
            return [None if g is None else g * scale.to(g.dtype) for g in found]
        self.hidden = self.weight = self.bias = None
        self._spent = True
        return [g if g is None or factor == 1 else g.mul_(scale.to(g.dtype)) for g in found]


class _Precomputed(torch.autograd.Function):
    """A scalar whose gradients were found with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: _Gradients, *_: Tensor | None) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.grads.hand_out(scale, keeps_graph()))


def masked(loss_n: Tensor, weight_n: Tensor) -> Tensor:
    """The token losses that count, 0 elsewhere: an infinite loss on a token of weight 0 is nobody's loss."""
    return torch.where(weight_n != 0, loss_n, torch.zeros_like(loss_n))


def chunked_loss(loss: LossFunction, hidden: Mapping[str, Tensor], heads: Mapping[str, Head], tokens_N: Tensor,
                 credit: Credit, weight_N: Tensor, *, chunk: int | None = None, temperature: float = 1.0,
                 head_grad: Tensor | None = None) -> Reduced:
    """sum_n weight_n loss_n, with gradients for hidden["student"] and heads["student"] alone.

    hidden: (N, H) for "student" and for each view; heads: the head of each. A view is taken from `hidden` when the
    loss first asks for its distribution: in a lazy mapping it may be made there. Peak memory beyond the inputs and
    their gradients is O(chunk x V). Under `no_grad` nothing is differentiated.

    `head_grad` (V, H), in float32: the gradient of the head's weight is added to it here and now, and `backward` must
    be called on the loss as it is (RuntimeError otherwise). Without it the backward pass returns that gradient, which
    is as large as the head.
    """
    student, head = hidden["student"], heads["student"]
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (student, head.weight, head.bias)]
    grads = _Gradients(student.detach(), head, needs, head_grad)
    total = weight_N.new_zeros((), dtype=grads.wide)
    # What outlives a chunk is made once: small blocks kept from each would lie in the holes that the next chunk needs.
    found_N: dict[str, Tensor] = {}
    step = chunk or chunk_size(head.weight.shape[0], student.device.type)
    with keeping():
        for start in range(0, tokens_N.shape[0], step):
            rows = slice(start, start + step)
            views = {name: _view(hidden, name, rows, heads[name], tokens_N[rows], temperature)
                     for name in hidden if name != "student"}
            part = {name: value[rows] for name, value in credit.items()}
            _one_chunk(loss, grads, head, views, rows, tokens_N, part, weight_N, temperature, total, found_N)
    grads.finish()
    reduced = total
    if any(needs):
        reduced = _Precomputed.apply(total, grads, student, head.weight, head.bias)
    return Reduced(reduced, found_N.pop(_LOSS, weight_N.new_zeros(0)), found_N)


def _one_chunk(loss: LossFunction, grads: _Gradients, head: Head, views: Mapping[str, TokenDist], rows: slice,
               tokens_N: Tensor, credit: Credit, weight_N: Tensor, temperature: float, total: Tensor,
               found_N: dict[str, Tensor]) -> None:
    """Adds the chunk's loss to `total`, its gradients to `grads`, and writes its rows into `found`.

    A function of its own, so that nothing as large as its logits is alive when the next chunk's are made.
    """
    with torch.enable_grad() if grads.any else torch.no_grad():
        raw = affine(grads.states[rows], grads.weights, grads.offsets).requires_grad_(grads.any)
        dist = TokenDist(finish(raw, head), tokens_N[rows], temperature)
        out = loss(dist, views, credit)
        weighted = (masked(out.loss, weight_N[rows]) * weight_N[rows]).sum()
    with torch.no_grad():
        total += weighted.detach()
        for name, value in {_LOSS: out.loss, "entropy": dist.entropy(), "logp": dist.at_sampled, **out.metrics}.items():
            if name not in found_N:
                found_N[name] = value.new_zeros(tokens_N.shape[0])
            found_N[name][rows] = value
    if grads.any and weighted.requires_grad:
        grads.add(rows, torch.autograd.grad(weighted, raw)[0])


def _view(hidden: Mapping[str, Tensor], name: str, rows: slice, head: Head, tokens_n: Tensor,
          temperature: float) -> TokenDist:
    def logits(some: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            states = hidden[name][rows].detach()
            return project(states if some is None else states[some], head)

    return TokenDist(logits, tokens_n, temperature, logits)
