"""Measures over saved completions, against enumeration and closed forms."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from selftaught.errors import UserError
from selftaught.eval import (
    EvalConfig,
    append_rows,
    compare,
    evaluations,
    read_rows,
    rows_of,
    select,
    summarise,
    too_few,
)
from selftaught.eval.intervals import (
    PATTERNS,
    bootstrap,
    bootstrap_draws,
    bootstrap_quantiles,
    permutation_test,
    sign_test,
    signs,
)
from selftaught.eval.measures import best_constant, maj_at_k, pass_at_k, pass_hat_k
from selftaught.records import Problem, Prompt, Rollout, Sampling, Verdict

FEW = settings(max_examples=60, deadline=None)


def row(problem: str, sample: int, score: float | None, answer: str | None = "7", **more: Any) -> dict[str, Any]:
    return {
        "problem": problem, "sample": sample, "prompt": "2+5=", "response": "7", "score": score,
        "status": "right" if score and score >= 1 else "wrong", "answer": answer, "strategy": None, "tokens": 3,
        "finish": "stop", "step": 0, "sampling": {"temperature": 1.0}, "seed": 0, "model": "m", "arm": "student",
        "reference": "7", **more,
    }  # fmt: skip


def table(counts: list[int], n: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of len(counts) problems with n samples each, the first counts[p] of which are right."""
    return [
        row(f"p{p}", i, float(i < c), answer="7" if i < c else f"w{i}", **more)
        for p, c in enumerate(counts)
        for i in range(n)
    ]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(right, k))
                assert pass_at_k(n, c, k) == sum(map(any, subsets)) / len(subsets)


def test_pass_hat_k_is_the_share_of_subsets_that_are_all_right() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(right, k))
                assert pass_hat_k(n, c, k) == sum(map(all, subsets)) / len(subsets)
    assert pass_hat_k(10_000, 9_999, 10_000) == 0.0 and pass_hat_k(10_000, 10_000, 5_000) == 1.0


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_estimators_at_their_ends_are_what_was_seen(n: int) -> None:
    wrong = [f"w{i}" for i in range(n)]
    for k in {1, n}:
        assert pass_at_k(n, 0, k) == pass_hat_k(n, 0, k) == maj_at_k(wrong, [False] * n, k) == 0.0
        assert pass_at_k(n, n, k) == pass_hat_k(n, n, k) == maj_at_k(["7"] * n, [True] * n, k) == 1.0
    for c in range(1, n):  # k = n: the one choice is all that was drawn
        assert (pass_at_k(n, c, n), pass_hat_k(n, c, n)) == (1.0, 0.0)
        assert pass_at_k(n, c, 1) == pytest.approx(c / n) and pass_hat_k(n, c, 1) == pytest.approx(c / n)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    assert pass_at_k(10_000, 0, 5_000) == 0.0
    assert pass_at_k(10_000, 10_000, 1) == 1.0
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10_000, 1, 10_000) == 1.0


def brute_majority(answers: list[str | None], right: list[bool], k: int) -> float:
    """Every subset votes; among the winners each counts by the share of all its samples that are right."""
    total, subsets = 0.0, list(combinations(range(len(answers)), k))
    for subset in subsets:
        votes: dict[str, int] = {}
        for i in subset:
            if (answer := answers[i]) is not None:
                votes[answer] = votes.get(answer, 0) + 1
        winners = [a for a, v in votes.items() if v == max(votes.values())]
        for winner in winners:
            mine = [right[i] for i, a in enumerate(answers) if a == winner]
            total += sum(mine) / len(mine) / len(winners)
    return total / len(subsets)


@FEW
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8), st.data()
)
def test_majority_vote_equals_enumeration_of_all_choices(samples: list[tuple[str | None, bool]], data: Any) -> None:
    answers, right = [a for a, _ in samples], [r for _, r in samples]
    k = data.draw(st.integers(1, len(samples)))
    assert maj_at_k(answers, right, k) == pytest.approx(brute_majority(answers, right, k), abs=1e-12)


