"""Run: the one typed description of a run, and how a recipe becomes one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from selftaught.data import DataConfig
from selftaught.errors import UserError, nearest
from selftaught.eval import EvalConfig
from selftaught.loss import LossConfig
from selftaught.methods import Method, build
from selftaught.optim import CheckpointConfig, OptimConfig, check_views
from selftaught.privilege import PrivilegeConfig, pieces
from selftaught.recipe import SHORT, is_run, override, read
from selftaught.records import Section, privileged_views
from selftaught.report import ReportConfig
from selftaught.reward import RewardConfig
from selftaught.rollout import RolloutConfig
from selftaught.score import ScoreConfig, TeacherConfig

_MADE = ("demonstration", "feedback", "parts")  # privileges that may come from rollouts


class MethodConfig(BaseModel):
    """Which method, and the paper's symbols that differ from its defaults."""

    model_config = {"frozen": True, "extra": "allow"}
    name: str = Field(description="a shipped method, `file.py:Class`, `module:Class` or an entry point")

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self) -> Method:
        """Raises UserError for an unknown name or field, or a value that the method refuses."""
        return build(self.name, **self.fields)


class Run(Section):
    """A whole run. Its keys are the recipe's and, mostly, the folders of the package."""

    model: str = Field(description="a folder, a Hub name, or `quickstart`")
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig | None = None
    privilege: PrivilegeConfig | None = None
    teacher: TeacherConfig | None = None
    score: ScoreConfig = ScoreConfig()
    loss: LossConfig = LossConfig()
    method: MethodConfig
    optim: OptimConfig = OptimConfig(steps=100)
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    seed: int = Field(0, ge=0, description="of every draw: split, order, prompts, responses and privileges")
    out: str = Field("runs/run", description="the run's folder")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = _without_paths(value)
        for section, field in SHORT.items():
            given = value.get(section)
            if isinstance(given, str) or (section == "data" and isinstance(given, list)):
                value[section] = {field: given}
        return value

    @field_validator("out")
    @classmethod
    def _from_home(cls, out: str) -> str:
        try:
            return str(Path(out).expanduser()) if out.startswith("~") else out
        except RuntimeError as error:
            raise UserError(f"out = {out!r}: {error}") from error

    @field_validator("method")
    @classmethod
    def _method_exists(cls, method: MethodConfig) -> MethodConfig:
        method.build()
        return method

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        method = self.method.build()
        check_views(method.views)
        _check_external(method, self.teacher)
        privileged = privileged_views(method.views)
        if privileged and self.privilege is None:
            raise UserError(f"method {method.name!r}: its {privileged[0]} sees a privilege, but the recipe has none; "
                            "add for example `privilege: {kind: answer}`")
        _refuse_null_teacher(method, self.privilege, self.data.thinking)
        _refuse_other_privilege(method, self.privilege)
        if "reward" in method.needs and self.reward is None:
            raise UserError(f"method {method.name!r} needs a reward, but the recipe has none; add `reward: NAME`")
        _check_siblings(self, bool(privileged))
        if self.reward is None and self.data.heldout > 0:
            raise UserError("reward: nothing can be measured on held-out problems without one; "
                            "add `reward: NAME` or set data.heldout=0")
        if "group" in method.needs and self.rollout.num_generations < 2:
            raise UserError(f"rollout.num_generations = {self.rollout.num_generations}: method {method.name!r} "
                            "compares the rollouts of a group and needs at least 2")
        _refuse_batches(self, method)
        skipped, longest = self.method.fields.get("skip", 0), self.rollout.max_completion_length
        if isinstance(skipped, int) and skipped >= longest:
            raise UserError(f"method.skip = {skipped}: no token of a response is left to learn from, as none has more "
                            f"than rollout.max_completion_length = {longest}; lower the one or raise the other")
        if self.rollout.truncated and not self.rollout.allow_truncated_support:
            raise UserError("rollout.top_p, rollout.top_k: the sampler would draw from fewer tokens than the scorer "
                            "counts, so log-probs would not be of one distribution; sample untruncated, or set "
                            "rollout.allow_truncated_support=true")
        if self.loss.reduction == "constant" and self.loss.length is None:
            raise UserError("loss.length: reduction `constant` divides by it; set it, for example to "
                            "rollout.max_completion_length")
        if self.optim.token_budget <= self.rollout.max_completion_length:
            raise UserError(f"optim.token_budget = {self.optim.token_budget}: too small for one response of "
                            f"rollout.max_completion_length = {self.rollout.max_completion_length} with its prompt; "
                            "raise it")
        return self

    def resolved(self) -> dict[str, Any]:
        """The whole run as plain data: what `run.yaml` holds."""
        return self.model_dump(mode="json", serialize_as_any=True)


