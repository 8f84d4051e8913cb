"""What a method is, and how one is found by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from selftaught.errors import UserError, nearest
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist

NOT_METHODS = {"base", "objective"}


class Method(Protocol):
    """Two pure functions and the paper's constants (a frozen dataclass).

    `views` are scored beside the student; `scores` names those of them (and "student", "student.entropy") whose
    sampled-token log-probs `credit` needs. `credit` runs once per optimiser batch and returns constants;
    `loss` runs chunk by chunk and is unreduced. Only the student's distribution carries gradient.
    """

    name: ClassVar[str]
    arxiv: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    @property
    def views(self) -> Mapping[str, View]: ...

    @property
    def scores(self) -> frozenset[str]: ...

    def credit(self, batch: TokenBatch, logp: Mapping[str, Tensor]) -> Credit: ...

    def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit) -> TokenLoss: ...


@cache
def registry() -> dict[str, Any]:
    """Every method class of this package by its `name`: one file in this folder is all that a new one needs."""
    package = importlib.import_module("selftaught.methods")
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in NOT_METHODS:
            content = vars(importlib.import_module(f"selftaught.methods.{module.name}"))
            classes: list[Any] = [cls for cls in content.values() if isinstance(cls, type) and hasattr(cls, "arxiv")]
            found.update({cls.name: cls for cls in classes})
    return found


def names() -> list[str]:
    """The methods that ship, in alphabetical order."""
    return sorted(registry())


def method_class(name: str) -> Any:
    """The class of a shipped method, of `file.py:Class` or `module:Class`, or of an entry point.

    Raises:
        UserError: an unknown name; it says which is nearest.
    """
    if name in registry():
        return registry()[name]
    if ":" in name:
        return _imported(name)
    external = {point.name: point for point in entry_points(group="selftaught.methods")}
    if name in external:
        return external[name].load()
    raise UserError(f"unknown method {name!r}; {nearest(name, [*registry(), *external])}")


def _imported(name: str) -> Any:
    where, _, attribute = name.partition(":")
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise UserError(f"method {name!r}: there is no file {where!r}")
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, attribute)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"method {name!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise UserError(f"method {name!r}: {where} has no {attribute!r}") from error


def method_fields(cls: type) -> dict[str, Any]:
    """A method's fields and their defaults; `views` is the method's own business and is not among them."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.name != "views"}


def build(name: str, **fields: Any) -> Method:
    """The method of that name with these fields.

    `teacher` (and the name of any other view) may be given as a mapping of `View` fields, for example
    teacher={"weights": "ema", "rate": 0.05}.

    Raises:
        UserError: an unknown name or field (the nearest is named), or a value that the method refuses.
    """
    cls = method_class(name)
    known = method_fields(cls)
    defaults = cls().views
    changed = {view: _changed(name, view, defaults[view], fields.pop(view)) for view in list(fields)
               if view in defaults and isinstance(fields[view], Mapping)}
    for field in fields:
        if field not in known:
            raise UserError(f"method {name!r} has no field {field!r}; {nearest(field, [*known, *defaults])}")
    if changed:
        fields["views"] = {**defaults, **changed}
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name!r}: {error}") from error


def _changed(name: str, view: str, default: View, changes: Mapping[str, Any]) -> View:
    known = [f.name for f in dataclasses.fields(View)]
    for field in changes:
        if field not in known:
            raise UserError(f"method {name!r}, view {view!r} has no field {field!r}; {nearest(field, known)}")
    return dataclasses.replace(default, **changes)
