"""What the report reads back from a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from selftaught.errors import UserError

Point = tuple[float, float]


@dataclass(frozen=True)
class RunData:
    """One run as its folder tells it; what a run has not written yet is empty."""

    path: Path
    name: str
    run: Mapping[str, Any]
    versions: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    results: Mapping[str, Any]
    learned: Mapping[str, Any] = field(default_factory=dict)  #: diversity and leakage, once they were measured

    def series(self, key: str) -> list[Point]:
        """(step, value) of every line of metrics.jsonl that has the number `key`."""
        return [(line["step"], line[key]) for line in self.metrics if _is_number(line.get(key))]

    def band(self, key: str) -> list[tuple[float, float, float]]:
        """(step, low, high) where the lines state an interval for `key`."""
        lows, highs = self.series(f"{key}_low"), dict(self.series(f"{key}_high"))
        return [(step, low, highs[step]) for step, low in lows if step in highs]

    @property
    def keys(self) -> list[str]:
        """Names of all numbers in metrics.jsonl, in order of first appearance."""
        return list(dict.fromkeys(k for line in self.metrics for k, v in line.items() if k != "step" and _is_number(v)))

    @property
    def steps(self) -> int:
        return max((int(line["step"]) for line in self.metrics), default=0)


@dataclass(frozen=True)
class Sample:
    """One problem's same-numbered sample before and after training."""

    problem: str
    prompt: str
    reference: str | None
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def read_run(path: Path | str) -> RunData:
    """UserError: `path` is no run folder, or its run.yaml is not readable."""
    path = Path(path)
    if not any((path / name).is_file() for name in ("run.yaml", "metrics.jsonl")):
        raise UserError(f"report: {path} is no run folder (no run.yaml, no metrics.jsonl); give a folder under runs/")
    try:
        run_file = path / "run.yaml"
        run = (yaml.safe_load(run_file.read_text(encoding="utf-8")) or {}) if run_file.is_file() else {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"report: {path / 'run.yaml'} cannot be read ({error})") from error
    return RunData(
        path=path,
        name=path.resolve().name,
        run=run,
        versions=_json_file(path / "versions.json"),
        metrics=tuple(line for line in json_lines(path / "metrics.jsonl") if _is_number(line.get("step"))),
        results=_json_file(path / "results.json"),
        learned=_json_file(path / "measures.json"),
    )


def read_samples(path: Path, count: int = 10) -> list[Sample]:
    """Up to `count` pairs of the student's completions at its first and last evaluation.

    Problems are taken evenly spaced in the file's order, never by how they went, and of each its first sample.
    """
    rows = [row for row in json_lines(path / "completions.jsonl") if (row.get("arm") or "student") == "student"]
    steps = sorted({row["step"] for row in rows if _is_number(row.get("step"))})
    if len(steps) < 2:
        return []
    first, last = (
        {str(row.get("problem")): row for row in reversed(rows) if row.get("step") == step and not row.get("sample")}
        for step in (steps[0], steps[-1])
    )
    problems = [problem for problem in reversed(first) if problem in last]
    chosen = [problems[i * len(problems) // count] for i in range(count)] if len(problems) > count else problems
    return [
        Sample(p, _prompt_text(first[p].get("prompt")), first[p].get("reference"), first[p], last[p]) for p in chosen
    ]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole JSON objects of a file, none if there is no file; a torn line is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"report: {path} is not JSON ({error}); delete it, and measure again") from error
    return value if isinstance(value, dict) else {}


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt if isinstance(m, dict))
    return "" if prompt is None else str(prompt)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
