"""A recipe as plain data: by which names it goes, and what its YAML may hold."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from own import make_home, recipe_of
from selftaught.errors import UserError
from selftaught.recipe import is_recipe, label, parse, read
from selftaught.report import RunFolder, check_trackers, trackers
from selftaught.run import load_run, make_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("recipe"))


def run_in(folder: Path, home: Path) -> Path:
    """A folder with a run that has only begun, by `make_home`'s recipe."""
    sections = {key: value for key, value in recipe_of(home).items() if key != "report"}
    RunFolder(folder).write_run(make_run({**sections, "out": "elsewhere"}).resolved())
    return folder


def test_a_run_goes_by_its_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in(tmp_path / "lr-0.1", home)
    assert load_run(folder).out == str(folder) and load_run(f"{folder}/").out == str(folder)
    assert load_run(folder, ["out=another"]).out == "another"
    assert is_recipe(str(folder)) and label(str(folder)) == "lr-0.1"
    monkeypatch.chdir(folder)
    assert load_run(".").out == str(folder) and label(".") == "lr-0.1"
    assert not is_recipe("") and not is_recipe(str(tmp_path))


def test_a_folder_of_a_shipped_recipe_s_name_does_not_hide_it(home: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_run("quickstart")
    run_in(tmp_path / "quickstart", home)
    assert load_run("quickstart") == shipped and label("quickstart") == "quickstart"
    assert load_run("./quickstart").data.source == str(home / "mine.jsonl")


def test_trackers_that_nobody_asked_for_are_no_error_on_a_resume(home: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in(tmp_path / "run", home)
    monkeypatch.setitem(trackers.MODULES, "tensorboard", "no_such_package")
    check_trackers(load_run(folder).report)
    with pytest.raises(UserError, match="tensorboard is not installed"):
        check_trackers(load_run(folder, ["report.to=[tensorboard]"]).report)
    assert load_run(folder).report.to == make_run(yaml.safe_load((folder / "run.yaml").read_text())).report.to


def test_aliases_and_merges_are_read_as_yaml_means_them() -> None:
    text = "a: &x {k: 1}\nb: &y {l: 2}\nc:\n  <<: *x\n  <<: *y\n  m: 3\n1: one\n'1': other\n"
    assert parse(text, "it is") == yaml.safe_load(text) and parse(text, "it is")["c"]["m"] == 3
    assert parse("", "it is") is None and parse("a: !!str 1", "it is") == {"a": "1"}


def test_many_aliases_of_aliases_are_looked_at_once_each() -> None:
    levels = "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
    began = time.monotonic()
    assert len(parse(f"a0: &a0 [1]\n{levels}\n", "it is")) == 40
    assert time.monotonic() - began < 20.0  # 2 ** 40 of them would take years


@pytest.mark.parametrize("text", ["a: 2024-13-45", "a: !!bool maybe", "a: !!int foo", "a: &r [*r]", "a: *q",
                                  "[{a: 1, a: 2}]"])
def test_what_is_no_yaml_is_one_error(text: str) -> None:
    with pytest.raises(UserError, match=r"^it is not valid YAML: "):
        parse(text, "it is")


def test_what_is_no_recipe_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder that holds no run.yaml"):
        read(str(tmp_path))
    with pytest.raises(UserError, match=r"recipe 'quickstrat': neither a file nor .*did you mean 'quickstart'"):
        read("quickstrat")
