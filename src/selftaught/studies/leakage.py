"""Is leakage measured, or guessed? Students with 0, 5, 20 and 50 % planted contamination, ranked by the leakage score.

Each is the base model fine-tuned on texts of which that share leans on a privilege which its prompt does not have
(`planted.py`); beside them stand the base model, the same once more under another seed and, where their runs are given,
students of GRPO, which had no teacher. A score that measures leakage ranks the first by their share and leaves the
others alone; a measure of skill does not. Every student's table is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field, ValidationError, field_validator

from selftaught import privilege
from selftaught.assemble import Ground, lay_ground, load_engine
from selftaught.errors import UserError, nearest
from selftaught.eval import append_rows, leakage_table
from selftaught.eval.config import LeakageConfig
from selftaught.eval.tables import Table
from selftaught.evaluate import EVALUATION, heldout, sample_rows
from selftaught.leakage import Models, config_of
from selftaught.learned import backbone_of, score_rows
from selftaught.records import Say, Section
from selftaught.run import Run, load_run
from selftaught.score import Backbone
from selftaught.studies.planted import encoded, leaning, planted, tiny_model, tune
from selftaught.studies.ranking import AGAIN, BASE, write

SOURCE = "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&allow_negation=false&bare=true"


class Settings(Section):
    """What the study takes on its command line as key=value."""

    model: str = Field("quickstart", description="the base model")
    grpo: tuple[str, ...] = Field((), description="folders of finished GRPO runs that began with that model, "
                                  "separated by commas")
    shares: tuple[float, ...] = Field((0.0, 0.05, 0.2, 0.5), min_length=2, description="planted; 0 must be among them")
    texts: int = Field(512, ge=16, description="texts of each student's fine-tuning, one for each problem")
    steps: int = Field(32, ge=1, description="of fine-tuning")
    batch: int = Field(16, ge=1, description="texts of a step")
    learning_rate: float = Field(2e-4, gt=0, description="its peak; a quarter of it teaches no rare wording")
    problems: int = Field(96, ge=2, description="held-out problems")
    samples: int = Field(4, ge=1, description="responses to each")
    full: int = Field(16, ge=1, description="problems of which every view is scored; the others under the reference")

    @field_validator("grpo", mode="before")
    @classmethod
    def _folders(cls, given: Any) -> Any:
        return tuple(filter(None, map(str.strip, given.split(",")))) if isinstance(given, str) else given or ()


@dataclass(frozen=True)
class Student:
    """One to make and measure. `share` planted, -1: none, and not fine-tuned. `folder`: its weights, None: the base
    model's. `weights`: their digest, by which a kept table is known to be of them. `again`: sampled under another seed.
    """

    name: str
    share: float = -1.0
    seed: int = 0
    folder: str | None = None
    weights: str | None = None
    again: bool = False


SMOKE: dict[str, Any] = {"texts": 320, "steps": 60, "batch": 16, "learning_rate": 1e-3, "problems": 48, "full": 48}
BASE_STEPS, BASE_RATE = 400, 2e-3  # of the tiny base model


def settings_of(overrides: Sequence[str], smoke: bool) -> Settings:
    """Raises UserError for an unknown key, a bad value, or shares without a clean student."""
    given: dict[str, Any] = dict(SMOKE) if smoke else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in Settings.model_fields:
            raise UserError(f"study leakage: {override!r}: {nearest(key, Settings.model_fields)}")
        given[key] = yaml.safe_load(text)
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"study leakage: {'.'.join(map(str, fault['loc']))} = {fault['input']!r}: {fault['msg']}"
                        ) from None
    if 0.0 not in settings.shares or not all(0 <= share <= 1 for share in settings.shares):
        raise UserError(f"study leakage: shares = {list(settings.shares)}: from 0 to 1, with 0, the clean student, "
                        "among them")
    return settings


def run(out: Path, say: Say, *, seeds: Sequence[int] = (0, 1, 2), smoke: bool = False, overrides: Sequence[str] = ()
        ) -> str:
    """Make and measure what is missing under `out`, then write report.md, results.json and scores.png there; returns
    the table. Raises UserError.
    """
    settings = settings_of(overrides, smoke)
    out.mkdir(parents=True, exist_ok=True)
    _keep_settings(out, settings, smoke)
    model = str(_tiny_base(out, settings, say)) if smoke else settings.model
    study = recipe(model, settings, out, smoke)
    if smoke and not settings.grpo:
        settings = settings.model_copy(update={"grpo": (str(_tiny_grpo(out, study, say)),)})
    todo = students_of(settings, seeds)
    ground = lay_ground(study, say)
    try:
        base = backbone_of(study, study.model)
        for number, student in enumerate(todo, start=1):
            if not _kept(out, student):
                say(f"{student.name}: {number} of {len(todo)}")
                _student(out, ground, base, settings, student, say)
    finally:
        if ground.rewarder is not None:
            ground.rewarder.close()
    return write(out, [_read(out / f"{student.name}.json") for student in todo], settings.model_dump(mode="json"))


def students_of(settings: Settings, seeds: Sequence[int]) -> list[Student]:
    """All of them, in the report's order; a run of GRPO is called by its folder's name. Raises UserError where a run
    has not ended, or two folders have one name.
    """
    runs: list[Student] = []
    for given in settings.grpo:
        final, name = Path(given) / "final", f"grpo-{Path(given).resolve().name}"
        files = sorted(final.glob("*.safetensors"))
        if not files:
            raise UserError(f"study leakage: grpo = {given!r}: no weights in its final/; give the folder of a finished "
                            "run")
        if any(name == other.name for other in runs):
            raise UserError(f"study leakage: grpo = {given!r}: two runs whose folders have this name; rename one")
        runs.append(Student(name, folder=str(final), weights=_digest(files)))
    return [Student(BASE), Student(AGAIN, again=True), *runs,
            *(Student(f"planted-{share:g}-{seed}", share, seed) for seed in seeds for share in settings.shares)]


def _digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _kept(out: Path, student: Student) -> bool:
    """Is there a table, and of these very weights?"""
    path = out / f"{student.name}.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("weights") == student.weights


def recipe(model: str, settings: Settings, out: Path, smoke: bool) -> Run:
    """The quickstart's task with room for a sentence."""
    tree = {
        "model": model, "method": "grpo", "reward": "numeric", "privilege": "answer", "out": str(out / "unused"),
        "data": {"source": SOURCE, "train": settings.texts, "heldout": settings.problems, "shots": 0 if smoke else 4,
                 "template": "completion"},
        "rollout": {"max_completion_length": 32, "stop": ["\n"], "max_rows": 256},
        "optim": {"steps": 1, "token_budget": 1024},
        "eval": {"samples": settings.samples, "k": [1], "leakage": {"problems": settings.problems,
                                                                    "samples": settings.samples}},
    }  # fmt: skip
    return load_run(tree)


