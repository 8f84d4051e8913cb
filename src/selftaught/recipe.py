"""A recipe as plain data: where it is found, how its YAML is read, and `a.b=c` overrides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from selftaught.errors import UserError, nearest

# `method: grpo` is short for {name: grpo}.
SHORT = {"data": "source", "method": "name", "privilege": "kind", "teacher": "model"}
RECIPES = files("selftaught") / "recipes"


def recipe_names() -> list[str]:
    """The recipes that ship, by the name to call them with."""
    root = Path(str(RECIPES))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def read(recipe: str) -> dict[str, Any]:
    """The sections of a YAML file, of a shipped recipe, or of the run in a folder, whose `out` is that folder.

    Raises UserError where there is none of that name, or no mapping in it.
    """
    path, of_run = Path(recipe), {}
    if path.is_dir() and (path / "run.yaml").is_file():
        path, of_run = path / "run.yaml", {"out": recipe}
    elif not path.is_file() and recipe in recipe_names():
        path = Path(str(RECIPES)) / f"{recipe}.yaml"
    if path.is_dir():
        raise UserError(f"recipe {recipe!r}: a folder that holds no run.yaml; give a YAML file or a run's folder")
    if not path.is_file():
        raise UserError(f"recipe {recipe!r}: neither a file nor a shipped recipe; {nearest(recipe, recipe_names())}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: it is not valid YAML: {error}") from error
    tree = parse(text, f"recipe {path}: it is")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: must be a mapping of keys such as model, data, method; it is empty or a list")
    return tree | of_run


def parse(text: str, what: str) -> Any:
    """YAML as plain data. Raises UserError, "`what` not valid YAML: ...", also where a mapping has a key twice."""
    try:
        for nodes in _mappings(yaml.compose(text, yaml.SafeLoader)):
            _refuse_twice([key for key, _ in nodes.value if isinstance(key, yaml.ScalarNode)])
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:  # a list that holds itself, say
        raise UserError(f"{what} not valid YAML: {error}") from error


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """All of them at and under that place."""
    if isinstance(node, yaml.MappingNode):
        yield node
    if isinstance(node, yaml.CollectionNode):
        for item in chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value:
            yield from _mappings(item)


def _refuse_twice(keys: Sequence[yaml.ScalarNode]) -> None:
    """Of two equal keys the last would count, and the first look as if it did."""
    first: dict[tuple[str, str], yaml.ScalarNode] = {}
    for key in keys:
        if first.setdefault((key.tag, key.value), key) is not key:
            line = first[key.tag, key.value].start_mark.line + 1
            raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice, first in line {line}, and only "
                                       "the last would count; join them, or remove one", problem_mark=key.start_mark)


def override(tree: dict[str, Any], given: str) -> None:
    """Set what `a.b=c` says in the tree, whose sections may be in their short form. Raises UserError."""
    path, equals, text = given.partition("=")
    if not equals or not path:
        raise UserError(f"override {given!r}: write it as key=value, for example optim.steps=10")
    value = parse(text, f"override {given!r}: the value is")
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        inner = node.get(key)
        if isinstance(inner, str) and key in SHORT:
            inner = {SHORT[key]: inner}
        elif isinstance(inner, str | list) and key == "reward":
            parts = inner if isinstance(inner, list) else [inner]
            inner = {"parts": [{"name": part} if isinstance(part, str) else part for part in parts]}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"override {given!r}: {key} is {inner!r}, which has no fields; override it whole")
        node[key] = dict(inner)
        node = node[key]
    node[last] = value
