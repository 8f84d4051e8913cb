"""The laws study: its known numbers, that each law's two ways agree, that controls fail, and that faults are seen."""

from __future__ import annotations

import builtins
import itertools
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from own import cli
from selftaught import loss
from selftaught.errors import UserError
from selftaught.report.page import Figure, Part, Table, write_page, write_pngs
from selftaught.report.svg import Line, line_chart
from selftaught.studies import STUDIES, start
from selftaught.studies import laws as study
from selftaught.studies.laws import bumps, demonstrations, demopsd, floors, pooling, rlsd
from selftaught.studies.laws.law import Law, check
from selftaught.studies.laws.tables import copy_teachers, descend, distributions, kl

# What was computed before, in plain numpy, by other people's code than this.
KNOWN = {
    "copying": "2.381 1.890 1.5 9.216 5.258 3.0 53.15 21.87 9.0",
    "pooling": "9.216 9.216",
    "toy": "0.364",
    "target": "6.5 10.7 27.75 .0022 .0112 .0289 .0498 .0953 .1431 .1500 .0037 .0187 .0471 .0779 .1272 .1494 .15 "
              ".0075 .0367 .0858 .1227 .1480 .15 .15 .0105 .0505 .1082 .1385 .1497 .15 .15 "
              ".0150 .0693 .1293 .1470 .15 .15 .15",
    "minority": ".869 .094 .8825 .0829 .944 .032",
    "increments": "-0.8 -0.9 -1.1 -1.2",
    "routing": "0.2500",
}  # fmt: skip
CONTROLLED = {"optimum", "ratios", "pooling", "target", "exploration", "increments", "routing", "floors"}


@cache
def law(name: str) -> Law:
    return next(study.compute([name], smoke=True))


@pytest.mark.parametrize("name", study.LAWS)
def test_both_ways_agree_and_every_control_differs(name: str) -> None:
    assert [c.what for c in law(name).checks if not c.holds] == []
    assert any(c.control for c in law(name).checks) == (name in CONTROLLED)
    assert all(math.isfinite(x) for c in law(name).checks for x in (*c.closed, *c.found))


@pytest.mark.parametrize("name", study.LAWS)
def test_the_known_numbers_come_out_to_the_digits_given(name: str) -> None:
    known = [(text, *pair) for c in law(name).checks if c.known
             for text, *pair in zip(c.known, c.closed, c.found, strict=True)]
    assert " ".join(text for text, *_ in known) == KNOWN.get(name, "")
    for text, closed, found in known:
        half = 0.5 * 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-9)
        assert abs(closed - float(text)) <= half and abs(found - float(text)) <= half


# Faults must be seen: in a closed form, and in the package's own loss.


def tilted_twice(base: Tensor, teachers: Tensor, weight: Tensor, beta: float) -> Tensor:
    return (base + demonstrations.expected_pcmi(base, teachers, weight) / (2 + beta)).log_softmax(-1)


def swapped(divergence: str, logt: Any, logs: Any, weight: float = 0.5) -> Tensor:
    return loss.kl(logt, logs) if divergence == "kl_student_teacher" else loss.kl(logs, logt)


def with_shares_swapped(student: Any, teacher: Any, reference: Any, share: Tensor, floor: float) -> Tensor:
    return loss.kl(student.log_probs, demopsd.path(teacher.log_probs, reference.log_probs, share[:, None]))


@pytest.mark.parametrize(
    ("name", "place", "fault"),
    [
        ("copying", "selftaught.studies.laws.demonstrations.tilted", tilted_twice),
        ("optimum", "selftaught.methods.sdpg.kl", lambda p, q: loss.kl(q, p)),
        ("ratios", "selftaught.methods.sdpg.reference_penalty", lambda kind, logp, ref: (logp - ref).square() / 4),
        ("copying", "selftaught.methods.sdpo.divergence", swapped),
        ("copying", "selftaught.methods.gkd.divergence", swapped),
        ("pooling", "selftaught.methods.sdpo.divergence", swapped),
        ("target", "selftaught.methods.demopsd.kl_to_barycenter", with_shares_swapped),
        ("exploration", "selftaught.studies.laws.demopsd.barycenter", lambda t, r, a: demopsd.path(t, r, a[:, None])),
        ("minority", "selftaught.methods.demopsd.js", lambda p, q, floor: loss.kl(p, q)),
        ("increments", "selftaught.methods.rlsd.evidence_weight", lambda d, a, eps: d.exp().clamp(1 - eps, 1 + eps)),
        ("routing", "selftaught.methods.dopd.kl", lambda p, q: loss.kl(q, p)),
        ("floors", "selftaught.methods.gkd.divergence", swapped),
    ],
)  # fmt: skip
def test_a_planted_fault_is_seen(name: str, place: str, fault: Callable[..., Any],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, fault)
    try:
        checks = next(study.compute([name], smoke=True)).checks
    except AssertionError:
        return  # an invariant, or a descent that finds no rest
    assert not all(c.holds for c in checks)