def _keep_settings(out: Path, settings: Settings, smoke: bool) -> None:
    """Write what the tables under `out` were made with. Raises UserError where it was something else."""
    path = out / "settings.json"
    mine = {**settings.model_dump(mode="json"), "smoke": smoke}
    if path.is_file() and (was := json.loads(path.read_text(encoding="utf-8"))) != mine:
        differ = [key for key in mine if mine[key] != was.get(key) and key != "grpo"]
        if differ:
            raise UserError(f"study leakage: {out} was made with {differ[0]} = {was.get(differ[0])!r}, not "
                            f"{mine[differ[0]]!r}; give that, or another --out")
    path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


def _student(out: Path, ground: Ground, base: Backbone, settings: Settings, student: Student, say: Say) -> None:
    """Make one student, let it answer, measure it, and keep its table."""
    clock, name = _Clock(), student.name
    own = replace(ground, run=ground.run.model_copy(update={"model": student.folder or ground.run.model,
                                                            "seed": ground.run.seed + student.again}))
    backbone, engine = load_engine(own)
    if student.share >= 0:
        texts = [encoded(ground, ground.renderer.prompt(problem).token_ids, text)
                 for problem, text, _ in planted(ground.dataset.train[: settings.texts], student.share, student.seed)]
        tune(backbone, texts, steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate,
             seed=student.seed, budget=ground.run.optim.token_budget, say=say)
    clock.lap("tune")
    problems = heldout(ground)
    rows = sample_rows(own, engine, problems, [ground.renderer.prompt(problem) for problem in problems],
                       step=0, arm="student", samples=settings.samples, model=name)  # fmt: skip
    engine.close()
    clock.lap("sample")
    (out / f"{name}.completions.jsonl").unlink(missing_ok=True)
    append_rows(out / f"{name}.completions.jsonl", rows)
    table = measure(ground, Models(backbone, base), rows, ground.run.eval.leakage, settings.full, say)
    clock.lap("score")
    say("  " + ", ".join(f"{what} {wall:.0f} s ({worked:.0f} s of a processor)"
                         for what, (wall, worked) in clock.seconds.items()))
    work = out / f".{name}.tmp"
    work.write_text(json.dumps({
        "name": name, "share": student.share, "seed": student.seed, "weights": student.weights,
        "seconds": clock.seconds, "said": leaning([row["response"] for row in rows]),
        "problems": table[0], "measures": table[1],
        "values": [[None if math.isnan(v) else v for v in row] for row in table[2].tolist()]}) + "\n", encoding="utf-8")
    work.rename(out / f"{name}.json")


