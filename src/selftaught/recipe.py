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
RUN_FILE = "run.yaml"  # the resolved recipe, in a run's folder
MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, of which there may be several


def recipe_names() -> list[str]:
    """The recipes that ship, by the name to call them with."""
    root = Path(str(RECIPES))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def is_recipe(name: str) -> bool:
    """Does a recipe go by that name: a shipped one, a YAML file, or a run's folder?"""
    return name in recipe_names() or Path(name).suffix in (".yaml", ".yml") or is_run(name)


def is_run(name: str) -> bool:
    """Is it the folder of a run, and no shipped recipe's name? `./quickstart` is always a folder."""
    return bool(name) and name not in recipe_names() and (Path(name) / RUN_FILE).is_file()


def label(recipe: str) -> str:
    """What to call a recipe in the names of files: a folder's name, another's without its extension."""
    return _named(recipe).name if is_run(recipe) else Path(recipe).stem


def read(recipe: str) -> dict[str, Any]:
    """The sections of a YAML file, of a shipped recipe, or of the run in a folder, whose `out` is that folder.

    Raises UserError where there is none of that name, or no mapping in it.
    """
    path, of_run = Path(recipe), is_run(recipe)
    if of_run:
        path = path / RUN_FILE
    elif not path.is_file() and recipe in recipe_names():
        path = Path(str(RECIPES)) / f"{recipe}.yaml"
    if recipe and path.is_dir():
        raise UserError(f"recipe {recipe!r}: a folder that holds no {RUN_FILE}; give a YAML file or a run's folder")
    if not path.is_file():
        raise UserError(f"recipe {recipe!r}: neither a file nor a shipped recipe; {nearest(recipe, recipe_names())}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: it is not valid YAML: {error}") from error
    tree = parse(text, f"recipe {path}: it is")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: must be a mapping of keys such as model, data, method; it is empty or a list")
    return tree | ({"out": str(_named(recipe))} if of_run else {})


def _named(folder: str) -> Path:
    """The folder by a path that ends in its name, which `.` does not."""
    path = Path(folder)
    return path.resolve() if path.name in ("", "..") else path


def parse(text: str, what: str) -> Any:
    """YAML as plain data. Raises UserError, "`what` not valid YAML: ...", also where a mapping has a key twice."""
    try:
        for mapping in _mappings(yaml.compose(text, yaml.SafeLoader), {}):
            _refuse_twice([key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE])
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, KeyError) as error:  # ValueError, KeyError: 2024-13-45, !!bool maybe
        raise UserError(f"{what} not valid YAML: {error}") from error


def _mappings(node: yaml.Node | None, seen: dict[int, bool]) -> Iterator[yaml.MappingNode]:
    """All of them at and under that place, each once, however often an alias names it.

    Raises MarkedYAMLError for what holds itself. `seen`: which nodes were come to, and whether all of each is known.
    """
    if node is None or seen.get(id(node)):
        return
    if id(node) in seen:
        raise yaml.MarkedYAMLError(problem="this holds itself", problem_mark=node.start_mark)
    seen[id(node)] = False
    if isinstance(node, yaml.MappingNode):
        yield node
    if isinstance(node, yaml.CollectionNode):
        for item in chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value:
            yield from _mappings(item, seen)
    seen[id(node)] = True


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