def test_majority_vote_of_one_is_accuracy_and_ties_split_evenly() -> None:
    assert maj_at_k(["7", "7", "8", "9"], [True, True, False, False], 1) == pytest.approx(0.5)
    assert maj_at_k(["7", "8"], [True, False], 2) == pytest.approx(0.5)
    assert maj_at_k(["7", None, None], [True, False, False], 3) == 1.0  # the silent do not vote
    assert maj_at_k([None, None], [False, False], 2) == 0.0


def test_bootstrap_equals_a_slow_loop_over_the_same_draws() -> None:
    values = np.random.default_rng(1).random((7, 2))
    values[3, 1] = np.nan
    index = np.random.default_rng(5).integers(0, 7, size=(50, 7))
    slow = np.array([[np.nanmean(values[i, m]) for m in range(2)] for i in index])
    np.testing.assert_allclose(bootstrap_draws(values, draws=50, seed=5), slow, rtol=1e-12)


def all_draws(values: list[float]) -> list[float]:
    """The sorted means of all P**P ways to draw P problems with replacement."""
    return sorted(sum(draw) / len(draw) for draw in product(values, repeat=len(values)))


@pytest.mark.parametrize("seed", range(4))
def test_bootstrap_interval_is_that_of_all_draws_there_are(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 9, size=6) / 8
    _, low, high = bootstrap(values[:, None])
    means = np.array(all_draws(values.tolist()))  # 46656: nothing is left to chance
    for end, share in ((low[0], 0.025), (high[0], 0.975)):
        noise = 4 * math.sqrt(share * (1 - share) / 10_000)
        assert (means < end - 1e-9).mean() <= share + noise and (means <= end + 1e-9).mean() >= share - noise


def test_quantiles_are_those_of_weighted_samples() -> None:
    rng = np.random.default_rng(11)
    samples = [rng.integers(1, 30, size=n).tolist() for n in (3, 8, 1, 5, 8)]
    shares = [0.1, 0.25, 0.5, 0.9, 1.0]
    value, low, high = bootstrap_quantiles(samples, shares, draws=4000)
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in samples])
    pooled = np.concatenate(samples)
    np.testing.assert_array_equal(value, np.quantile(pooled, shares, weights=weights, method="inverted_cdf"))
    slow = []
    for draw in product(range(5), repeat=5):  # every draw there is, by numpy's own weighted quantile
        mine = np.concatenate([samples[p] for p in draw])
        weight = np.concatenate([np.full(len(samples[p]), 1 / len(samples[p])) for p in draw])
        slow.append(np.quantile(mine, shares, weights=weight, method="inverted_cdf"))
    for end, share in ((low, 0.025), (high, 0.975)):
        noise = 4 * math.sqrt(share * (1 - share) / 4000)
        assert np.all((np.array(slow) < end - 0.5).mean(axis=0) <= share + noise)
        assert np.all((np.array(slow) <= end).mean(axis=0) >= share - noise)


def test_bootstrap_interval_of_a_mean_has_the_closed_form_width() -> None:
    values = np.random.default_rng(2).normal(size=(400, 1))
    mean, low, high = bootstrap(values)
    error = values.std() / math.sqrt(400)
    assert mean[0] == pytest.approx(values.mean())
    assert low[0] == pytest.approx(mean[0] - 1.96 * error, abs=0.06 * error)
    assert high[0] == pytest.approx(mean[0] + 1.96 * error, abs=0.06 * error)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    worlds = (rng.random((60, 300)) < 0.3).astype(float)  # 300 evaluations of 60 problems, true accuracy .3
    _, low, high = bootstrap(worlds, draws=1000)
    assert 0.90 <= np.mean((low <= 0.3) & (high >= 0.3)) <= 0.99


