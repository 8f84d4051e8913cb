"""What a method is, and how one is found by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

from torch import Tensor

from selftaught.errors import UserError, nearest
from selftaught.records import Credit, TokenBatch, TokenLoss, View
from selftaught.vocabulary import TokenDist

NOT_METHODS = {"base", "check", "describe", "fields", "objective", "several"}
NEEDS = ("reward", "group", "privilege", "answer", "solution", "feedback")  # what `needs` may name
PARTS = ("name", "needs", "views", "scores", "credit", "loss")  # what every method has


class Method(Protocol):
    """Two pure functions and the paper's constants (a frozen dataclass).

    `views` are scored beside the student; `scores` names those of them (and "student", "student.entropy") whose
    sampled-token log-probs `credit` needs. `credit` runs once per optimiser batch and returns constants;
    `loss` runs chunk by chunk and is unreduced. Only the student's distribution carries gradient.
    """

    name: ClassVar[str]
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
        UserError: an unknown name (the nearest is named), or a class that is no whole method.
    """
    if name in registry():
        return registry()[name]
    external = {point.name: point for point in entry_points(group="selftaught.methods")}
    if ":" not in name and name not in external:
        raise UserError(f"unknown method {name!r}; {nearest(name, [*registry(), *external])}")
    cls = _imported(name) if ":" in name else _loaded(name, external[name])
    _check_whole(name, cls)
    return cls


def _imported(name: str) -> Any:
    where, _, attribute = name.partition(":")
    try:
        module = _file(name, Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises
        kind = _kind(error, ImportError, SyntaxError)
        raise UserError(f"method {name!r} cannot be imported: {kind}{error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and hasattr(value, "needs")]
        hint = f"; {nearest(attribute, classes)}" if classes else ""
        raise UserError(f"method {name!r}: {where} has no {attribute!r}{hint}") from error


def _loaded(name: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever the package's code raises
        raise UserError(f"method {name!r} is the entry point {point.value!r}, which cannot be imported: "
                        f"{_kind(error, ImportError, SyntaxError, AttributeError)}{error}") from error


def _kind(error: Exception, *telling: type[Exception]) -> str:
    """The error's type, where its message does not tell it."""
    return "" if isinstance(error, telling) else f"{type(error).__name__}: "


def _file(name: str, path: Path) -> ModuleType:
    """The module in a file, read anew: one that was edited in the meantime counts as it is now."""
    if not path.is_file():
        raise UserError(f"method {name!r}: there is no file {str(path)!r}")
    # A name of its own for every path. The module must be registered: dataclasses look up its annotations there.
    registered = f"selftaught_method_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(registered, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[registered] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[registered]
        raise
    return module


def _check_whole(name: str, cls: Any) -> None:
    """Refuse (UserError) what is no dataclass with all that a `Method` must have."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"method {name!r} is no dataclass; write it as a class under @dataclass(frozen=True)")
    has = {field.name for field in dataclasses.fields(cls)}
    missing = [part for part in PARTS if part not in has and not hasattr(cls, part)]
    if missing:
        raise UserError(f"method {name!r} lacks {', '.join(missing)}; a method has {', '.join(PARTS)}")


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
    try:
        defaults = cls().views
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"method {name!r} cannot be made with its fields at their defaults: "
                        f"{_kind(error, TypeError, ValueError)}{error}") from error
    if cls not in registry().values():
        _check_parts(name, cls())
    changed = {view: _changed(name, view, defaults[view], fields.pop(view)) for view in list(fields)
               if view in defaults and isinstance(fields[view], Mapping)}
    for field in fields:
        if field not in known:
            raise UserError(f"method {name!r} has no field {field!r}; {nearest(field, [*known, *defaults])}")
    if changed:
        fields["views"] = {**defaults, **changed}
    try:
        return cls(**fields)
    except Exception as error:
        raise UserError(f"method {name!r}: {_kind(error, TypeError, ValueError)}{error}") from error


def _check_parts(name: str, method: Any) -> None:
    """Refuse (UserError) a user's own method whose parts are not what the trainer will read them as."""
    if not isinstance(method.views, Mapping) or not all(isinstance(view, View) for view in method.views.values()):
        raise UserError(f"method {name!r}: views must be a mapping of names to View(weights, context)")
    for part, known in (("needs", NEEDS), ("scores", (*method.views, "student", "student.entropy"))):
        given = getattr(method, part)
        if not isinstance(given, set | frozenset):
            raise UserError(f"method {name!r}: {part} must be a frozenset of names, not {given!r}")
        for each in given:
            if each not in known:
                raise UserError(f"method {name!r}: {part} names {each!r}; {nearest(str(each), known)}")
    for function, arguments in (("credit", ("batch", "logp")), ("loss", ("student", "views", "credit"))):
        try:
            inspect.signature(getattr(method, function)).bind(*arguments)
        except (TypeError, ValueError):
            raise UserError(f"method {name!r}: it must be {function}(self, {', '.join(arguments)})") from None


def _changed(name: str, view: str, default: View, changes: Mapping[str, Any]) -> View:
    known = [f.name for f in dataclasses.fields(View) if f.name != "nth"]  # which is the trainer's to set
    for field in changes:
        if field not in known:
            raise UserError(f"method {name!r}, view {view!r} has no field {field!r}; {nearest(field, known)}")
    return dataclasses.replace(default, **changes)