def test_a_check_fails_beyond_its_tolerance_off_its_known_digits_and_as_a_control_that_agrees() -> None:
    assert check("x", 1.0, 1.05, "y", 0.1).holds and not check("x", 1.0, 1.2, "y", 0.1).holds
    assert check("x", 0.8695, 0.8699, "y", 0.1, known=[".870"]).holds
    assert not check("x", 0.8695, 0.8604, "y", 0.1, known=[".870"]).holds
    assert check("x", 1.0, 1.2, "y", 0.1, control=True).holds
    assert not check("x", 1.0, 1.05, "y", 0.1, control=True).holds
    assert check("x", [1.0, 2.0], torch.tensor([1.0, 2.5]), "y", 0.1).verdict == "FAILS"
    with pytest.raises(AssertionError, match="2 and 1 numbers"):
        check("x", [1.0, 2.0], 1.0, "y", 0.1)


# The closed forms themselves, against brute force.


def test_no_policy_on_a_grid_of_the_simplex_beats_the_tilted_base() -> None:
    base, teachers, weight = copy_teachers(3.0, 0.1)
    grid = torch.tensor([(a, b, 60 - a - b) for a, b in itertools.product(range(1, 59), repeat=2) if a + b < 60])
    for beta in (0.0, 1.0):

        def cost(logp: Tensor, beta: float = beta) -> Tensor:
            return sum(w * kl(logp, t) for w, t in zip(weight, teachers, strict=True)) + beta * kl(logp, base)

        best = demonstrations.tilted(base, teachers, weight, beta)
        assert (cost((grid / 60.0).double().log()) > cost(best) - 1e-12).all()


def test_descent_finds_a_known_minimum_and_says_when_it_finds_none() -> None:
    target = distributions(torch.Generator().manual_seed(3), 4, 5)
    found = descend(lambda x: kl(x.log_softmax(-1), target).sum(), torch.zeros_like(target))
    assert (found - target).abs().max() < 1e-12
    with pytest.raises(AssertionError, match="still moves"):
        descend(lambda x: x[..., 0].sum(), torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("teacher", ["grpo", "sdsd"])
def test_the_toys_exact_policies_rest_where_the_expected_gradient_is_zero(teacher: bumps.Teacher) -> None:
    betas = (0.5, 5.0, 50.0)
    logp = bumps.exact(teacher, betas)
    weights = torch.linalg.lstsq(bumps.LOG_BUMPS.exp().t(), logp.exp().t()).solution.t().clamp(min=1e-12)
    theta = weights.log().requires_grad_()
    p = bumps.policy(theta)
    m, r = bumps.mean_demonstration(logp), bumps.reward(logp)
    gain = (bumps.reward(p) / (r * (1 - r)).sqrt() if teacher == "grpo" else
            -(p.exp() * ((bumps.ACTION - m[:, None]) / bumps.KERNEL) ** 2).sum(-1) / 2)
    value = gain - torch.tensor(betas) * kl(p, bumps.BASE)
    (slope,) = torch.autograd.grad(value.sum(), theta)
    assert slope.abs().max() < 1e-6
    (elsewhere,) = torch.autograd.grad((bumps.reward(q := bumps.policy(x := bumps.START.clone().requires_grad_()))
                                        - 0.5 * kl(q, bumps.BASE)).sum(), x)
    assert elsewhere.abs().max() > 1e-2


def test_the_toys_sampled_training_comes_to_rest_at_the_exact_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bumps, "BETAS", (50.0,))
    for teacher in ("grpo", "sdsd"):
        found = bumps.reward(bumps.policy(bumps.sampled(teacher, 0, 120)))
        assert (found - bumps.reward(bumps.exact(teacher, (50.0,)))).abs().max() < 0.02


def test_the_toy_loses_coverage_at_small_kls_and_has_it_back_at_large_ones() -> None:
    at = {name: bumps.beta_that_covers(name) for name in ("grpo", "sdsd")}
    assert 0.03 < at["grpo"] < 0.1 and 10 < at["sdsd"] < 30
    for teacher, beta in at.items():
        below, above = bumps.coverage(bumps.exact(teacher, (beta * 0.9, beta * 1.1))).tolist()
        assert (below, above) == (0.5, 1.0)


def test_more_demonstrations_in_a_mixture_bring_the_odds_back_and_averaged_losses_do_not() -> None:
    odds = [pooling.mixture_odds(k) for k in (1, 2, 4, 8, 64)]
    assert odds == sorted(odds, reverse=True) and odds[0] == pytest.approx(9.2156, abs=1e-3) and odds[-1] < 3.1


