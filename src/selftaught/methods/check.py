"""A method is watched through its first step: what is broken in it is named before anything was updated by it.

That its metrics are the same in every chunk is watched in all steps.

Nothing here changes a number or draws one: a method that keeps its contract gives the same bits with and without.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from selftaught.errors import UserError
from selftaught.methods.base import Method, registry
from selftaught.methods.several import Several
from selftaught.records import Credit, TokenBatch, TokenLoss
from selftaught.vocabulary import TokenDist

PROBED = 24  # tokens of a chunk on which it is cut in two
CLOSE = 1e-3  # share of the largest value by which two cuts of a chunk may differ: rounding is far below it
NOISE = 1e-7  # below it losses and gradients are rounding, and prove nothing
TAKEN = ("entropy", "logp")  # metrics of every method


def checked(method: Method) -> Method:
    """The same method, whose first step that teaches anything raises UserError for what is broken in it:

    a wrong shape, NaN or infinity, a loss without gradient, gradient into anything but the student, a credit that is
    not constant, and a token's loss that depends on which other tokens are in its chunk.
    """
    return cast(Method, Checked(method))


class Checked:
    """`checked`. Everything but `credit` and `loss` is the method's own."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._class = type(method.method if isinstance(method, Several) else method)  # whose code may be broken
        self._own = self._class not in registry().values()
        self._watching, self._shown = True, False  # is this step watched; has one chunk of it shown a gradient
        self._metrics: list[str] | None = None  # of the first chunk of an optimiser batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit:
        self._watching, self._metrics = not self._shown, None
        with self._told("credit"):
            credit = self._method.credit(batch, logp)
        if self._watching:
            self._check_credit(credit, batch)
        return credit

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss:
        with self._told("loss"):
            out = self._method.loss(student, views, credit)
        if self._watching:
            self._check_loss(out, student.tokens.shape[0], credit["counted"])
            if torch.is_grad_enabled() and not self._shown:
                with self._told("loss"):
                    self._shown = self._check_gradient(student, views, credit)
        self._metrics, first = sorted(out.metrics), self._metrics
        if first is not None and first != self._metrics:  # looked at in every step: chunks are put together by name
            self._broken("loss", f"returns metrics {', '.join(first)!r} of one chunk and "
                         f"{', '.join(self._metrics)!r} of another; return the same in every chunk, 0 where there is "
                         "nothing to tell")
        return out

    @contextmanager
    def _told(self, function: str) -> Iterator[None]:
        """An error inside a user's own method names the method, the function and the line."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not self._own:
                raise
            file = inspect.getfile(self._class)
            line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == file),
                        None)
            where = "" if line is None else f" ({file}, line {line})"
            raise UserError(f"method {self._method.name!r}: its {function} raised {type(error).__name__}: {error}"
                            f"{where}") from error

    def _broken(self, function: str, what: str) -> NoReturn:
        raise UserError(f"method {self._method.name!r}: its {function} {what}")

    def _check_credit(self, credit: Any, batch: TokenBatch) -> None:
        tokens = batch.tokens
        if not isinstance(credit, Mapping) or "counted" not in credit:
            self._broken("credit", "must return a mapping with `counted`; begin with {**base_credit(batch), ...}")
        for key, value in credit.items():
            self._check_tensor("credit", f"credit[{key!r}]", value, tokens.shape[0],
                               "broadcast(value_B, batch) gives every token the value of its rollout")
            if value.requires_grad:
                self._broken("credit", f"returns credit[{key!r}] with a gradient, but credit is constant; detach it")
            if value.device != tokens.device:
                self._broken("credit", f"returns credit[{key!r}] on {value.device}, the batch is on {tokens.device}")
        counted = credit["counted"]
        if counted.dtype != torch.bool:
            self._broken("credit", f"returns credit['counted'] as {counted.dtype}; it says yes or no: make it bool")
        for key, value in credit.items():
            wrong = int((value.isnan() & counted).sum())
            if wrong:
                self._broken("credit", f"returns credit[{key!r}] with NaN at {wrong} of {int(counted.sum())} counted "
                             "tokens; a rollout without a score has reward NaN, and must not be counted "
                             "(base_credit with needs_reward=True)")

    def _check_tensor(self, function: str, what: str, value: Any, n: int, remedy: str) -> None:
        if not isinstance(value, Tensor):
            self._broken(function, f"returns {what} as a {type(value).__name__}, not as a tensor ({n},); {remedy}")
        if value.shape != (n,):
            self._broken(function, f"returns {what} of shape {tuple(value.shape)}, not ({n},), one number per token; "
                         f"{remedy}")

    def _check_loss(self, out: Any, n: int, counted: Tensor) -> None:
        if not isinstance(out, TokenLoss):
            self._broken("loss", f"returns a {type(out).__name__}; return TokenLoss(loss), with metrics if you like")
        self._check_tensor("loss", "a loss", out.loss, n, "leave the mean over tokens to loss.reduction")
        for key, value in out.metrics.items():
            self._check_tensor("loss", f"metric {key!r}", value, n, "metrics are per token; their mean is logged")
            if key in TAKEN:
                self._broken("loss", f"returns a metric {key!r}, a name that every method's metrics have; rename it")
        wrong = int((counted & ~out.loss.isfinite()).sum())
        if wrong:
            kind = "NaN" if out.loss[counted].isnan().any() else "infinite"
            self._broken("loss", f"is {kind} at {wrong} of {int(counted.sum())} counted tokens of a chunk; look for "
                         "0 * inf, a logarithm of 0, and tokens that a view holds at -inf and the student does not")

    def _check_gradient(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> bool:
        """Raises UserError by name; False: this chunk has too little gradient to tell."""
        rows = credit["counted"].nonzero().squeeze(-1)
        if rows.shape[0] < 2:
            return False
        rows = rows[torch.linspace(0, rows.shape[0] - 1, min(PROBED, rows.shape[0]), device=rows.device).long()]
        # Weights that differ: with equal ones the mean of a chunk's losses has the gradient of the losses.
        weight = torch.arange(1, rows.shape[0] + 1, device=rows.device) / rows.shape[0]

        def cut(*pieces: slice) -> tuple[Tensor, Tensor]:
            found = [self._gradient(student, views, credit, rows[piece], weight[piece]) for piece in pieces]
            return torch.cat([loss for loss, _ in found]), torch.cat([grad for _, grad in found])

        whole, third = slice(None), max(1, rows.shape[0] // 3)
        loss, grad = cut(whole)
        wrong = int((~grad.isfinite()).any(-1).sum())
        if wrong:
            self._broken("loss", f"is finite, but its gradient is not, at {wrong} of {rows.shape[0]} tokens; "
                         "torch.where lets the NaN of the branch not taken into the gradient: mask before exp and log")
        largest = grad.abs().max()
        if largest <= NOISE and loss.abs().max() <= NOISE:
            return False
        pairs = zip((loss, grad), cut(slice(None, third), slice(third, None)), strict=True)
        if any(_differ(one, other) for one, other in pairs):
            self._say_why(lambda: cut(whole), (loss, grad))
        return bool(largest > NOISE)

    def _say_why(self, again: Callable[[], Sequence[Tensor]], first: Sequence[Tensor]) -> NoReturn:
        if any(_differ(one, other) for one, other in zip(first, again(), strict=True)):
            self._broken("loss", "gives other values for the same tokens when it is called again; it must not draw "
                         "random numbers or keep a state")
        self._broken("loss", "depends on the chunk: a token's loss changes with the other tokens of its chunk (a mean, "
                     "a maximum or a rank over them?); move what compares tokens to credit, which sees the whole "
                     "batch, and leave the mean to loss.reduction")

    def _gradient(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit, rows: Tensor,
                  weight: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (n,) of some tokens on their own, and the gradient (n, V) of their weighted sum."""
        leaf = student.raw[rows].detach().requires_grad_()
        own = TokenDist(leaf, student.tokens[rows], student.temperature)
        theirs = {name: view[rows] for name, view in views.items()}
        out = self._method.loss(own, theirs, {key: value[rows] for key, value in credit.items()})
        self._check_loss(out, rows.shape[0], credit["counted"][rows])
        others = [found for found in _leaves(out.loss) if found is not leaf]
        if others:
            names = [name for name in views if any(one is dist.raw for one in others
                                                   for dist in (views[name], theirs[name]))]
            into = f"view {names[0]!r}" if names else f"a tensor of shape {tuple(others[0].shape)}"
            self._broken("loss", f"sends gradient into {into}; only the student learns: detach it")
        grad = torch.autograd.grad((out.loss * weight).sum(), leaf, allow_unused=True)[0] if out.loss.requires_grad \
            else None
        if grad is None and (out.loss != 0).any():
            self._broken("loss", "does not depend on the student: it has no gradient; use student.at_sampled or "
                         "student.log_probs without detach")
        return out.loss.detach(), torch.zeros_like(leaf) if grad is None else grad


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > CLOSE * one.abs().max() + NOISE)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a gradient of `loss` would be added to."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        todo += [parent for parent, _ in node.next_functions]
    return found
