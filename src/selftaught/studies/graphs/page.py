"""The study's tables as markdown, its panels (the paper's figures 3 and 7) as PNG, and one HTML page of both."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from selftaught.eval import read_rows
from selftaught.studies.graphs import claims
from selftaught.studies.graphs.arms import ARMS, BASE, SMALL, Arm
from selftaught.studies.graphs.claims import Tables
from selftaught.studies.graphs.measures import by_problem, concepts, ladder, over_seeds
from selftaught.studies.graphs.part import IN

COLOURS = ("#6b7280", "#2563eb", "#16a34a", "#dc2626", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#111827",
           "#ea580c", "#0d9488", "#92400e")  # fmt: skip
STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
         "table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;"
         "text-align:left;font-variant-numeric:tabular-nums}img{max-width:100%}")
SMOOTH = 15  # steps of the moving average of the training curves

Found = Mapping[str, Mapping[str, Any]]


class Plan(Protocol):
    """What the page reads of the study's plan."""

    @property
    def recipe(self) -> str: ...
    @property
    def larger(self) -> tuple[int, ...]: ...
    @property
    def samples(self) -> int: ...


def write(out: Path, found: Found, tables: Tables, plan: Plan) -> str:
    """table.md, passk.png, training.png, tradeoff.png and page.html in `out`; returns the text of table.md.

    Without matplotlib there are no pictures, and the tables say so.
    """
    text = "\n".join(markdown(out, found, tables, plan)) + "\n"
    drawn = find_spec("matplotlib") is not None
    if not drawn:
        text += "\nPictures need matplotlib: pip install 'selftaught[plots]', then the same command again.\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    pictures = [panels(out, found, plan), training(out, found), tradeoff(out, found)] if drawn else []
    (out / "page.html").write_text(page(text, pictures), encoding="utf-8")
    return text


# Tables.


def markdown(out: Path, found: Found, tables: Tables, plan: Plan) -> Iterator[str]:
    """The tables and what they say of the paper's claims, as markdown."""
    sets = [IN, *(f"larger-{nodes}" for nodes in plan.larger), "harder", "harder-random"]
    seeds = max((len(runs) for name, runs in found.items() if name != BASE), default=0)
    yield (f"{plan.samples} samples a problem, untruncated; mean over seeds and [lowest, highest] of at most {seeds}. "
           "Concepts are of the right samples of a solved problem: how many, and exp of the entropy of their shares. "
           "`slot 0` is the share of right samples that go through the sector that is short in training and cut in "
           "`harder`.\n")
    top = f"pass@{max(ladder(plan.samples))}"
    yield (f"| arm | in: pass@1 | in: {top} | in: concepts | in: effective concepts | in: slot 0 | "
           + " | ".join(f"{name}: pass@1, {top}" for name in sets[1:]) + " |")
    yield "| --- " * (5 + len(sets)) + "|"
    for name, runs in found.items():
        mean = {each: over_seeds([run[each] for run in runs.values() if each in run]) for each in sets}
        shown = [_cell(mean[IN], key) for key in ("pass@1", top, "concepts", "effective", "slot0")]
        shown += [f"{_cell(mean[each], 'pass@1')}, {_cell(mean[each], top)}" for each in sets[1:]]
        yield f"| {name} | " + " | ".join(shown) + " |"
    for each in sets:
        ks = ladder(plan.samples)
        names = " | ".join(f"pass@{k}" for k in ks)
        yield f"\n### {each}\n\n| arm | {names} | slope | concepts | of all samples |"
        yield "| --- " * (len(ks) + 4) + "|"
        for name, runs in found.items():
            mean_of = over_seeds([run[each] for run in runs.values() if each in run])
            keys = [*(f"pass@{k}" for k in ks), "slope", "concepts", "concepts_all"]
            yield f"| {name} | " + " | ".join(_cell(mean_of, key) for key in keys) + " |"
    yield from _claimed(tables, f"larger-{max(plan.larger)}")
    yield from _entropies(out, found)
    if plan.recipe == SMALL:
        yield from _theory(out, found)
    yield "\n### arms\n"
    yield from (f"- `{name}`: {ARMS[name].about}" for name in found if name in ARMS)