def _without_paths(value: Any) -> Any:
    """Plain data, in which a Python caller's paths are text."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_paths, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _refuse_batches(run: Run, method: Method) -> None:
    """Raise UserError for groups to be filtered by what they do not have, and for optimiser batches of no group."""
    rollout, optim = run.rollout, run.optim
    filtered = f"rollout.filter_groups = {str(rollout.filter_groups).lower()}"
    if rollout.filter_groups and not method.needs & {"reward", "group"}:
        raise UserError(f"{filtered}: method {method.name!r} uses no reward, so no group is dead to "
                        "it; set rollout.filter_groups=false")
    if rollout.filter_groups and rollout.num_generations < 2:
        raise UserError(f"{filtered}: groups of rollout.num_generations = {rollout.num_generations} "
                        "are all dead; raise it to at least 2 or set rollout.filter_groups=false")
    if rollout.prompts_per_step % optim.minibatches:
        fit = [n for n in range(1, rollout.prompts_per_step + 1) if rollout.prompts_per_step % n == 0]
        raise UserError(f"optim.minibatches = {optim.minibatches}: must divide rollout.prompts_per_step = "
                        f"{rollout.prompts_per_step} into batches of whole groups; use one of "
                        f"{', '.join(map(str, fit))}")


def _refuse_null_teacher(method: Method, privilege: PrivilegeConfig | None, thinking: bool | None) -> None:
    """Raise UserError for a view that is the student itself: its terms would be zero, and look as if they taught."""
    unseen = privilege is not None and privilege.kind == "empty" and privilege.thinking in (None, thinking)
    for name, view in method.views.items():
        if view.weights != "live" or (view.context == "privileged" and not unseen):
            continue
        shown, remedy = "on the plain prompt", f"set method.{name}.context=privileged"
        if view.context == "privileged":
            shown, remedy = "without a privilege (privilege.kind = 'empty')", "give one, as in privilege.kind=answer"
        raise UserError(f"method {method.name!r}: its {name} is the live model {shown}, which is the student itself, "
                        f"so there is nothing to learn from it; {remedy}, or set method.{name}.weights to initial, "
                        "ema or snapshot")


def _refuse_other_privilege(method: Method, privilege: PrivilegeConfig | None) -> None:
    """Raise UserError for a privilege of another kind than the method says it needs, or that none of its views sees."""
    kinds = sorted(method.needs & {"answer", "solution", "feedback"})
    needed = bool(kinds) or "privilege" in method.needs
    if privilege is None and needed:
        raise UserError(f"method {method.name!r} needs a privilege, but the recipe has none; add for example "
                        f"`privilege: {{kind: {kinds[0] if kinds else 'answer'}}}`")
    if needed and all(view.context == "plain" for view in method.views.values()):
        raise UserError(f"method {method.name!r} learns from a privilege, but none of its views is shown one; set "
                        f"method.{next(iter(method.views), 'teacher')}.context=privileged")
    given = {part.kind for part in pieces(privilege)} if privilege is not None else set(kinds)
    if privilege is not None and privilege.kind != "empty" and kinds and not given & {*kinds}:
        raise UserError(f"privilege.kind = {privilege.kind!r}: method {method.name!r} needs {' or '.join(kinds)}; set "
                        f"privilege.kind={kinds[0]}")


def _check_siblings(run: Run, privileged: bool) -> None:
    """Raise UserError for a privilege that needs verdicts or siblings which this run does not have."""
    for part in pieces(run.privilege) if privileged and run.privilege and run.privilege.kind in _MADE else ():
        if part.kind in ("demonstration", "feedback") and run.reward is None:
            raise UserError(f"privilege.kind: {part.kind!r} comes from the verdicts on rollouts, but the recipe has no "
                            "reward; add `reward: NAME`, or choose answer, solution or hint")
        if part.kind == "feedback" and run.reward is not None and not any(one.is_function for one in run.reward.parts):
            raise UserError(f"privilege.kind: 'feedback' is what a verifier says about a rollout, and "
                            f"{run.reward.parts[0].name!r} says nothing of a wrong one; set reward=FILE.py:FUNCTION, a "
                            "function of your own that returns Verdict(score, feedback=...) for each completion")
        if part.kind == "demonstration" and part.exclude_self and run.rollout.num_generations < 2:
            raise UserError(f"rollout.num_generations = {run.rollout.num_generations}: a demonstration is another "
                            "rollout of the same problem, so it needs at least 2; raise it, or set "
                            "privilege.exclude_self=false")


def _check_external(method: Method, teacher: TeacherConfig | None) -> None:
    """Raise UserError for a view of another model that the recipe does not name, or a named one that nobody reads."""
    external = [name for name, view in method.views.items() if view.weights == "external"]
    if external and teacher is None:
        raise UserError(f"method {method.name!r}: its view {external[0]!r} is another model, but the recipe's "
                        "`teacher` names none; add for example `teacher: runs/quickstart/final`, or let the model "
                        f"teach itself with method.{external[0]}.weights=initial")
    if teacher is not None and not external:
        view = next(iter(method.views), None)
        remedy = f", or set method.{view}.weights=external" if view else ""
        raise UserError(f"teacher.model = {teacher.model!r}: no view of method {method.name!r} is another model, so "
                        f"nobody would read it; remove `teacher`, or choose opd, gkd or dopd{remedy}")


def load_run(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (),
             sections: Mapping[str, Any] | None = None) -> Run:
    """The run of a shipped recipe's name, a YAML path, a run's folder or a mapping, with whole `sections` in the place
    of the recipe's, and then `a.b=c` overrides.

    Raises:
        UserError: no such recipe, broken YAML, an unknown key (the nearest is named), a wrong type or value.
    """
    tree = dict(recipe) if isinstance(recipe, Mapping) else read(str(recipe))
    if not isinstance(recipe, Mapping) and is_run(str(recipe)):
        _leave_unsaid(tree)
    tree |= dict(sections or {})
    for each in overrides:
        override(tree, each)
    return make_run(tree)


def _leave_unsaid(tree: dict[str, Any]) -> None:
    """Take out of a resolved recipe the trackers that nobody need have asked for: an absent one is then no error."""
    report = tree.get("report")
    if isinstance(report, dict) and report.get("to") == list(ReportConfig().to):
        tree["report"] = {key: value for key, value in report.items() if key != "to"}


def make_run(tree: Mapping[str, Any]) -> Run:
    """A Run from plain data; every fault is one UserError that lists fields, values and remedies."""
    try:
        return Run.model_validate(dict(tree))
    except ValidationError as error:
        raise _told(error) from None


def make_reward(value: Any) -> RewardConfig:
    """A reward in any form that a recipe may give it. Raises UserError as `make_run`."""
    try:
        return RewardConfig.parse(value)
    except ValidationError as error:
        raise _told(error, "reward") from None


def _told(error: ValidationError, *parents: str) -> UserError:
    """pydantic's error in our words; `parents`: where in a recipe its locations begin."""
    faults = [{**fault, "loc": (*parents, *fault["loc"])} for fault in error.errors()]
    return UserError("\n".join(dict.fromkeys(_fault(fault) for fault in _telling(faults))))