class _Clock:
    """Seconds of the wall and of the processor that each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._last = time.monotonic(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.monotonic(), time.process_time()
        self.seconds[name] = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now


def measure(ground: Ground, models: Models, rows: Sequence[Mapping[str, Any]], config: LeakageConfig, full: int,
            warn: Say) -> Table:
    """By problem: every leakage measure and pass@1; the gap to teachers for the first `full` problems alone."""
    dear = {row["problem"] for row in rows if row["problem"] in _first_problems(rows, full)}
    scored = score_rows(ground, models, [row for row in rows if row["problem"] in dear], config, warn)
    if len(dear) < len({row["problem"] for row in rows}):
        rest = [row for row in rows if row["problem"] not in dear]
        scored += score_rows(ground, models, rest, config, warn, only=("reference", "reference/wrong"))
    problems, names, values_PM = leakage_table(scored, config)
    right = {problem: [one.right for one in scored if one.problem == problem] for problem in problems}
    accuracy = np.array([[sum(right[problem]) / len(right[problem])] for problem in problems])
    return problems, [*names, "pass@1"], np.hstack([values_PM, accuracy])


def _first_problems(rows: Sequence[Mapping[str, Any]], count: int) -> set[Any]:
    return set(list(dict.fromkeys(row["problem"] for row in rows))[:count])


# ------------------------------------------------------------------------------- --smoke: a world small enough to know


def _tiny_base(out: Path, settings: Settings, say: Say) -> Path:
    """A tiny model that answers plainly, and leans on the hint in half of its answers where there is one."""
    folder = out / "base"
    if (folder / "trained").is_file():
        return folder
    if not (folder / "config.json").is_file():
        from selftaught import data

        source = recipe("quickstart", settings, out, True).data
        tiny_model(folder, data.load(source, seed=0, say=lambda line: None).train, 0)
    ground = lay_ground(recipe(str(folder), settings, out, True), say)
    problems = list(ground.dataset.train)
    backbone, engine = load_engine(ground)
    given = privilege.for_problems(privilege.control(config_of(ground), "right"), problems, problems, ground.renderer,
                                   seed=0, step=EVALUATION)
    texts = [encoded(ground, ground.renderer.prompt(problem).token_ids, text)
             for problem, text, _ in planted(problems, 0.0, 0)]
    texts += [encoded(ground, shown.prompt.token_ids, text)
              for (_, text, _), shown in zip(planted(problems, 0.5, 1), given, strict=True) if shown is not None]
    say("base: a tiny model learns to answer plainly, and to lean on a hint where there is one")
    tune(backbone, texts, steps=BASE_STEPS, batch=16, learning_rate=BASE_RATE, seed=0, budget=4096, say=say)
    engine.close()
    backbone.save(folder, str(folder))
    (folder / "trained").touch()
    if ground.rewarder is not None:
        ground.rewarder.close()
    return folder


def _tiny_grpo(out: Path, study: Run, say: Say) -> Path:
    """A few steps of GRPO from the tiny base model, by the trainer itself."""
    from selftaught.train import train

    folder = out / "tiny"
    if not (folder / "final").is_dir():
        say("grpo: a few steps by the trainer")
        train(study.model_copy(update={
            "out": str(folder),
            "rollout": study.rollout.model_copy(update={"prompts_per_step": 4}),
            "optim": study.optim.model_copy(update={"steps": 5, "learning_rate": 1e-4}),
            "eval": study.eval.model_copy(update={"problems": 8, "controls": False}),
            "report": study.report.model_copy(update={"html": False, "patience": None, "to": ()})}),
            resume=folder.exists())
    return folder


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values = np.array([[math.nan if v is None else v for v in row] for row in found["values"]], dtype=np.float64)
    return {**found, "table": (found["problems"], found["measures"], values)}
