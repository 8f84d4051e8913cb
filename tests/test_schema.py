"""What a user reads of a recipe's fields is in the sections themselves, whole, and the page in docs/ is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from own import cli
from selftaught.errors import UserError
from selftaught.run import load_run
from selftaught.schema import as_markdown, as_text, parts

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_fields_is_current() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: selftaught recipe --markdown > docs/recipe.md"


def test_the_command_writes_the_page_byte_by_byte_or_one_section() -> None:
    said = cli("recipe", "--markdown")
    assert said.code == 0 and said.out == as_markdown()
    said = cli("recipe", "optim")
    assert said.code == 0 and said.out == as_text("optim") + "\n"
    assert "optim.lora.rank = 16   (whole number, above 0)\n" in said.out and "eval." not in said.out
    said = cli("recipe", "optim", "--markdown")
    assert said.code == 2 and "leave 'optim' out" in said.err
    with pytest.raises(UserError, match="did you mean 'privilege'"):
        as_text("privilige")


def test_every_field_says_what_it_is() -> None:
    silent = [f"{part.path}.{row.field}" for part in parts() for row in part.rows if not row.meaning]
    assert silent == [] and all(part.about for part in parts())


def test_the_page_has_every_key_of_a_resolved_run_with_its_default() -> None:
    run = load_run({"model": "m", "data": "d", "reward": "math", "method": "grpo",
                    "privilege": {"kind": "answer"}, "optim": {"steps": 100, "lora": 16}})  # fmt: skip
    seen = 0
    for part in parts():
        node: Any = run.resolved()
        for key in filter(None, part.path.split(".")):
            node = node[key]
        if not isinstance(node, dict):
            continue  # one of a list, or not in this run
        assert set(node) == {row.field for row in part.rows}
        for row in part.rows:
            if row.default != "required" and not isinstance(node[row.field], dict):
                said = yaml.safe_load(row.default)
                assert (float(said) if isinstance(node[row.field], float) else said) == node[row.field], row
                seen += 1
    assert seen > 60


def test_types_bounds_and_defaults_are_those_of_the_section() -> None:
    rows = {f"{part.path}.{row.field}": (row.type, row.default) for part in parts() for row in part.rows}
    assert rows["rollout.top_p"] == ("number, above 0, at most 1", "1.0")
    assert rows["privilege.on_overflow"] == ("error or drop or trim", "trim")
    assert rows["data.source"] == ("text or list of section", "required")
    assert rows["optim.betas"] == ("2 numbers", "[0.9, 0.999]")
    assert rows["reward.parts.options"] == ("mapping", "{}") and rows["optim.lora.rank"][1] == "16"
    assert rows[".optim"] == ("section", '{"steps": 100}') and rows[".teacher"] == ("section or null", "null")
