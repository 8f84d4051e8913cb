"""report.html: one page, offline, no script. Of one run: result, tables, curves, samples; of several: overlays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from selftaught.errors import UserError
from selftaught.report.progress import duration
from selftaught.report.read import RunData, Sample, read_run, read_samples
from selftaught.report.svg import Line, line_chart
from selftaught.report.words import (
    best_constant,
    control_rows,
    headline,
    interval,
    measure_rows,
    named,
    number,
    result_sentence,
    signed,
    total_seconds,
)

SAMPLES = 10
PROMPT_TAIL = 400  # characters
RESPONSE_HEAD = 2000


@dataclass(frozen=True)
class Panel:
    """One chart of training: the first of `keys` that a run logs, what it means, and what its axis covers at least."""

    title: str
    keys: tuple[str, ...]
    caption: str
    y_range: tuple[float, float] | None = None
    smooth: bool = True


PANELS = (
    Panel("Reward", ("reward",), "Mean reward of the training responses of each step."),
    Panel(
        "Loss", ("loss",), "The objective. Its level says little: most of these methods have no loss that must fall."
    ),
    Panel(
        "Entropy", ("entropy",), "Nats per token of the student's own distribution. Towards 0: it has one answer left."
    ),
    Panel("Response length", ("completions/mean_length",), "Mean tokens of a response."),
    Panel("Cut responses", ("completions/clipped_ratio",), "Share of responses cut at the length limit.", (0.0, 0.1)),
    Panel(
        "Dead groups",
        ("frac_reward_zero_std",),
        "Share of problems whose responses all got one reward: a group advantage learns nothing from them.",
        (0.0, 1.0),
    ),
    Panel("Gradient norm", ("grad_norm",), "Before clipping."),
    Panel("Learning rate", ("learning_rate",), "The schedule.", None, False),
    Panel(
        "Sampler gap",
        ("sampling/sampling_logp_difference/mean",),
        "Mean distance of the sampler's log-probs from the trainer's, in nats. More than rounding means a mismatch.",
    ),
    Panel(
        "Teacher gap",
        ("teacher/gap_abs",),
        "Mean distance of the teacher's log-probs from the student's on the student's own tokens, in nats.",
    ),
    Panel("KL to the reference", ("kl", "method/kl"), "Nats per token from the initial model."),
)


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    svg: Markup
    legend: tuple[tuple[int, str], ...]


def write_report(folders: Sequence[Path | str], out: Path | str) -> Path:
    """Write the report of one run, or of several beside one another, to `out`; returns it.

    UserError: a folder is no run's, or `out` cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError("report: no run folder given; name one or more folders under runs/")
    out = Path(out)
    try:
        out.write_text(render(runs), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"report: {out} cannot be written ({error.strerror}); choose another place") from error
    return out


