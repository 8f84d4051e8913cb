"""The small recipes: the quickstart's task under each privileged method, changed only where their comments say so."""

from __future__ import annotations

from typing import Any

import pytest

from selftaught.methods import build
from selftaught.recipe import recipe_names
from selftaught.run import load_run

SAME = ("model", "data", "rollout", "reward", "optim", "checkpoint", "eval", "report", "seed")
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {  # privilege, and what is not as published
    "opsd": ("answer", {"clip": None, "temperature": 1.0}),
    "sdft": ("answer", {"skip": 0}),
    "rlsd": ("answer", {"lam_decay": None}),
    "sdpg": ("answer", {"steps": 30, "beta_warmup": 4, "beta_decay": 26, "beta": 0.1}),
    "sdpo": ("demonstration", {}),
    "demopsd": ("demonstration", {}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_small_recipe_is_the_quickstart_with_another_method(name: str) -> None:
    assert f"small/{name}" in recipe_names()
    run, quickstart = load_run(f"small/{name}"), load_run("quickstart")
    for section in SAME:
        assert getattr(run, section) == getattr(quickstart, section), section
    kind, fields = CHANGED[name]
    assert run.privilege is not None and run.privilege.kind == kind
    assert run.method.build() == build(name, **fields)
    assert run.loss.reduction == ("sequence_mean" if name == "sdft" else quickstart.loss.reduction)
    assert run.out == f"runs/{name}" and run.optim.steps == 30
