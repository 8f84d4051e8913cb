"""What a user reads of the methods is in the methods' own files, whole, and the page in docs/ is made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from own import METHOD, cli
from selftaught.methods import method_class, names
from selftaught.methods.describe import LABELS, as_markdown, as_text, describe

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_methods_is_current() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: selftaught methods --markdown > docs/methods.md"


def test_the_command_writes_the_page_byte_by_byte() -> None:
    said = cli("methods", "--markdown")
    assert said.code == 0 and said.out == as_markdown()
    said = cli("methods", "rlsd", "--markdown")
    assert said.code == 2 and "leave 'rlsd' out" in said.err


@pytest.mark.parametrize("name", names())
def test_every_method_says_all_that_a_reader_asks(name: str) -> None:
    described = describe(name)
    assert [field.name for field in described.fields if not field.meaning] == []
    assert {"Divergence", "Deviations", "Equals", "Criticism"} <= described.notes.keys() <= set(LABELS)
    assert all(described.notes.values())
    assert ("Sees" in described.notes) is bool(described.views)
    assert re.search(r"^    .*loss +=|^    (kl_|route)", described.body, re.M), "no equation"
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}", described.source)
    text = as_text(described)
    for said in (*(field.meaning for field in described.fields), *described.views, described.teaches):
        assert said in text
    assert max(map(len, text.splitlines())) <= 120


def test_who_teaches_and_what_must_exist_follow_from_views_and_needs() -> None:
    table = {name: describe(name).row() for name in names()}
    assert table["grpo"][1:5] == ("the verifier", "the rollout", "none; clipped surrogate", "a reward, groups")
    assert table["sdpg"][1] == "the verifier, and the model itself, live"  # not its reference, which only holds it back
    assert table["dopd"][1] == "another model, and the model itself, live"
    assert table["dopd"][4] == "a privilege, another model" and table["gkd"][4] == "another model"
    assert table["demopsd"][1] == "the model's own average"


def test_a_default_that_changes_changes_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = method_class("rlsd")
    monkeypatch.setattr(cls.__dataclass_fields__["eps_w"], "default", 0.3)
    field = next(field for field in describe("rlsd").fields if field.name == "eps_w")
    assert (field.default, field.meaning) == ("0.3", "w stays within 1 - eps_w and 1 + eps_w")


def test_a_users_method_is_described_as_far_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METHOD.replace("scale: float = 1.0", "scale: float = 1.0  #: of the loss"))
    said = cli("methods", f"{path}:Mine")
    assert said.code == 0
    for line in ("no paper named", "teaches:     the model itself, live", "sees:        a privilege",
                 "divergence:  ?", "needs:       a privilege", "  scale = 1.0  of the loss",
                 "  view teacher: live weights; privileged prompt"):  # fmt: skip
        assert line in said.out, line


def test_the_readme_names_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in names() if f"`{name}`" not in readme] == []
