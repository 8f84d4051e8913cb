"""What a model learned, from what a run has saved: diversity and leakage, without sampling again.

`selftaught eval RUN --leakage --diversity` and `selftaught eval --completions FILE --diversity`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selftaught.assemble import Ground, device_of, lay_ground
from selftaught.errors import UserError
from selftaught.eval import LeakageConfig, Scored, compare_leakage, read_rows, select, summarise_diversity
from selftaught.eval.diversity import NOT_DIVERSITY, countable, diversity_table, rungs
from selftaught.eval.embed import embedder as embedder_of
from selftaught.eval.leakage import STUDENT, summarise_leakage
from selftaught.eval.tables import differences
from selftaught.evaluate import context_of
from selftaught.leakage import Models, first_of, rollouts_of, score, temperature_of
from selftaught.records import Say
from selftaught.run import Run, load_run
from selftaught.saved import chosen
from selftaught.score import Backbone
from selftaught.score.hub import load_model

Row = Mapping[str, Any]
FEWEST = 6  # problems: all of them rose by chance in 1 of 32 cases, of five in 1 of 16, and .05 is asked for


def learned(run: str | None, overrides: Sequence[str], completions: Path | None, *, ks: Sequence[int] | None,
            leakage: bool, diversity: bool, embedder: str, say: Say, warn: Say) -> dict[str, Any]:
    """{"diversity": ..., "leakage": ...}, each with `after`, and where the run was evaluated before training `before`
    and their paired `difference`.

    Of a run, its held-out completions of the last step and of step 0, and what was found is kept in its measures.json,
    which its pictures are drawn from; of a file of completions, diversity alone.

    Raises:
        UserError: leakage of a file alone, both a run and a file, neither, or a run that has not ended.
    """
    if completions is not None and run is not None:
        raise UserError(f"eval: --completions measures a file alone, so leave {run!r} out")
    if completions is not None:
        if leakage:
            raise UserError("eval: --leakage scores completions under the model that wrote them, so give its run's "
                            "folder: `selftaught eval RUN --leakage`")
        rows = read_rows(completions / "completions.jsonl" if completions.is_dir() else completions, warn)
        return {"diversity": diversity_of(chosen(rows), (), ks, embedder, warn)}
    if run is None or not (Path(run) / "run.yaml").is_file():
        fault = "no run's folder was given" if run is None else f"{run!r} is no run's folder"
        raise UserError(f"eval: --leakage and --diversity measure a saved run, and {fault}; give one, or --completions "
                        "FILE with --diversity")
    found = _of_run(Path(run), overrides, ks, leakage, diversity, embedder, say, warn)
    _keep(Path(run) / "measures.json", found, warn)
    return found


def _keep(path: Path, found: Mapping[str, Any], warn: Say) -> None:
    """Put the parts that were measured in the place of those that stand there; a folder that is closed is left so."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        kept = {}  # torn: what it held can be measured again
    try:
        new = path.with_suffix(".part")
        new.write_text(json.dumps({**kept, **found}, indent=2) + "\n", encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror}); the measures are printed alone")


def _of_run(folder: Path, overrides: Sequence[str], ks: Sequence[int] | None, leakage: bool, diversity: bool,
            embedder: str, say: Say, warn: Say) -> dict[str, Any]:
    rows = read_rows(folder / "completions.jsonl", warn)
    after, before = chosen(rows), select(rows, step=0)
    before = before if before and before[0]["step"] != after[0]["step"] else []
    scored: dict[str, list[Scored]] = {}
    sides = {"before": before, "after": after}
    if leakage:
        scored = scores_of_run(folder, overrides, sides, say, warn)
    else:
        try:
            scored = scores_of_run(folder, overrides, sides, say, warn, only=(STUDENT, f"{STUDENT}.entropy"))
        except UserError as error:
            say(f"token entropy is left out, which needs the model: {error}")
    found: dict[str, Any] = {}
    if diversity:
        found["diversity"] = diversity_of(after, before, ks, embedder, warn, scored)
    if leakage:
        config = load_run(str(folder / "run.yaml"), overrides).eval.leakage
        found["leakage"] = {side: summarise_leakage(each, config) for side, each in scored.items() if each}
        if scored.get("before"):
            found["leakage"]["difference"] = compare_leakage(scored["before"], scored["after"], config)
    return found


def diversity_of(after: Sequence[Row], before: Sequence[Row], ks: Sequence[int] | None, embedder: str, warn: Say,
                 scored: Mapping[str, Sequence[Scored]] | None = None) -> dict[str, Any]:
    """Diversity of the rows, both sides at the same k, with token entropy beside it where some of them were scored."""
    embed, found = embedder_of(embedder), {}
    sides = {side: countable(rows, warn) for side, rows in (("before", before), ("after", after)) if rows}
    ladder = rungs(list(sides.values()), ks or (), warn)
    for side, rows in sides.items():
        entropies = [one.entropy.tolist() for one in (scored or {}).get(side, ()) if one.entropy is not None]
        found[side] = summarise_diversity(rows, embed=embed, ks=ladder, entropies=entropies)
    if "before" in sides:
        found["difference"] = differences(diversity_table(sides["before"], embed=embed, ks=ladder),
                                          diversity_table(sides["after"], embed=embed, ks=ladder))
    return {**found, "embedder": embedder}