def test_bootstrap_repeats_with_its_seed_and_moves_with_it() -> None:
    values = np.random.default_rng(4).random((30, 1))
    assert np.array_equal(bootstrap_draws(values, seed=1), bootstrap_draws(values, seed=1))
    assert not np.array_equal(bootstrap_draws(values, seed=1), bootstrap_draws(values, seed=2))


@FEW
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 3))
def test_sign_test_equals_enumeration_of_all_sign_patterns(wins: int, losses: int, ties: int) -> None:
    n, extreme = wins + losses, min(wins, losses)
    patterns = [bin(pattern).count("1") for pattern in range(2**n)]
    p = sum(min(up, n - up) <= extreme for up in patterns) / 2**n
    differences = np.array([0.5] * wins + [-0.1] * losses + [0.0] * ties + [np.nan])
    assert sign_test(differences) == pytest.approx(p)
    assert signs(differences) == (wins, losses, ties)


def every_pattern(differences: list[Fraction]) -> Fraction:
    """The permutation test by its definition, in fractions: all signs of all differences, zero or not."""
    observed = abs(sum(differences))
    sums = [sum(s * d for s, d in zip(pattern, differences, strict=True))
            for pattern in product((1, -1), repeat=len(differences))]
    return Fraction(sum(abs(each) >= observed for each in sums), len(sums))


@FEW
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9), st.integers(1, 7))
def test_permutation_test_equals_enumeration_of_all_sign_patterns(counts: list[int], n: int) -> None:
    differences = [Fraction(count, n) for count in counts]
    found = permutation_test(np.array([[float(d)] for d in differences] + [[np.nan]]))[0]
    assert found.p == pytest.approx(float(every_pattern(differences)), abs=1e-12)
    assert (found.patterns, found.exact) == (2 ** sum(count != 0 for count in counts), True)


def convolved(counts: list[int]) -> float:
    """The same of any number of whole differences: the distribution of their sum, one after another."""
    sums = Counter({0: 1})
    for count in counts:
        sums = Counter({total: sums[total - count] + sums[total + count]
                        for total in {t + s for t in sums for s in (count, -count)}})
    return sum(times for total, times in sums.items() if abs(total) >= abs(sum(counts))) / sum(sums.values())


def test_permutation_test_of_many_differences_is_drawn_and_near_the_exact_one() -> None:
    rng = np.random.default_rng(6)
    table_PM = rng.integers(-4, 5, size=(60, 5)) + np.array([0, 0, 1, 0, 1])
    found = permutation_test(table_PM / 8)
    for m, each in enumerate(found):
        exact = convolved(table_PM[:, m].tolist())
        assert (each.patterns, each.exact) == (PATTERNS, False)
        assert each.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / PATTERNS) + 2 / PATTERNS)
    assert permutation_test(table_PM / 8) == found and permutation_test(table_PM / 8, seed=1) != found
    assert permutation_test(np.ones((40, 1)))[0].p == 1 / (1 + PATTERNS)  # never 0
    at_most = permutation_test(np.concatenate([np.ones((20, 1)), np.zeros((99, 1))]))[0]
    assert (at_most.p, at_most.patterns, at_most.exact) == (2 / 2**20, 2**20, True)


def test_permutation_test_holds_its_level_where_nothing_differs() -> None:
    rng = np.random.default_rng(8)
    worlds_PM = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], size=(50, 400))  # 400 comparisons of two equal models
    rejected = np.mean([each.p <= 0.05 for each in permutation_test(worlds_PM)])
    assert 0.02 <= rejected <= 0.08


