"""The worker: the process in which verifiers and users' functions run. It is forked by a guard and expendable."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from selftaught.errors import nearest
from selftaught.reward import process
from selftaught.reward.verifiers import VERIFIERS, Result, result

STATUSES = ("right", "wrong", "unparsed", "timeout", "error")
MAX_TEXT = 16_384  # characters of a feedback, answer or strategy that go back
ALWAYS = ("prompts", "completions", "completion_ids")  # TRL's keywords beside the columns


class LoadError(Exception):
    """A function cannot be loaded; the message is for the user."""


def run_worker(fd: int, spec: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> NoReturn:
    """Serve jobs from `fd` until it closes. Nothing that a verifier does gets out of this function."""
    code, own = 1, os.getpid()
    try:
        loaded = [_load_part(part, functions) for part in spec["parts"]]
        process.limit_process(spec["memory_mb"])
        process.write_frame(fd, [info for _, info in loaded])
        loop = asyncio.new_event_loop()
        while True:
            job = process.read_frame(fd)
            part, (call, info) = spec["parts"][job["part"]], loaded[job["part"]]
            results = _evaluate(call, info, part, job["items"], loop)
            if os.getpid() != own:  # a verifier forked, and its child came back too
                break
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm left behind would hit the next completion
            if not process.kill_descendants():
                break
            process.write_frame(fd, results)
    except process.Closed:
        code = 0
    finally:
        os._exit(code)  # no exit handlers, no waiting for threads


def _load_part(part: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> tuple[Any, dict[str, Any]]:
    """The callable of a part, and what the trainer must know: its parameters, or why it cannot be used."""
    name = part["name"]
    if name in VERIFIERS:
        return VERIFIERS[name], {"error": None}
    try:
        function = functions[name] if name in functions else load_function(name)
        return function, describe(function)
    except LoadError as error:
        return None, {"error": str(error)}
    except BaseException as error:  # a user's module may raise anything, SystemExit included
        return None, {"error": f"it cannot be loaded: {explain(error)}"}


def load_function(name: str) -> Callable[..., Any]:
    """The function behind `file.py:function` (its folder becomes importable) or `package.module:function`."""
    home, _, attribute = name.rpartition(":")
    if home.endswith(".py"):
        path = Path(home).expanduser().resolve()
        if not path.is_file():
            raise LoadError(f"there is no file {path}")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(home)
    function: Any = module
    for step in attribute.split("."):
        if not hasattr(function, step):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise LoadError(f"{home} has no function {attribute!r}" + (f" ({nearest(step, names)})" if names else ""))
        function = getattr(function, step)
    if not callable(function):
        raise LoadError(f"{attribute!r} in {home} is {type(function).__name__}, not a function")
    return function


def describe(function: Callable[..., Any]) -> dict[str, Any]:
    """Names that the function takes and needs by keyword; `any` where it has **kwargs. Raises LoadError."""
    parameters = inspect.signature(function).parameters.values()
    keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise LoadError("it has positional-only parameters, but all arguments are passed by name")
    names = [p.name for p in keyword]
    if "completions" not in names and not anything:
        raise LoadError(
            f"it has no parameter `completions` (it has: {', '.join(names) or 'none'}); "
            "a reward is f(prompts, completions, **columns) -> list of floats"
        )
    needs = [p.name for p in keyword if p.default is p.empty]
    return {"error": None, "takes": names, "needs": needs, "any": anything}


def _evaluate(
    call: Any, info: Mapping[str, Any], part: Mapping[str, Any], items: list[dict[str, Any]], loop: Any
) -> list[Result]:
    try:
        if info["error"]:
            return [result(0.0, "error", info["error"])] * len(items)
        if part["name"] in VERIFIERS:
            return [_trimmed(call(item["completion"], item["problem"], part)) for item in items]
        return call_function(call, info, part["options"], items, loop)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are a function's mistakes too
        return [_trimmed(result(0.0, "error", explain(error)))] * len(items)


def call_function(
    function: Callable[..., Any],
    info: Mapping[str, Any],
    options: Mapping[str, Any],
    items: Sequence[Mapping[str, Any]],
    loop: asyncio.AbstractEventLoop,
) -> list[Result]:
    """Call a user's function by TRL's keyword protocol, one list entry per item, and read what it returns."""
    keywords: dict[str, Any] = {
        "prompts": [item["prompt"] for item in items],
        "completions": [
            item["completion"]
            if isinstance(item["prompt"], str)
            else [{"role": "assistant", "content": item["completion"]}]
            for item in items
        ],
        "completion_ids": [item["completion_ids"] for item in items],
    }
    for column in dict.fromkeys(name for item in items for name in item["columns"]):
        keywords.setdefault(column, [item["columns"].get(column) for item in items])
    keywords.update(options)
    returned = function(**{k: v for k, v in keywords.items() if info["any"] or k in info["takes"]})
    if inspect.isawaitable(returned):
        returned = loop.run_until_complete(returned)  # one loop for all calls: clients may be bound to it
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        return [result(0.0, "error", f"it returned {type(returned).__name__}, not a list")] * len(items)
    if len(returned) != len(items):
        feedback = f"it returned {len(returned)} values for {len(items)} completions"
        return [result(0.0, "error", feedback)] * len(items)
    return [_trimmed(read_value(value)) for value in returned]


def read_value(value: Any) -> Result:
    """One entry of what a function returned: None or NaN (no opinion), a number (right from 1), or a Verdict."""
    score, status, extra = value, None, {}
    if hasattr(value, "score") and hasattr(value, "status"):
        score, status = value.score, value.status
        extra = {name: getattr(value, name, None) for name in ("feedback", "answer", "strategy")}
        if status not in STATUSES:
            return result(0.0, "error", f"it returned the status {status!r}; known: {', '.join(STATUSES)}")
    if score is not None and not isinstance(score, (int, float)):
        score = score.item() if hasattr(score, "item") else score
        if not isinstance(score, (int, float)):
            return result(0.0, "error", f"it returned {type(score).__name__} where a number or None is due")
    if score is not None:
        score = float(score)
        if math.isinf(score):
            return result(0.0, "error", "it returned an infinite score")
    if score is None or math.isnan(score):
        return {**result(None, status or "unparsed"), **extra}
    if status is None or (status == "wrong" and score >= 1.0):  # "wrong" is a Verdict's default
        status = "right" if score >= 1.0 else "wrong"
    return {**result(score, status), **extra}


def _trimmed(value: Result) -> Result:
    for name in ("feedback", "answer", "strategy"):
        text = value.get(name)
        if text is not None:
            text = str(text)
            value[name] = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [cut: {len(text)} characters]"
    return value


def explain(error: BaseException) -> str:
    """One line: the exception, and the last line of code that is not ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.dirname(f.filename) != _HERE]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    try:
        message = str(error)
    except BaseException:
        message = "(its message cannot be printed)"
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"


_HERE = os.path.dirname(os.path.abspath(__file__))
