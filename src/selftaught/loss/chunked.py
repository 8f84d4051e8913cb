"""The chunked vocabulary head: any method's loss and gradients without a tensor of shape (N, V).

`chunk` tokens at a time, the hidden states are projected, the method's loss is taken, and its gradient flows to
those logits there and then; from the logits' gradient come the rows of the hidden states' gradient and one sum
into the head's. The backward pass only scales what the forward pass found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selftaught.records import Credit, TokenLoss
from selftaught.tensors import fast_linear, upcast
from selftaught.vocabulary import Head, TokenDist, affine, chunk_size, finish, project

_LOSS = ""  # among the metrics' names
LossFunction = Callable[[TokenDist, Mapping[str, TokenDist], Credit], TokenLoss]


@dataclass(frozen=True)
class Reduced:
    """loss: scalar, differentiable in the student's hidden states and head. token_loss (N,), metrics (N,): detached."""

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class _Gradients:
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    placed: bool = False  # the weight's is where it belongs already
    spent: bool = False

    def hand_out(self, scale: Tensor, keep: bool) -> list[Tensor | None]:
        """The gradients times `scale`; unless they are to be kept, the last reference to them.

        The head's is the largest tensor here: autograd copies what somebody else still holds, and takes over the rest.
        """
        if self.spent:
            raise RuntimeError("backward was called on this loss before; call it with retain_graph=True the first time")
        found = [self.hidden, None if self.placed else self.weight, self.bias]
        factor = scale.item()
        if self.placed and factor != 1:
            raise RuntimeError(f"the gradient of this loss's head was added in the forward pass, and the backward pass "
                               f"scales it by {factor}; put the factor into the weights of the tokens")
        if keep:
            return [None if g is None else g * scale.to(g.dtype) for g in found]
        self.hidden = self.weight = self.bias = None
        self.spent = True
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
        return (None, None, *ctx.grads.hand_out(scale, _keeps_graph()))


def _keeps_graph() -> bool:
    """Was the running backward pass asked to retain its graph? True where this torch does not say."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:
        return True


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
    weight32 = upcast(head.weight.detach())
    bias32 = None if head.bias is None else upcast(head.bias.detach())
    grads = _Gradients(
        torch.zeros_like(student) if needs[0] else None,
        head_grad if needs[1] else None,  # None: the first chunk makes it; to fill it with zeros takes a chunk's time
        torch.zeros_like(bias32) if needs[2] and bias32 is not None else None,
        placed=head_grad is not None,
    )
    total = weight32.new_zeros(())
    # What outlives a chunk is made once: small blocks kept from each would lie in the holes that the next chunk needs.
    found_N: dict[str, Tensor] = {}
    step = chunk or chunk_size(head.weight.shape[0])
    for start in range(0, tokens_N.shape[0], step):
        rows = slice(start, start + step)
        h32 = upcast(student.detach()[rows])
        with torch.enable_grad() if any(needs) else torch.no_grad():
            raw = affine(h32, weight32, bias32).requires_grad_(any(needs))
            dist = TokenDist(finish(raw, head), tokens_N[rows], temperature)
            views = {name: _view(hidden, name, rows, heads[name], tokens_N[rows], temperature)
                     for name in hidden if name != "student"}
            out = loss(dist, views, {name: value[rows] for name, value in credit.items()})
            weighted = (masked(out.loss, weight_N[rows]) * weight_N[rows]).sum()
        if any(needs) and weighted.requires_grad:
            _accumulate(grads, needs[1], rows, torch.autograd.grad(weighted, raw)[0], h32, weight32)
        with torch.no_grad():
            total += weighted
            for name, value in {_LOSS: out.loss, "entropy": dist.entropy(), "logp": dist.at_sampled,
                                **out.metrics}.items():
                if name not in found_N:
                    found_N[name] = value.new_zeros(tokens_N.shape[0])
                found_N[name][rows] = value
    reduced = total
    if any(needs):
        if needs[1]:
            grads.weight = torch.zeros_like(weight32) if grads.weight is None else grads.weight
            grads.weight = grads.weight.to(head.weight.dtype)
        reduced = _Precomputed.apply(total, grads, student, head.weight, head.bias)
    return Reduced(reduced, found_N.pop(_LOSS, weight_N.new_zeros(0)), found_N)


def _view(hidden: Mapping[str, Tensor], name: str, rows: slice, head: Head, tokens_n: Tensor,
          temperature: float) -> TokenDist:
    def logits(some: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            states = hidden[name][rows].detach()
            return project(states if some is None else states[some], head)

    return TokenDist(logits, tokens_n, temperature, logits)


def _accumulate(grads: _Gradients, weight: bool, rows: slice, grad_nV: Tensor, h32: Tensor, weight32: Tensor) -> None:
    if grads.hidden is not None:
        grads.hidden[rows] = fast_linear(grad_nV, weight32.t()).to(grads.hidden.dtype)
    if weight and grads.weight is None:
        grads.weight = grad_nV.t() @ h32
    elif grads.weight is not None:
        grads.weight.addmm_(grad_nV.t(), h32)
    if grads.bias is not None:
        grads.bias.add_(grad_nV.sum(0))