@pytest.mark.parametrize("seed", range(3))
def test_every_measure_of_a_random_table_equals_enumeration_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    expected: dict[str, list[float]] = {}
    for p in range(6):
        samples = [(("7", "8", "9", None)[rng.integers(4)], float(rng.integers(0, 5)) / 4) for _ in range(6)]
        right = [answer == "7" for answer, _ in samples]
        rows += [row(f"p{p}", i, score, answer, status="right" if r else "wrong")
                 for i, ((answer, score), r) in enumerate(zip(samples, right, strict=True))]
        for k in (1, 3, 6):
            chosen = list(combinations(range(6), k))
            brute = {"pass@": np.mean([any(right[i] for i in c) for c in chosen]),
                     "pass^": np.mean([all(right[i] for i in c) for c in chosen]),
                     "mean@": np.mean([np.mean([samples[i][1] for i in c]) for c in chosen]),
                     "maj@": brute_majority([answer for answer, _ in samples], right, k)}
            for name, value in brute.items():
                expected.setdefault(f"{name}{k}", []).append(float(value))
    summary = summarise(rows, [1, 3, 6])
    for name, values in expected.items():
        assert summary[name]["value"] == pytest.approx(np.mean(values), abs=1e-12), name
        means = np.array(all_draws(values))
        assert (means <= summary[name]["low"] + 1e-9).mean() >= 0.018, name
        assert (means < summary[name]["low"] - 1e-9).mean() <= 0.032, name


def test_summary_of_a_table_known_by_hand() -> None:
    rows = table([0, 1, 2, 4], n=4)
    rows[0]["finish"], rows[1]["answer"] = "length", None
    summary = summarise(rows, [1, 2, 4])
    assert summary["pass@1"]["value"] == pytest.approx((0 + 1 + 2 + 4) / 16)
    assert summary["pass@2"]["value"] == pytest.approx((0 + 3 / 6 + 5 / 6 + 1) / 4)
    assert summary["pass@4"]["value"] == pytest.approx(3 / 4)
    assert summary["maj@4"]["value"] == pytest.approx((0 + 1 / 4 + 1 + 1) / 4)
    assert summary["maj@1"]["value"] == summary["mean@4"]["value"] == pytest.approx(summary["pass@1"]["value"])
    assert summary["distinct_answers"]["value"] == pytest.approx((3 + 4 + 3 + 1) / 4)
    assert summary["truncated"]["value"] == pytest.approx(1 / 16)
    assert summary["length"] == summary["length_p90"] == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert summary["pass^2"]["value"] == pytest.approx((0 + 0 + 1 / 6 + 1) / 4)
    assert summary["pass^4"]["value"] == pytest.approx(1 / 4)
    assert summary["status"] == {"wrong": 9, "right": 7}
    assert (summary["problems"], summary["samples"], summary["left_out"]) == (4, 16, {})
    assert summary["pass@1"]["low"] < summary["pass@1"]["value"] < summary["pass@1"]["high"]
    json.dumps(summary, allow_nan=False)


def test_the_status_says_what_is_right_and_not_the_weighted_sum() -> None:
    rows = [
        row("p", 0, 1.0, answer="5", status="wrong"),  # numeric 0 + format 1
        row("p", 1, 0.8, answer="7", status="right"),  # .8 x numeric, not formatted
        row("p", 2, 0.6, answer="7", status="right"),  # less a length penalty
        row("p", 3, 2.0, answer=None, status="unparsed"),
        row("p", 4, 1.0, answer="7", status="timeout"),
        row("p", 5, 1.0, answer="7", status="error"),
    ]
    summary = summarise(rows, [1, 6])
    assert summary["pass@1"]["value"] == pytest.approx(2 / 6)
    assert summary["maj@6"]["value"] == pytest.approx(2 / 4)  # "7" wins; two of the four that say it are right
    assert summary["mean@6"]["value"] == pytest.approx(6.4 / 6)
    wrong = [{**each, "status": "wrong"} for each in rows]
    assert compare(wrong, rows, [1])["pass@1"]["value"] == pytest.approx(2 / 6)