def _telling(faults: Sequence[Any]) -> Iterator[Any]:
    """Without those that follow from another: which branch of a union a value is not, a list that lost an item."""
    said = set()
    for fault in faults:
        *parent, last = fault["loc"] or ("",)
        if fault["type"] == "too_short" and any(f["loc"][:-1][: len(fault["loc"])] == fault["loc"] for f in faults):
            continue
        if _is_branch(last):
            deeper = any(list(f["loc"][: len(parent)]) == parent and len(f["loc"]) > len(fault["loc"]) for f in faults)
            if deeper or tuple(parent) in said:
                continue
            said.add(tuple(parent))
        yield fault


def _is_branch(part: Any) -> bool:
    """Is this part of a location pydantic's name for a branch of a union, not a key or an index?"""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or not part.isidentifier())


def _fault(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"] if not _is_branch(part))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place!r}; {_meant(str(fault['loc'][-1]), _known(fault['loc'][:-1]))}"
    if fault["type"] == "missing":
        *parent, last = fault["loc"]
        if isinstance(last, int):
            return f"{'.'.join(map(str, parent))}: has too few entries"
        return f"{place}: missing" + ("" if parent else "; every recipe needs it")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message if not place or message.startswith((place, place.split(".")[0])) else f"{place}: {message}"
    for pydantic_s, ours in (("Input should be", "should be"), ("valid tuple", "list"), ("valid dictionary", "mapping"),
                             ("Tuple should", "should"), (" after validation", "")):
        message = message.replace(pydantic_s, ours)
    message = re.sub(r" or instance of \w+", " of its fields", message)
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        nearly = get_close_matches(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"]), n=1, cutoff=0.5)
        message += f"; did you mean {nearly[0]!r}?" if nearly else ""
    return f"{place} = {fault['input']!r}: it {message}" if message.startswith("should") else (
        f"{place} = {fault['input']!r}: {message}")


def _meant(key: str, known: Sequence[str]) -> str:
    """The nearest of the keys of that section, or a nearer one of another."""
    elsewhere = {path.rpartition(".")[2]: path for path in _paths(Run) if "." in path}
    nearly = [elsewhere.get(name, name) if name not in known else name
              for name in get_close_matches(key, [*elsewhere, *known], n=1, cutoff=0.75)]  # fmt: skip
    return f"did you mean {nearly[0]!r}?" if nearly else nearest(key, known)


def _paths(model: Any, place: str = "") -> Iterator[str]:
    """Dotted names of all fields, section by section."""
    for name, field in model.model_fields.items():
        yield f"{place}{name}"
        for inner in _models(field.annotation):
            if not place:  # what lies deeper is a list's item and has no name of its own
                yield from _paths(inner, f"{name}.")


def _known(location: Sequence[Any]) -> list[str]:
    """Field names of the section at that place of the recipe."""
    model: Any = Run
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[Any]:
    """The sections inside an annotation such as `tuple[Part, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)