def render(runs: Sequence[RunData]) -> str:
    """The page as text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    single = runs[0] if len(runs) == 1 else None
    charts, rest = _charts(runs)
    samples = read_samples(single.path, SAMPLES) if single else []
    shared = _shared_beginning([sample.prompt for sample in samples])
    return templates.get_template("report.html.j2").render(
        title=single.name if single else f"{len(runs)} runs",
        runs=[_about(run) for run in runs],
        charts=charts,
        rest=rest,
        samples=[_sample(sample, shared) for sample in samples],
        shared=shared > 0,
    )


def _about(run: RunData) -> dict[str, Any]:
    """What the template says of one run in words and tables."""
    results = run.results
    before, after, difference = (results.get(part) or {} for part in ("before", "after", "difference"))
    name = headline(results)
    seconds = total_seconds(results)
    facts = [
        ("model", named(run.run.get("model"))),
        ("method", named(run.run.get("method"))),
        ("task", named(run.run.get("data"))),
        ("reward", named(run.run.get("reward"))),
        ("privilege", named(run.run.get("privilege"))),
        ("steps", _steps(run)),
        ("seed", str(run.run.get("seed", ""))),
        ("wall time", duration(seconds) if seconds is not None else ""),
    ]
    parts = results.get("seconds") or {}
    spent = [(k, duration(v)) for k, v in parts.items() if k != "total" and isinstance(v, int | float)]
    constant = best_constant(results)
    return {
        "name": run.name,
        "facts": [(k, v) for k, v in facts if v],
        "fact": dict(facts),
        "sentence": result_sentence(results),
        "headline": name or "pass@1",
        "before": interval(before.get(name)),
        "after": interval(after.get(name)),
        "difference": signed(difference[name]) if name in difference else "",
        "measures": measure_rows(results),
        "controls": control_rows(results),
        "constant": number(constant.get("value")),
        "constant_answer": constant.get("answer"),
        "problems": (after or before).get("problems"),
        "spent": spent,
        "recipe": yaml.safe_dump(dict(run.run), sort_keys=False, allow_unicode=True) if run.run else "",
        "versions": json.dumps(run.versions, indent=2) if run.versions else "",
    }


def _steps(run: RunData) -> str:
    optim = run.run.get("optim")
    planned = optim.get("steps") if isinstance(optim, dict) else None
    return f"{run.steps} of {planned}" if planned and planned != run.steps else str(run.steps)


def _charts(runs: Sequence[RunData]) -> tuple[list[Chart], list[Chart]]:
    """The charts that have data: the known ones in their order, then every other number that was logged."""
    found = _accuracy_charts(runs)
    used = {key for run in runs for key in run.keys if key.startswith("eval/pass@")}
    for panel in PANELS:
        lines = []
        for i, run in enumerate(runs):
            key = next((key for key in panel.keys if run.series(key)), None)
            if key is not None:
                used.add(key)
                lines.append(Line(run.name, run.series(key), colour=i, smooth=panel.smooth))
        found += _chart(panel.title, panel.caption, lines, panel.y_range)
    rest: list[Chart] = []
    for key in dict.fromkeys(key for run in runs for key in run.keys):
        if key not in used and not key.endswith(("_low", "_high")):
            lines = [
                Line(run.name, run.series(key), run.band(key), colour=i, smooth=not key.startswith("eval/"))
                for i, run in enumerate(runs)
                if run.series(key)
            ]
            rest += _chart(key, "", lines, None)
    return found, rest


def _accuracy_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Held-out accuracy: every pass@k of one run in one chart, or one chart for each k with all runs in it."""
    keys = [k for k in dict.fromkeys(k for run in runs for k in run.keys) if k.startswith("eval/pass@")]
    keys = [k for k in keys if not k.endswith(("_low", "_high"))]
    band = "Bands: 95 % bootstrap intervals over problems."
    if len(runs) > 1:
        return [
            chart
            for key in keys
            for chart in _chart(
                f"Held-out {key.removeprefix('eval/')}",
                band,
                [Line(r.name, r.series(key), r.band(key), colour=i) for i, r in enumerate(runs) if r.series(key)],
                (0.0, 1.0),
            )
        ]
    (run,) = runs
    lines = [Line(k.removeprefix("eval/"), run.series(k), run.band(k), colour=i) for i, k in enumerate(keys)]
    constant = best_constant(run.results).get("value")
    steps = [step for line in lines for step, _ in line.points]
    if constant is not None and steps and min(steps) < max(steps):
        ends = [(min(steps), constant), (max(steps), constant)]
        lines.append(Line("best constant answer", ends, colour=7, dashed=True))
    return _chart("Held-out accuracy", band, lines, (0.0, 1.0))


def _chart(title: str, caption: str, lines: Sequence[Line], y_range: tuple[float, float] | None) -> list[Chart]:
    svg = line_chart(lines, x_label="step", alt=f"{title} by step", y_range=y_range)
    if not svg:
        return []
    legend = tuple((line.colour, line.label) for line in lines) if len(lines) > 1 else ()
    return [Chart(title, caption, Markup(svg), legend)]


def _shared_beginning(prompts: Sequence[str]) -> int:
    """Characters of the whole lines with which all prompts begin: worked examples, a system prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what the extremes of the order share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first.rfind("\n", 0, same) + 1


def _sample(sample: Sample, shared: int) -> dict[str, Any]:
    own = sample.prompt[shared:]
    cut = shared > 0 or len(own) > PROMPT_TAIL
    return {
        "prompt": ("… " if cut else "") + own[-PROMPT_TAIL:],
        "reference": sample.reference,
        "sides": [_side("before", sample.before), _side("after", sample.after)],
    }


def _side(when: str, row: Any) -> dict[str, Any]:
    response = str(row.get("response") or "")
    return {
        "when": when,
        "response": response[:RESPONSE_HEAD] + ("…" if len(response) > RESPONSE_HEAD else ""),
        "status": row.get("status") or "unknown",
        "answer": row.get("answer"),
        "tokens": row.get("tokens"),
        "cut": row.get("finish") == "length",
    }