def test_partial_scores_of_rows_without_a_status_count_from_the_threshold_on() -> None:
    rows = [row("p", 0, 0.5, status=None), row("p", 1, 1.0, status="judged"), row("p", 2, None)]
    del rows[0]["status"]
    assert summarise(rows, [1])["pass@1"]["value"] == pytest.approx(1 / 3)
    assert summarise(rows, [1], threshold=0.5)["pass@1"]["value"] == pytest.approx(2 / 3)
    assert summarise(rows, [3])["mean@3"]["value"] == pytest.approx(0.5)


def test_order_of_rows_does_not_matter() -> None:
    rows = table([0, 1, 3, 2, 4], n=4)
    by_sample = sorted(rows, key=lambda r: (r["sample"], r["problem"]))
    first, second = summarise(rows, [1, 4]), summarise(by_sample, [1, 4])
    assert first["pass@4"] == second["pass@4"] and first["maj@4"] == second["maj@4"]


def test_best_constant_counts_each_problem_once() -> None:
    rows = [row(f"p{p}", i, 0.0, reference=gold) for p, gold in enumerate(["3", " 3", "5", None]) for i in range(1 + p)]
    assert best_constant(rows) == {"value": pytest.approx(2 / 3), "answer": "3"}
    assert best_constant([row("p", 0, 0.0, reference=None)]) == {"value": None, "answer": None}


def test_without_answers_votes_are_unknown_and_not_zero() -> None:
    summary = summarise([row("p", i, 1.0, answer=None) for i in range(2)], [1, 2])
    assert summary["maj@2"]["value"] is None and summary["distinct_answers"]["value"] is None
    assert summary["pass@2"]["value"] == 1.0


def test_k_above_the_samples_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"k = 5.*n = 4"):
        summarise(table([1, 2], n=4), [1, 5])
    with pytest.raises(UserError, match="k = 0"):
        summarise(table([1, 2], n=4), [0])


def test_a_problem_with_too_few_samples_is_left_out_of_that_k_alone() -> None:
    summary = summarise(table([4, 0], n=4)[:-1], [1, 4])
    assert summary["pass@4"]["value"] == 1.0 and summary["pass@1"]["value"] == 0.5
    assert summary["left_out"] == {"pass@4": 1}
    assert too_few(table([4, 0, 1], n=4)[:-1], [1, 4]) == {4: [("p2", 3)]}


def test_two_evaluations_are_never_pooled() -> None:
    with pytest.raises(UserError, match="2 evaluations"):
        summarise(table([1], n=2, step=0) + table([2], n=2, step=10), [1])


def test_difference_is_after_minus_before_and_paired() -> None:
    before, after = table([0, 1, 2, 1], n=4), table([1, 3, 4, 0], n=4, step=9)
    difference = compare(before, after, [1, 4])["pass@1"]
    assert difference["value"] == pytest.approx((1 + 2 + 2 - 1) / 16)
    assert (difference["better"], difference["worse"], difference["same"]) == (3, 1, 0)
    assert difference["p"] == pytest.approx(10 / 16)
    # Of +-1 +-2 +-2 +-1 the sums of at least 4, or at most -4: 6, and 4 in two ways, each with its mirror image.
    assert (difference["p_permutation"], difference["patterns"], difference["exact"]) == (6 / 16, 16, True)
    assert difference["after"] - difference["before"] == pytest.approx(difference["value"])
    swapped = compare(after, before, [1, 4])["pass@1"]
    assert swapped["value"] == pytest.approx(-difference["value"])
    assert swapped["low"] == pytest.approx(-difference["high"])


def test_pairing_narrows_the_interval_of_a_constant_gain() -> None:
    rng = np.random.default_rng(0)
    counts = [int(c) for c in rng.integers(0, 7, size=40)]
    difference = compare(table(counts, n=8), table([c + 1 for c in counts], n=8, step=1), [1])["pass@1"]
    assert difference["low"] == pytest.approx(1 / 8) and difference["high"] == pytest.approx(1 / 8)


