"""The fields, defaults and views of every method: what `objective(name, ...)` computes without a word more."""

from __future__ import annotations

from typing import Any

import pytest

from selftaught.methods import build, method_class, method_fields, names
from selftaught.records import View

CLIP = {"eps_low": 0.2, "eps_high": 0.2}
HIGHER = {"eps_low": 0.2, "eps_high": 0.28}
OTHER = {"teacher": View("external", "plain")}
TABLE: dict[str, tuple[dict[str, Any], dict[str, View]]] = {
    "grpo": ({**CLIP, "dual_clip": None, "scale_by_std": True}, {}),
    "dapo": ({**HIGHER, "dual_clip": None}, {}),
    "dr_grpo": (CLIP, {}),
    "gspo": ({"eps_low": 3e-4, "eps_high": 4e-4}, {}),
    "cispo": ({"cap": 5.0}, {}),
    "opd": ({"coef": 1.0}, OTHER),
    "gkd": ({"divergence": "js", "weight": 0.5, "temperature": 1.0}, OTHER),
    "opsd": ({"clip": 0.05, "temperature": 1.1}, {"teacher": View("initial", "privileged")}),
    "sdft": ({"skip": 3, "temperature": 1.0}, {"teacher": View("ema", "privileged", rate=0.01)}),
    "sdpo": ({"divergence": "js", "top_k": 100, "is_cap": 2.0}, {"teacher": View("ema", "privileged", rate=0.05)}),
    "rlsd": ({"eps_w": 0.2, "lam": 0.5, "lam_decay": 50, **HIGHER, "dual_clip": 3.0},
             {"teacher": View("snapshot", "privileged", every=10)}),
    "sdpg": ({"beta": 1e-3, "beta_warmup": 50, "beta_decay": 350, "steps": 400, "alpha": 1e-3, "reference_kl": "urkl",
              "gate": "positive", "exclude_terminal": False, "eps_low": None, "eps_high": None, "dual_clip": None},
             {"teacher": View("live", "privileged"), "reference": View("initial", "plain")}),
    "demopsd": ({"alpha_max": 0.15, "beta": 50.0, "top_k": 100, "floor": 1e-8, "is_cap": 2.0},
                {"teacher": View("ema", "privileged", rate=0.05), "reference": View("ema", "plain", rate=0.05)}),
    "dopd": ({"beta_light": 0.6, "beta_weak": 0.3, "top_k": 128, "trim": 0.05},
             {"teacher": View("external", "privileged"), "privileged_student": View("live", "privileged")}),
}  # fmt: skip


def test_every_method_that_ships_has_its_row() -> None:
    assert sorted(TABLE) == names()


@pytest.mark.parametrize("name", TABLE)
def test_a_method_has_exactly_these_fields_defaults_and_views(name: str) -> None:
    fields, views = TABLE[name]
    assert method_fields(method_class(name)) == fields
    assert build(name).views == views