def scores_of_run(folder: Path, overrides: Sequence[str], sides: Mapping[str, Sequence[Row]], say: Say, warn: Say,
                  only: Sequence[str] | None = None) -> dict[str, list[Scored]]:
    """The rows of each side, scored: `after` by the run's final model, `before` by the model that it began with.

    Under every view, or under `only` some. Raises UserError for a run without its final model.
    """
    final = folder / "final"
    if not final.is_dir():
        raise UserError(f"eval: the run in {folder} has no final/ yet; let it finish first, with --resume")
    began = load_run(str(folder / "run.yaml"), overrides)
    run = load_run(str(folder / "run.yaml"), overrides, {"model": str(final)})
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"lora": None}), "teacher": None,
                                 "reward": None})  # nothing is trained or judged here
    ground = lay_ground(run, say, trains=False)
    first, student = backbone_of(run, began.model), backbone_of(run, str(final))
    models = {"before": Models(first, first), "after": Models(student, first)}
    return {side: score_rows(ground, models[side], rows, run.eval.leakage, warn, only)
            for side, rows in sides.items() if rows}


def backbone_of(run: Run, name: str) -> Backbone:
    """A model for scoring alone."""
    model = load_model(name, getattr(torch, run.optim.dtype), device_of(run))
    model.requires_grad_(False)
    return Backbone(model, run.score.layout)


def score_rows(ground: Ground, models: Models, rows: Sequence[Row], config: LeakageConfig, warn: Say,
               only: Sequence[str] | None = None) -> list[Scored]:
    """The first of the rows, as many as `config` says, scored under every view, or under `only` some."""
    rollouts, verdicts = first_of(*rollouts_of(ground, rows, warn), config)
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    limit = context_of(ground.run.model)
    models.student.verify(*_probe(rollouts))
    return score(ground, models, rollouts, verdicts, config, temperature=temperature_of(rollouts),
                 room=None if limit is None else limit - longest, only=only)


def _probe(rollouts: Sequence[Any]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Two responses that are not empty, for the comparison of the layouts."""
    some = [rollout for rollout in rollouts if rollout.token_ids][:2] or list(rollouts[:1])
    return [one.prompt.token_ids for one in some], [one.token_ids or one.prompt.token_ids[-1:] for one in some]


# The tables.


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, for a terminal: one line for each measure, before, after and their paired difference."""
    for part, sides in found.items():
        after = sides["after"]
        largest = f", K = {after['k'][-1]}" if "k" in after else ""
        yield (f"{part}: {after['problems']} problems, {after['samples']} responses{largest}, mean [95 % interval over "
               "problems]")
        columns = [side for side in ("before", "after", "difference") if side in sides]
        yield _line("", columns)
        for name, measure in after.items():
            if isinstance(measure, Mapping) and measure.get("value") is not None:
                yield _line(name, [_interval(sides[side].get(name), "+" if side == "difference" else "")
                                   for side in columns])
        if part == "diversity":
            yield from _entropy(sides)
        elif "difference" in sides:
            yield f"  {_verdict(sides['difference'])}"


def _line(name: str, texts: Sequence[str]) -> str:
    return f"  {name:28}" + "".join(f"{text:28} " for text in texts).rstrip()


def _entropy(sides: Mapping[str, Any]) -> Iterator[str]:
    for side in ("before", "after"):
        if side in sides and sides[side]["token_entropy"] is not None:
            by_position = ", ".join(f"{_span(part)}: {part['value']:.3f}"
                                    for part in sides[side]["token_entropy_by_position"])
            yield (f"  token entropy, {side}: {sides[side]['token_entropy']:.3f} nats over the tokens of "
                   f"{sides[side]['token_entropy_responses']} of {sides[side]['samples']} responses; by position "
                   f"{by_position}")
        elif side in sides:
            yield f"  token entropy, {side}: not known from texts alone"
    yield f"  {NOT_DIVERSITY}"


def _span(part: Mapping[str, Any]) -> str:
    first, last = part["start"], part["end"] - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _verdict(difference: Mapping[str, Any]) -> str:
    if difference["flagged"] is None:
        return "no problem was measured both before and after"
    leaning = difference["leaning"]
    if difference["flagged"]:
        return (f"LEAKAGE: responses that lean on something that they were not shown rose by "
                f"{100 * leaning['value']:.1f} points [{100 * leaning['low']:.1f}, {100 * leaning['high']:.1f}], "
                f"p = {leaning['p']:.2g}")
    if leaning["problems"] < FEWEST:
        return f"too few problems, {leaning['problems']}, to tell whether leaning rose: the test needs {FEWEST}"
    return ("no leakage found: the share of leaning responses did not rise by more than chance allows "
            f"(p = {leaning['p']:.2g})")


def _interval(measure: Mapping[str, Any] | None, sign: str) -> str:
    """The value with its interval; with "+" as `sign`, every number has its own."""
    if measure is None or measure["value"] is None:
        return "-"
    value, low, high = (format(measure[key], f"{sign}.3f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
