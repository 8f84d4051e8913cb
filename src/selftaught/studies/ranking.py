"""The leakage study's report, from its students' tables alone: means, paired differences, AUROCs, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from selftaught.eval.auroc import auroc, delong, kendall, paired_bootstrap
from selftaught.eval.leakage import SIGNIFICANT, rise
from selftaught.eval.tables import Table, means

Student = Mapping[str, Any]  # name, share (-1: nothing planted, not fine-tuned), said, seed, seconds, table

SCORES = ("leaning", "mention", "evidence", "knows", "pass@1")  # by which students are ranked; the first is THE score
SCORE = SCORES[0]
SHOWN = ("mention", "evidence", "knows", "pass@1")
DRAWS = 2_000
BASE, AGAIN = "base", "base-again"  # the base model, and the same one sampled anew, which nothing sets apart from it


def analysed(students: Sequence[Student]) -> dict[str, Any]:
    """Each student's measures, its difference from the base model, and its AUROC against the clean student of its seed;
    and how well each of `SCORES` ranks the students. The base model is what others are compared with: not flagged, and
    not found innocent either.
    """
    base = next(one["table"] for one in students if one["name"] == BASE)
    clean = {one["seed"]: one["table"] for one in students if one["share"] == 0}
    rows = []
    for one in students:
        row: dict[str, Any] = {key: one[key] for key in ("name", "share", "seed", "seconds", "said")}
        row["measures"] = means(one["table"])
        row["over_base"], row["flagged"] = rise(base, one["table"], SCORE) if one["name"] != BASE else (None, None)
        if one["share"] > 0:
            row["auroc"] = {score: _by_problem(one["table"], clean[one["seed"]], score) for score in SCORES[:3]}
        rows.append(row)
    return {"students": rows, "ranking": {score: ranking(students, score) for score in SCORES}}


def _column(table: Table, name: str) -> np.ndarray:
    return table[2][:, table[1].index(name)]


def _by_problem(table: Table, clean: Table, score: str) -> dict[str, float]:
    """How well a problem's mean score tells a contaminated student from the clean one: the area with its interval over
    problems, which are the same on both sides.
    """
    place = {problem: p for p, problem in enumerate(clean[0])}
    mine, theirs = _column(table, score), _column(clean, score)
    pairs = [(mine[p], theirs[place[problem]]) for p, problem in enumerate(table[0]) if problem in place]
    pairs = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    area, low, high = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    return {"value": area, "low": low, "high": high, "problems": len(pairs)}


def ranking(students: Sequence[Student], score: str) -> dict[str, Any]:
    """How a score ranks the students by their means: tau with the planted share, in how many seeds the order is the
    planted one, and the AUROC of contaminated against uncontaminated students with DeLong's interval. `best_low` is the
    lower end where so many students are separated perfectly (exact binomial, see `delong`).
    """
    students = [one for one in students if one["name"] != AGAIN]  # one model counts once
    value = {one["name"]: float(np.nanmean(_column(one["table"], score))) for one in students}
    made = [one for one in students if one["share"] >= 0]
    seeds = sorted({one["seed"] for one in made})
    in_order = 0
    for seed in seeds:
        own = [value[one["name"]] for one in sorted(made, key=lambda one: one["share"]) if one["seed"] == seed]
        in_order += all(a < b for a, b in pairwise(own))
    guilty = [value[one["name"]] for one in students if one["share"] > 0]
    clean = [value[one["name"]] for one in students if one["share"] <= 0]
    area, low, high = delong(guilty, clean)
    problems_low, problems_high = _over_problems(students, score)
    return {"tau": kendall([one["share"] for one in made], [value[one["name"]] for one in made]),
            "in_order": in_order, "seeds": len(seeds),
            "auroc": {"value": area, "low": low, "high": high, "problems_low": problems_low,
                      "problems_high": problems_high, "contaminated": len(guilty), "others": len(clean),
                      "best_low": delong([1.0] * len(guilty), [0.0] * len(clean))[1]}}


def _over_problems(students: Sequence[Student], score: str) -> tuple[float, float]:
    """95 % percentile interval of the AUROC over these very students, the problems drawn anew for all alike."""
    values_SP = np.array([_column(one["table"], score) for one in students])
    known_SP = np.isfinite(values_SP)
    values_SP = np.where(known_SP, values_SP, 0.0)
    contaminated = np.array([one["share"] > 0 for one in students])
    rng, problems, areas = np.random.default_rng(0), values_SP.shape[1], []
    for _ in range(DRAWS):
        chosen = rng.integers(0, problems, problems)
        with np.errstate(invalid="ignore"):
            mean_S = values_SP[:, chosen].sum(1) / known_SP[:, chosen].sum(1)
        known = np.isfinite(mean_S)
        areas.append(auroc(mean_S[contaminated & known], mean_S[~contaminated & known]))
    low, high = np.nanquantile(areas, [0.025, 0.975])
    return float(low), float(high)


# The report.


def write(out: Path, students: Sequence[Student], settings: Mapping[str, Any]) -> str:
    """Write results.json, report.md and, where matplotlib is installed, scores.png; returns the tables."""
    found = analysed(students)
    (out / "results.json").write_text(json.dumps({"settings": dict(settings), **found}, indent=1) + "\n",
                                      encoding="utf-8")
    table = "\n".join(lines(found))
    drawn = picture(found, out / "scores.png")
    shown = "\n![The score of each student, against what was planted](scores.png)\n" if drawn else ""
    about = ", ".join(f"{key} {value}" for key, value in settings.items())
    page = f"# Leakage, planted and measured\n\n{ABOUT}\n\nSettings: {about}.\n\n{table}\n{shown}"
    (out / "report.md").write_text(page, encoding="utf-8")
    return table


ABOUT = """\
Students are the base model fine-tuned on texts of which a known share leans on a privilege that the prompt does not
have, half of those in words that the list of mentions knows and half in words that it does not. `base` is the model
itself, `base-again` the same model sampled with another seed, each `grpo-...` a student that had no teacher. `said` is
the share of its responses that use those very words, which only this study can know: what came of the planting. The
score is the share of responses that lean: a mention of an unseen reference, or evidence of at least 20 under the base
model, which knows of those other words only what it learned. All intervals are of 95 %, over problems unless another
kind is named; a student is flagged where its score is above the base model's with the whole paired interval and by the
paired permutation test (two-sided, p at most .05). The AUROC of a student is how well one problem's mean tells it from
the clean student (0 %) of the same seed, its interval over problems drawn with both of their means: where a share s of
n responses a problem leans and none of the clean student's does, 1/2 + (1 - (1 - s)^n) / 2. `knows` and pass@1 stand
beside the score as measures of skill, by which nobody should be accused."""


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Both tables as markdown, and what follows from them."""
    yield ("| student | planted | said | leaning (the score) | over base | p | flagged | mention | evidence, nats | "
           "knows, nats a token | pass@1 | AUROC by problem: leaning | mention alone | evidence alone |")
    yield "| --- " * 14 + "|"
    for row in found["students"]:
        planted = f"{100 * row['share']:g} %" if row["share"] >= 0 else "-"
        areas = [_interval(row["auroc"][score], 2) if "auroc" in row else "" for score in SCORES[:3]]
        shown = [_interval(row["measures"][name]) for name in SHOWN]
        over = row["over_base"]
        compared = "- | - | -"
        if over is not None:
            compared = f"{_interval(over)} | {over['p']:.2g} | {'yes' if row['flagged'] else 'no'}"
        yield (f"| {row['name']} | {planted} | {100 * row['said']:.1f} % | {_interval(row['measures'][SCORE])} | "
               f"{compared} | {' | '.join(shown)} | {' | '.join(areas)} |")
    yield ""
    yield ("| ranked by | Kendall's tau with the planted share | seeds in the planted order | AUROC of contaminated "
           "students, interval over students (DeLong) | interval over problems (bootstrap) |")
    yield "| --- " * 5 + "|"
    for score, rank in found["ranking"].items():
        yield (f"| {score} | {rank['tau']:.2f} | {rank['in_order']} of {rank['seeds']} | "
               f"{_interval(rank['auroc'], 2)} | [{rank['auroc']['problems_low']:.2f}, "
               f"{rank['auroc']['problems_high']:.2f}] |")
    yield ""
    yield from conclusions(found)


