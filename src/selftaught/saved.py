"""Saved completions without a model: measured, compared with others, and scored again by another verifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from selftaught import data, reward
from selftaught.errors import UserError
from selftaught.eval import append_rows, compare, evaluations, read_rows, select, summarise, too_few
from selftaught.eval.rows import KEYS, count_of, some_of
from selftaught.recipe import is_recipe
from selftaught.records import Finish, Problem, Prompt, Rollout, Sampling, Say, Verdict
from selftaught.reward import RewardConfig, Rewarder
from selftaught.run import Run, load_run, make_reward

Row = Mapping[str, Any]
NOT_SAVED = -1  # stands for each token of a saved response: how many there were is known, and not which


def measure_file(path: Path, ks: Sequence[int] | None, warn: Say) -> dict[str, Any]:
    """The measures of a saved completions file, or of a folder's: the student's latest step in it.

    Without `ks`, those of one sample and of all samples. A k that is too large, for some problems or for all, is named
    through `warn` and the rest counted. Raises UserError where nothing is left.
    """
    rows = chosen(read_rows(_file(path), warn))
    return summarise(rows, _ladder([rows], ks, warn))


def compare_files(before: Path, after: Path, ks: Sequence[int] | None, warn: Say) -> dict[str, Any]:
    """Paired differences, `after` minus `before`, on the problems of both: see `eval.compare`."""
    old, new = (chosen(read_rows(_file(path), warn)) for path in (before, after))
    found = compare(old, new, _ladder([old, new], ks, warn))
    first, second = ({str(row["problem"]) for row in rows} for rows in (old, new))
    for path, alone in ((before, first - second), (after, second - first)):
        if alone:
            warn(f"{count_of(sorted(alone), 'problem')} in {path} alone, not compared: {some_of(sorted(alone))}")
    for field in ("sampling", "reference"):
        changed = _differing(old, new, field)
        if changed:
            warn(f"{count_of(changed, 'problem')} with another {field} on one side, compared all the same: "
                 f"{some_of(changed)}")
    return found


def score_again(path: Path, verifier: str, out: Path | None, warn: Say, say: Say) -> Path:
    """Judge every saved completion by another verifier, without sampling: a new file of the same rows; its path.

    `verifier` is a reward in any form that a recipe may give it, or a recipe, whose reward and data are taken. What a
    function or reasoning-gym needs to know of the problems comes from that recipe, else from the one in the file's
    folder; without either, only the saved reference answer is known. Problems that it cannot judge are named and get no
    score. Raises UserError for a reward that cannot work on these rows.
    """
    path = _file(path)
    rows = read_rows(path, warn)
    config, run = _reward_of(verifier)
    needs_columns = any(part.is_function or part.name == "gym" for part in config.parts)
    known = _data(run, path.parent, say) if run is not None or needs_columns else {}
    problems = {row["problem"]: known.get(str(row["problem"])) or _as_saved(row) for row in rows}
    strange = sorted(str(each) for each in problems if str(each) not in known) if known else []
    if strange:
        warn(f"{count_of(strange, 'problem')} not in the recipe's data, known by what is saved alone: "
             f"{some_of(strange)}")
    _refuse_unknown_lengths(config, rows)
    good = {problem.id for problem in reward.judgeable(config, list(problems.values()), warn)}
    reward.check(config, [problem for problem in problems.values() if problem.id in good])
    judged = [row for row in rows if problems[row["problem"]].id in good]
    with Rewarder(config) as rewarder:
        verdicts = iter(rewarder([_rollout(row, problems[row["problem"]]) for row in judged]))
    new = [_judged(row, problems[row["problem"]],
                   next(verdicts) if problems[row["problem"]].id in good else Verdict(None, "error")) for row in rows]
    target = out or _unused(path, config)
    if target.exists():
        raise UserError(f"--out: {target} is there already; choose another name")
    try:
        append_rows(target, new)
    except OSError as error:
        raise UserError(f"--out: {target} cannot be written ({error.strerror}); choose another place") from error
    moved = Counter((str(old["status"]), str(row["status"])) for old, row in zip(rows, new, strict=True))
    shown = ", ".join(f"{was} to {now} {times}" for (was, now), times in moved.most_common() if was != now)
    say(f"{len(rows)} completions scored again: {shown or 'every status is as it was'}")
    return target


def _file(path: Path) -> Path:
    return path / "completions.jsonl" if path.is_dir() else path


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The one evaluation that is measured: the student's latest step, or that of the only arm there is."""
    arms = {arm for _, arm, _ in evaluations(rows)}
    return select(rows, arm=arms.pop()) if len(arms) == 1 else select(rows)