def test_pairs_are_made_by_problem_and_not_by_order() -> None:
    before, after = table([0, 4, 2], n=4), table([0, 4, 2], n=4, step=1)
    result = compare(before, after[::-1][:8], [1])
    assert result["pass@1"]["value"] == 0.0 and result["pass@1"]["same"] == 2
    assert (result["problems"], result["unpaired"]) == (2, 1)
    with pytest.raises(UserError, match="no problem in common"):
        compare(before, [{**r, "problem": "other"} for r in after], [1])


def test_rows_hold_what_the_rollout_and_the_verdict_said(tmp_path: Path) -> None:
    problem = Problem("p1", ({"role": "user", "content": "2+5"},), answer="7")
    sampling = Sampling(temperature=0.7, stop=("\n",))
    rollout = Rollout(
        problem, 3, Prompt((1, 2)), (5, 6, 7), (-1.0, -1.0, -1.0), "is \ud800 7", "length", sampling, 0, 2
    )
    made = rows_of([rollout], [Verdict(1.0, "right", answer="7")], model="m", seed=1, step=2, arm="teacher/right")
    append_rows(tmp_path / "c.jsonl", made)
    assert read_rows(tmp_path / "c.jsonl") == made
    assert made[0] == {
        "problem": "p1", "sample": 3, "prompt": [{"role": "user", "content": "2+5"}], "response": "is \ud800 7",
        "score": 1.0, "status": "right", "answer": "7", "strategy": None, "tokens": 3, "finish": "length", "step": 2,
        "sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": None, "max_completion_length": 512, "stop": ["\n"]},
        "seed": 1, "model": "m", "arm": "teacher/right", "reference": "7",
    }  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        rows_of([rollout], [], model="m", seed=1, step=2)


def test_faults_of_a_file_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    good = table([1, 2], n=3)
    good[5]["sampling"] = {"temperature": 0.5}
    lines = [json.dumps(r) for r in good]
    lines[2:2] = ["not json", json.dumps({"problem": "p0", "sample": 9}), lines[1]]
    lone = json.dumps(row("lone", 0, None))
    path.write_text("\n".join([*lines, lone]) + '\n{"problem": "p1", "sam', encoding="utf-8")
    said: list[str] = []
    rows = read_rows(path, said.append)
    assert len(rows) == 7
    everything = " | ".join(said)
    expected = (
        "3 lines left out", "line 3 is not a JSON object", "line 4 lacks score", "line 11 is truncated",
        "1 duplicated row left out", "problem p0 sample 1 (line 5)", "mixed sampling", "6 rows with",
        "1 problem without one score", "lone",
    )  # fmt: skip
    for part in expected:
        assert part in everything, (part, everything)
    assert summarise(rows, [1])["pass@1"]["value"] == pytest.approx(0.5)
    assert summarise(rows, [1])["problems"] == 2


@pytest.mark.parametrize(("key", "value"), [
    ("tokens", "x"), ("step", "a"), ("seed", [0]), ("model", {}), ("arm", 3), ("status", 1), ("finish", []),
    ("response", 7), ("score", math.nan), ("score", -math.inf), ("score", 10**400), ("score", "1"), ("sample", "0"),
])  # fmt: skip
def test_a_value_of_the_wrong_kind_costs_its_row_alone(tmp_path: Path, key: str, value: Any) -> None:
    good = table([1, 2], n=3)
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({**r, key: value} if i == 4 else r) for i, r in enumerate(good)) + "\n")
    said: list[str] = []
    rows = read_rows(path, said.append)
    assert rows == [r for i, r in enumerate(good) if i != 4]
    assert len(said) == 1 and f"1 line left out: line 5 has the {key}" in said[0].replace("problem 'p1' and the ", "")
    assert summarise(select(rows), [1])["problems"] == 2


def test_a_mark_of_the_byte_order_costs_no_row_and_no_arm_is_the_students(tmp_path: Path) -> None:
    good = table([1], n=2)
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [*good, {**good[1], "arm": None}]) + "\n", encoding="utf-8-sig")
    said: list[str] = []
    assert read_rows(path, said.append) == good
    assert len(said) == 1 and "1 duplicated row left out" in said[0] and "line 3" in said[0]