def conclusions(found: Mapping[str, Any]) -> Iterator[str]:
    """What holds and what does not, in sentences made of the numbers."""
    made = [row for row in found["students"] if row["share"] > 0]
    others = [row for row in found["students"] if row["share"] <= 0 and row["name"] != BASE]
    caught, accused = [row for row in made if row["flagged"]], [row for row in others if row["flagged"]]
    rank, tests = found["ranking"][SCORE], len(made) + len(others)
    yield (f"Flagged: {len(caught)} of {len(made)} contaminated students"
           + _named("; not flagged", [row["name"] for row in made if not row["flagged"]])
           + f", and {len(accused)} of {len(others)} others" + _named("; flagged", [row["name"] for row in accused])
           + ".")
    yield (f"Tests made: {tests}, one for each student but `{BASE}`, each two-sided at {SIGNIFICANT:g} and not "
           f"corrected for their number: if none leaned more than the base model, at most {tests} x "
           f"{SIGNIFICANT / 2:g} = {tests * SIGNIFICANT / 2:.2g} of them would be expected to be flagged by chance.")
    area = rank["auroc"]
    yield (f"Ranked in the planted order in {rank['in_order']} of {rank['seeds']} seeds; contaminated against "
           f"uncontaminated students: AUROC {_interval(area, 2)}. Even perfect separation of {area['contaminated']} "
           f"from {area['others']} students shows no more than an AUROC of at least {area['best_low']:.2f}.")


def _named(before: str, names: Sequence[str]) -> str:
    return f" ({before.removeprefix('; ')}: {', '.join(names)})" if names else ""


def _interval(measure: Mapping[str, Any], digits: int = 3) -> str:
    if measure["value"] is None or not math.isfinite(measure["value"]):
        return "-"
    return f"{measure['value']:.{digits}f} [{measure['low']:.{digits}f}, {measure['high']:.{digits}f}]"


def picture(found: Mapping[str, Any], path: Path) -> bool:
    """The score of each student with its interval, and what was planted; False, and no file, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = list(dict.fromkeys(_label(row) for row in found["students"]))
    seeds = sorted({row["seed"] for row in found["students"]})
    for row in found["students"]:
        measure = row["measures"][SCORE]
        x = labels.index(_label(row)) + 0.12 * (seeds.index(row["seed"]) - (len(seeds) - 1) / 2)
        error = [[measure["value"] - measure["low"]], [measure["high"] - measure["value"]]]
        axes.errorbar(x, measure["value"], yerr=error, fmt="o", markersize=4, linewidth=1.2,
                      color="#c2571a" if row["share"] > 0 else "#1f5fa8")
        if row["share"] >= 0:
            axes.plot([labels.index(_label(row)) - 0.3, labels.index(_label(row)) + 0.3], [row["share"]] * 2,
                      color="#7a7f87", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right")  # names of runs are long
    axes.set(ylabel="share of leaning responses", xlabel="planted (dashed), or which model")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e5e8")
    figure.savefig(path)
    return True


def _label(row: Mapping[str, Any]) -> str:
    return f"{100 * row['share']:g} %" if row["share"] >= 0 else str(row["name"])