def _ladder(sides: Sequence[Sequence[Row]], ks: Sequence[int] | None, warn: Say) -> list[int]:
    """The k that can be measured on every side; what cannot, wholly or for some problems, is named."""
    most = min(max(Counter(row["problem"] for row in rows).values(), default=1) for rows in sides)
    asked = sorted({1, most}) if ks is None else list(ks)
    kept = [k for k in asked if k <= most]
    if not kept:
        return asked  # measuring them says why not
    for k in asked:
        if k > most:
            warn(f"k = {k}: no problem has more than {most} samples; left out, and the rest counted")
    for rows in sides:
        for k, short in too_few(rows, kept).items():
            named = [f"{problem} ({n})" for problem, n in short]
            warn(f"k = {k}: {count_of(named, 'problem')} with fewer samples left out of it: {some_of(named)}")
    return kept


def _differing(before: Sequence[Row], after: Sequence[Row], field: str) -> list[str]:
    """The problems of both sides whose rows do not all say the same of `field`."""
    said: list[dict[Any, set[str]]] = [{}, {}]
    for side, rows in zip(said, (before, after), strict=True):
        for row in rows:
            side.setdefault(row["problem"], set()).add(repr(row[field]))
    return sorted(str(problem) for problem in said[0].keys() & said[1].keys() if said[0][problem] != said[1][problem])


def _reward_of(verifier: str) -> tuple[RewardConfig, Run | None]:
    """The reward that `verifier` spells, and the run of the recipe that it names, if it names one."""
    if is_recipe(verifier):
        run = load_run(verifier)
        if run.reward is None:
            raise UserError(f"--reward {verifier}: this recipe has no reward; name a verifier")
        return run.reward, run
    try:
        value = yaml.safe_load(verifier)
    except yaml.YAMLError as error:
        raise UserError(f"--reward {verifier!r}: neither a verifier nor valid YAML: {error}") from error
    return make_reward(value), None


def _data(run: Run | None, folder: Path, say: Say) -> dict[str, Problem]:
    """The problems, by id, of `run` or of the recipe in `folder`; {} where that is none, or its data cannot be read."""
    beside = next((path for name in ("eval.yaml", "run.yaml") if (path := folder / name).is_file()), None)
    if run is None and beside is None:
        return {}
    try:
        run = run or load_run(str(beside))
        found = data.load(run.data, seed=run.seed, say=lambda line: None)
    except UserError as error:
        say(f"the problems of {beside or 'the recipe'} cannot be read, so only what is saved is known of them: {error}")
        return {}
    return {problem.id: problem for problem in (*found.train, *found.heldout, *found.shots)}


def _as_saved(row: Row) -> Problem:
    """What a row itself says of its problem: keys that are no row's own are columns of a user's."""
    prompt, answer = row["prompt"], row["reference"]
    columns = {key: value for key, value in row.items() if key not in KEYS}
    shown = tuple(prompt) if isinstance(prompt, list) else str(prompt or "")
    return Problem(str(row["problem"]), shown, None if answer is None else str(answer), columns=columns)


def _refuse_unknown_lengths(config: RewardConfig, rows: Sequence[Row]) -> None:
    """Raise UserError for a length penalty on rows that do not say how long they are, or may be."""
    for part in config.parts:
        if part.name == "length":
            lacking = sum(row["tokens"] is None or not (part.max_length or row["sampling"]) for row in rows)
            if lacking:
                raise UserError(f"--reward length: {lacking} rows do not say how many tokens they have or may have; "
                                "leave it out, or set its max_length where only the limit is not saved")


def _rollout(row: Row, problem: Problem) -> Rollout:
    """A saved row as its verifier sees it."""
    names = {field.name for field in fields(Sampling)}
    settings = {key: value for key, value in (row["sampling"] or {}).items() if key in names}
    tokens = int(row["tokens"] or 0)
    finish: Finish = "length" if row["finish"] == "length" else "stop"
    return Rollout(problem, row["sample"], Prompt(()), (NOT_SAVED,) * tokens, (0.0,) * tokens,
                   str(row["response"] or ""), finish, Sampling(**settings), 0, row["step"] or 0)


def _judged(row: Row, problem: Problem, verdict: Verdict) -> dict[str, Any]:
    """The row with another verdict."""
    return {**row, "score": verdict.score, "status": verdict.status, "answer": verdict.answer,
            "strategy": verdict.strategy, "reference": problem.answer}


def _unused(path: Path, config: RewardConfig) -> Path:
    """A name beside `path` that tells the verifier, and is free."""
    name = config.parts[0].name.rpartition(":")[2]
    numbered = chain([""], (f"-{number}" for number in count(2)))
    places = (path.with_name(f"{path.stem}-{name}{number}{path.suffix}") for number in numbered)
    return next(place for place in places if not place.exists())