def test_a_problem_whose_samples_have_no_answer_has_no_vote_and_is_named(tmp_path: Path) -> None:
    """Its accuracy counts. Where nothing could be read as an answer, there is none, and the vote is lost."""
    rows = [*table([2], n=4), *(row("mute", i, float(i < 2), answer=None) for i in range(4)),
            *(row("unread", i, 0.0, answer=None, status="unparsed") for i in range(4))]  # fmt: skip
    append_rows(tmp_path / "c.jsonl", rows)
    said: list[str] = []
    found = summarise(read_rows(tmp_path / "c.jsonl", said.append), [1, 4])
    assert len(said) == 1 and "1 problem without one sample's answer" in said[0] and "mute" in said[0]
    assert "left out of maj@k" in said[0]
    assert found["pass@1"]["value"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["maj@4"]["value"] == pytest.approx((1 + 0) / 2)  # two of one right answer, two different wrong ones
    assert found["distinct_answers"]["value"] == pytest.approx((3 + 0) / 2)


def test_problems_without_a_reference_are_named_among_those_that_have_one(tmp_path: Path) -> None:
    rows = [row(f"p{p}", i, 1.0, reference="7" if p < 2 else None) for p in range(4) for i in range(2)]
    append_rows(tmp_path / "c.jsonl", rows)
    said: list[str] = []
    assert len(read_rows(tmp_path / "c.jsonl", said.append)) == 8
    assert len(said) == 1 and "2 problems without a reference answer" in said[0] and "p2, p3" in said[0]
    assert summarise(rows, [1])["problems"] == 4 and summarise(rows, [1])["best_constant"]["value"] == 1.0
    append_rows(tmp_path / "none.jsonl", rows[4:])  # where no problem has one, that is how the data is
    assert read_rows(tmp_path / "none.jsonl", said.append) and len(said) == 1


def test_a_file_without_rows_or_no_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no completion"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="No such file"):
        read_rows(tmp_path / "none.jsonl")


def test_appending_after_a_killed_writer_cuts_only_the_torn_row(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row("p", 0, 1.0)) + "\n" + '{"problem": "p", "samp')
    append_rows(path, [row("p", 1, 0.0)])
    assert [r["sample"] for r in read_rows(path)] == [0, 1]
    path.write_text(json.dumps(row("p", 0, 1.0)))  # whole, but without its newline
    append_rows(path, [row("p", 1, 0.0)])
    assert [r["sample"] for r in read_rows(path)] == [0, 1]


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    append_rows(path, [row("p", 0, 1.0)])
    whole = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_rows(path, [row("p", 1, 0.0)])
    assert path.read_bytes() == whole


def test_one_evaluation_is_chosen_by_arm_and_latest_step() -> None:
    rows = table([1], n=1, step=0) + table([1], n=1, step=10) + table([0], n=1, step=20, arm="other_prompt")
    assert {r["step"] for r in select(rows)} == {10}
    assert {r["step"] for r in select(rows, step=0)} == {0}
    assert {r["arm"] for r in select(rows, arm="other_prompt")} == {"other_prompt"}
    assert list(evaluations(rows)) == [("m", "student", 0), ("m", "student", 10), ("m", "other_prompt", 20)]


def test_config_refuses_what_it_could_not_measure() -> None:
    assert EvalConfig(k=4, best="maj@4").k == EvalConfig(k=4, best="pass^4").k == (4,)
    with pytest.raises(ValidationError, match=r"raise eval\.samples to 16"):
        EvalConfig(k=(1, 16))
    with pytest.raises(ValidationError, match=r"eval\.best = 'pass@2'"):
        EvalConfig(best="pass@2")
    assert EvalConfig(temperature=0).temperature == 0