def test_rlsds_increment_is_clipped_and_dopds_shares_are_a_partition() -> None:
    d = torch.tensor([-5.0, -0.1, 0.0, 0.1, 5.0], dtype=torch.float64)
    assert rlsd.phi(d, 1.0).tolist() == pytest.approx([-0.2, math.exp(-0.1) - 1, 0, math.exp(0.1) - 1, 0.2])
    assert rlsd.phi(d, -1.0).tolist() == pytest.approx([-0.2, 1 - math.exp(0.1), 0, 1 - math.exp(-0.1), 0.2])
    for pair in law("routing").data.values():
        assert sum(pair["shares"]) == pytest.approx(1) and pair["norms"][2] < pair["kl_on_route_2"]


def test_teachers_that_are_all_the_same_have_no_floor() -> None:
    same = torch.full((1, 2, 3), 1 / 3, dtype=torch.float64).log()
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert floors.information(same, half).abs() < 1e-12 and floors.log_normaliser(same, half).abs() < 1e-12

# The page, the pictures, the command.


def test_the_command_writes_page_pictures_and_every_number(tmp_path: Path) -> None:
    out = tmp_path / "laws"
    said = cli("study", "laws", "--smoke", "--only", "copying,floors", "--out", str(out))
    assert said.code == 0, said.err
    assert "also with the known 53.15" in said.out and "checks hold" in said.out and "FAILS" not in said.out
    assert {p.name for p in out.iterdir()} == {"report.html", "results.json", "copying.png", "floors.png"}
    found = json.loads((out / "results.json").read_text())
    assert found["copying"]["checks"] == json.loads(json.dumps([c.as_json() for c in law("copying").checks]))
    page = (out / "report.html").read_text()
    assert "http" not in page and "<script" not in page and page.count("<svg") == 2
    assert "also with the known 9.216" in page
    assert (out / "floors.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_page_has_its_pictures_and_says_what_pngs_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    words = study.run(tmp_path, lambda text: None, only=("floors",))
    assert "selftaught[plots]" in words and list(tmp_path.glob("*.png")) == []
    page = (tmp_path / "report.html").read_text()
    assert "selftaught[plots]" in page and page.count("<svg") == 1


def test_a_law_that_fails_is_named_in_the_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selftaught.studies.laws.demonstrations.tilted", tilted_twice)
    words = study.run(tmp_path, lambda text: None, only=("copying",))
    assert "NOT: copying: k = 1.5, KL(S||T), beta = 0" in words
    assert '<td class="wrong">FAILS</td>' in (tmp_path / "report.html").read_text()


def test_a_page_escapes_text_and_a_chart_of_shares_has_ticks_between_whole_numbers(tmp_path: Path) -> None:
    lines = [Line("a < b", [(0.0, 1.0), (0.5, 2.0)])]
    figure = Figure("one", "A & B", "caption", lines, "x")
    path = write_page(tmp_path / "page.html", "<title>", ["lead"],
                      [Part("part", ["text <b>"], [Table("t", ("", "v"), [("r", "<i>")])], [figure])])
    page = path.read_text()
    assert "&lt;title&gt;" in page and "text &lt;b&gt;" in page and "<i>" not in page and "A &amp; B" in page
    for whole, wanted in ((True, {"0"}), (False, {"0", "0.1", "0.2", "0.3", "0.4", "0.5"})):
        root = ElementTree.fromstring(line_chart(lines, x_label="x", alt="", x_whole=whole))
        ticks = [e.text for e in root.iter("text") if e.get("class") == "tick" and e.get("text-anchor") == "middle"]
        assert set(ticks) == wanted
    assert [p.name for p in write_pngs([figure], tmp_path)] == ["one.png"]
    with pytest.raises(UserError, match="cannot be written"):
        write_page(tmp_path / "no" / "page.html", "t", [], [])


# The registry.


def test_every_study_has_a_run_and_the_command_names_the_nearest() -> None:
    for name in STUDIES:
        with pytest.raises(UserError, match=f"study {name}: it has no --colour; it has --"):
            start(name, None, print, colour="red")
    with pytest.raises(UserError, match="study 'lawz': did you mean 'laws'"):
        start("lawz", None, print)
    with pytest.raises(UserError, match=r"study laws: it has no --jobs; it has --only, --seeds, --smoke"):
        start("laws", None, print, jobs=2)
    with pytest.raises(UserError, match=r"study laws: it has no key=value"):
        start("laws", None, print, overrides=["a=b"])


def test_bad_options_of_the_laws_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no law 'copyng'; did you mean 'copying'"):
        study.run(tmp_path, print, only=("copyng",))
    with pytest.raises(UserError, match="--seeds 0,1 must be one seed"):
        study.run(tmp_path, print, seeds=(0, 1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        study.run(tmp_path / "file" / "laws", print, only=("copying",))


def test_another_seed_draws_other_tables_on_which_the_laws_hold_too() -> None:
    for name in ("optimum", "floors", "pooling"):
        (other,) = study.compute([name], seed=5)
        assert all(c.holds for c in other.checks)
        assert other.checks[0].closed != law(name).checks[0].closed