def _cell(mean: Mapping[str, Mapping[str, float]], key: str) -> str:
    if key not in mean:
        return ""
    one = mean[key]
    spread = f" [{one['low']:.3f}, {one['high']:.3f}]" if one["n"] > 1 else ""
    return f"{one['mean']:.3f}{spread}"


def _claimed(tables: Tables, longest: str) -> Iterator[str]:
    """What of the paper's claims holds, and what keeps concepts at which price."""
    yield ("\n### claims\n\nA seed decides where the whole 95 % interval over its test problems is on one side; by "
           "chance one in twenty would.\n")
    yield from claims.lines(claims.CLAIMS, tables, longest)
    yield "\n### fixes\n"
    yield from claims.lines(list(claims.fixes()), tables, longest)


def _entropies(out: Path, found: Found) -> Iterator[str]:
    """Token entropy at the end of training beside concepts, of which it is no measure."""
    yield "\n### token entropy\n\n| arm | nats, last tenth of training | in: effective concepts |\n| --- | --- | --- |"
    for name, runs in found.items():
        if name != BASE:
            curves = [over_training(out / Arm(name, int(seed)).folder)[2] for seed in runs]
            last = over_seeds([{"entropy": statistics.fmean(curve[-max(1, len(curve) // 10) :])} for curve in curves])
            mean = over_seeds([run[IN] for run in runs.values()])
            yield f"| {name} | {_cell(last, 'entropy')} | {_cell(mean, 'effective')} |"


def _theory(out: Path, found: Found) -> Iterator[str]:
    """The base's in-context teacher, measured, and the share of slot 0 that the theory expects of it."""
    base = json.loads((out / BASE / "base.json").read_text(encoding="utf-8"))
    seen = base["pcmi"]
    yield "\n### the base's teacher\n"
    yield (f"The base ({base['parameters']:,} parameters, {len(base['loss'])} steps, {base['seconds']:.0f} s) gives "
           f"the two right walks {seen['right']:.3f} of its mass. Shown the walk of slot 0 (slot 1) it repeats it with "
           f"probability {seen['copies0']:.3f} ({seen['copies1']:.3f}) and writes the other with {seen['shifts0']:.3f} "
           f"({seen['shifts1']:.3f}). Mean log-odds of slot 0 over slot 1: {seen['base']:.2f} in the base, "
           f"{seen['tilted']:.2f} in the optimum of KL(S||T) over sampled demonstrations, {seen['mixed']:.2f} in that "
           "of KL(T||S).\n")
    yield "| share of slot 0 among right walks | |\n| --- | --- |"
    yield f"| base, exact | {seen['slot0_base']:.3f} |"
    yield f"| expected of KL(S\\|\\|T), frozen teacher | {seen['slot0_tilted']:.3f} |"
    yield f"| expected of KL(T\\|\\|S), frozen teacher | {seen['slot0_mixed']:.3f} |"
    for name, runs in found.items():
        yield f"| {name}, measured | {_cell(over_seeds([run[IN] for run in runs.values()]), 'slot0')} |"


# Pictures.


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e3e5e8")
        each.set_axisbelow(True)
    return figure, axes


def _colour(name: str) -> str:
    return COLOURS[[BASE, *ARMS].index(name) % len(COLOURS)]


def _save(figure: Any, axes: Any, path: Path) -> Path:
    handles = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def panels(out: Path, found: Found, plan: Plan) -> Path:
    """pass@k of every set: the mean over seeds, and their range."""
    sets = [IN, *(f"larger-{nodes}" for nodes in plan.larger), "harder", "harder-random"]
    figure, axes = _figure(len(sets))
    for each, one in zip(axes, sets, strict=True):
        for name, runs in found.items():
            mean = over_seeds([run[one] for run in runs.values() if one in run])
            ks = [k for k in ladder(plan.samples) if f"pass@{k}" in mean]
            values = [mean[f"pass@{k}"] for k in ks]
            each.plot(ks, [v["mean"] for v in values], color=_colour(name), label=name, marker="o", markersize=3)
            each.fill_between(ks, [v["low"] for v in values], [v["high"] for v in values], color=_colour(name),
                              alpha=0.15, linewidth=0)  # fmt: skip
        each.set_xscale("log", base=2)
        each.set(title=one, xlabel="k", ylabel="pass@k", ylim=(-0.02, 1.02))
    return _save(figure, axes, out / "passk.png")


def training(out: Path, found: Found) -> Path:
    """Over the steps of training, the mean over seeds: share of right rollouts, concepts in a group, token entropy."""
    titles = ("right rollouts", "concepts of a group's right rollouts", "token entropy, nats")
    figure, axes = _figure(len(titles))
    for name, runs in found.items():
        if name == BASE:
            continue
        curves = [over_training(out / Arm(name, int(seed)).folder) for seed in runs]
        for each, curve in zip(axes, zip(*curves, strict=True), strict=True):
            means = [sum(values) / len(values) for values in zip(*curve, strict=False)]
            each.plot(range(1, len(means) + 1), _smooth(means), color=_colour(name), label=name)
    for each, title in zip(axes, titles, strict=True):
        each.set(title=title, xlabel="step")
    return _save(figure, axes, out / "training.png")


def over_training(folder: Path) -> tuple[list[float], list[float], list[float]]:
    """Of each step of a run: the share of right rollouts, concepts in a group that solved its problem, entropy."""
    right, used, entropy = [], [], []
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in metrics:
        path = folder / "rollouts" / f"step-{row['step']}.jsonl"
        if not path.is_file():
            continue
        rows = read_rows(path, lambda text: None)
        counts = [count for group in by_problem(rows) if (count := concepts(group, right=True))]
        right.append(sum(one["status"] == "right" for one in rows) / len(rows))
        used.append(sum(counts) / len(counts) if counts else float("nan"))
        entropy.append(row.get("entropy", float("nan")))
    return right, used, entropy


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the last SMOOTH steps, those that have a value."""
    out = []
    for end in range(1, len(values) + 1):
        near = [value for value in values[max(0, end - SMOOTH) : end] if value == value]
        out.append(sum(near) / len(near) if near else float("nan"))
    return out


def tradeoff(out: Path, found: Found) -> Path:
    """Every training as a point: pass@1 against effective concepts, and pass@1 against what it solves of harder."""
    figure, axes = _figure(2)
    for name, runs in found.items():
        for seed, run in runs.items():
            label = name if seed == next(iter(runs)) else None
            axes[0].scatter(run[IN]["pass@1"], run[IN].get("effective", float("nan")), color=_colour(name), label=label)
            if "harder" in run:
                axes[1].scatter(run[IN]["pass@1"], run["harder"]["pass@1"], color=_colour(name))
    axes[0].set(xlabel="in: pass@1", ylabel="in: effective concepts")
    axes[1].set(xlabel="in: pass@1", ylabel="harder: pass@1", ylim=(-0.02, 1.02))
    return _save(figure, axes, out / "tradeoff.png")


def page(text: str, pictures: Sequence[Path]) -> str:
    """The tables and the pictures as one HTML file that needs nothing else."""
    coded = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in pictures}
    images = "".join(f'<img alt="{name}" src="data:image/png;base64,{data}">' for name, data in coded.items())
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Concept graphs</title><style>{STYLE}</style>'
            f"<h1>Concept graphs</h1>{images}{''.join(_html(text))}</html>\n")


def _html(text: str) -> Iterator[str]:
    """The few forms of markdown that `markdown` writes: tables, headings, lists and paragraphs."""
    for block in text.replace("\\|", "¦").split("\n\n"):
        lines = [line for line in block.strip().splitlines() if line]
        table = [line for line in lines if line.startswith("|")]
        for line in lines:
            if line.startswith("### "):
                yield f"<h2>{escape(line[4:])}</h2>"
            elif not line.startswith("|"):
                yield f"<p>{escape(line)}</p>"
        if table:
            yield "<table>"
            for line in table:
                if not line.startswith("| ---"):
                    cells = "".join(f"<td>{escape(c.strip())}</td>" for c in line.strip("|").split("|"))
                    yield f"<tr>{cells.replace('¦', '|')}</tr>"
            yield "</table>"
