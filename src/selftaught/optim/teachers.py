"""The weights of teachers that are the student's own past: initial, exponential moving average, snapshot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import Module

from selftaught.errors import UserError, nearest
from selftaught.heap import in_a_row
from selftaught.records import Context, View

_KEPT = ("initial", "ema", "snapshot")
PIECE = 2**21  # numbers of a difference at a time: a whole embedding's would be the peak of a step's memory
_Key = tuple[str, float]  # kind, and its rate or interval


class Teachers:
    """Copies of the student for those of `views` whose weights are `initial`, `ema` or `snapshot`.

    Views that need the same weights (same kind, same rate or interval) share one copy. Tied weights are
    kept once, under their first name. Only what can change is copied: trainable parameters and persistent
    buffers; `torch.func.functional_call` takes the rest, and the tied names, from the student itself. So
    freeze what is to be frozen before this is built. An average is kept in float32 for a narrower student,
    because a small rate would vanish in bfloat16, and is served in the student's dtype.
    """

    def __init__(self, views: Mapping[str, View], student: Module) -> None:
        self._student = student
        persistent = student.state_dict(keep_vars=True).keys()
        self._buffers = [name for name, _ in student.named_buffers() if name in persistent]
        self._parameters = [name for name, p in student.named_parameters() if p.requires_grad]
        self._keys = {name: _key(name, view) for name, view in views.items()}
        kept = [key for key in dict.fromkeys(self._keys.values()) if key[0] in _KEPT]
        kinds = [kind for kind, _ in kept]
        self._labels = {key: key[0] if kinds.count(key[0]) == 1 else f"{key[0]}-{key[1]:g}" for key in kept}
        self._served = {key: _copied(self._live()) for key in kept}
        self._average: dict[_Key, dict[str, Tensor]] = {}  # the very tensors served, where those are wide enough
        for key in kept:
            if key[0] == "ema":
                self._average[key] = {n: _widened(t) for n, t in self._served[key].items()}
        self._copied_at = {key: 0 for key in kept if key[0] == "snapshot"}  # steps done at the last copy

    def weights(self, view: str) -> Mapping[str, Tensor] | None:
        """The weights of a view by parameter name, for `functional_call`; None: the student's own (`live`).

        The tensors are updated in place, so the mapping stays valid. An `external` view has its own model.
        """
        key = self._keys[view]
        assert key[0] != "external", f"view {view!r} is scored by another model, whose weights are not kept here"
        return self._served.get(key)

    @torch.no_grad()
    def update(self, step: int, skipped: bool = False) -> None:
        """Follow the student after step number `step` (from 0), once its last update is done.

        ema:       t <- (1 - rate) t + rate s     (buffers are copied)
        snapshot:  t <- s  when `every` divides the number of steps done, step + 1; one that falls on a
                   skipped step is made up for after the next
        Nothing moves where the optimiser `skipped` the step.
        """
        if skipped:
            return
        live = self._live()
        for key, average in self._average.items():
            for name in self._parameters:
                average[name].lerp_(live[name].to(average[name].dtype), key[1])
            for name in self._buffers:
                average[name].copy_(live[name])
            self._serve(key)
        for key, last in self._copied_at.items():
            if (step + 1) // int(key[1]) > last // int(key[1]):
                self._copied_at[key] = step + 1
                for name, old in self._served[key].items():
                    old.copy_(live[name])

    @torch.no_grad()
    def distances(self) -> dict[str, float]:
        """`teacher/KIND/distance`: ||student - teacher|| / ||student||, l2 over all trainable parameters.

        Where one kind is kept with several rates or intervals, KIND carries it: `ema-0.05`.
        """
        live = self._live()
        size = _norm(piece for n in self._parameters for piece in _pieces(live[n])) if self._labels else 0.0
        found = {}
        for key, label in self._labels.items():
            kept = self._average.get(key, self._served[key])
            gap = _norm(s.to(t.dtype) - t for n in self._parameters
                        for s, t in zip(_pieces(live[n]), _pieces(kept[n]), strict=True))
            found[f"teacher/{label}/distance"] = gap / size if size > 0 else gap
        return found

    def state_tensors(self) -> dict[str, Tensor]:
        """`KIND/NAME` for every tensor kept, averages in their own precision. Not copied."""
        return {
            f"{label}/{name}": tensor
            for key, label in self._labels.items()
            for name, tensor in self._average.get(key, self._served[key]).items()
        }

    def state(self) -> dict[str, Any]:
        """What is not a tensor, as JSON: the number of steps done when each snapshot was last taken."""
        return {self._labels[key]: steps_done for key, steps_done in self._copied_at.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from `state_tensors()` and `state()`, bit for bit. Values are copied.

        Raises `UserError` where the teachers in the checkpoint are not those of this run.
        """
        mine = self.state_tensors()
        other = sorted(mine.keys() ^ tensors.keys()) or [n for n in mine if mine[n].shape != tensors[n].shape]
        if other:
            raise UserError(
                f"the checkpoint's teachers do not fit this run's: {other[0]!r} differs, with {len(other)} in all; "
                "resume with the method, its teacher fields and the model that the checkpoint was made with"
            )
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        for key in self._average:
            self._serve(key)
        self._copied_at = {key: int(state[self._labels[key]]) for key in self._copied_at}

    def _serve(self, key: _Key) -> None:
        for name, average in self._average[key].items():
            if self._served[key][name] is not average:
                self._served[key][name].copy_(average)

    def _live(self) -> dict[str, Tensor]:
        """The student's own tensors that a teacher must keep, detached."""
        live = dict(self._student.named_parameters()) | dict(self._student.named_buffers())
        return {name: live[name].detach() for name in (*self._parameters, *self._buffers)}


def _copied(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    row = in_a_row(live)
    return {name: row[name] if name in row else tensor.clone() for name, tensor in live.items()}


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.flatten().split(PIECE)


def _norm(pieces: Iterable[Tensor]) -> float:
    """l2 over all numbers of all pieces."""
    return math.hypot(*(float(piece.norm()) for piece in pieces))


def check_views(views: Mapping[str, View]) -> None:
    """Raise UserError for a view whose weights or context are unknown, or lack their rate or interval."""
    for name, view in views.items():
        for field, known in (("weights", (*_KEPT, "live", "external")), ("context", get_args(Context))):
            value = getattr(view, field)
            if value not in known:
                raise UserError(f"view {name!r}: {field} = {value!r}; {nearest(str(value), known)}")
        _key(name, view)


def _key(name: str, view: View) -> _Key:
    """Two views with the same key need the same weights."""
    if view.weights == "ema":
        if view.rate is None or not 0 < view.rate <= 1:
            raise UserError(f"view {name!r}: the rate of an ema teacher must be above 0 and at most 1, not {view.rate}")
        return "ema", view.rate
    if view.weights == "snapshot":
        if view.every is None or view.every < 1:
            raise UserError(f"view {name!r}: a snapshot teacher is taken every 1 step or more, not {view.every}")
        return "snapshot", view.every
    return view.weights, 0.0


def _widened(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of a narrower floating one."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor
