"""The run folder: what a run leaves behind, and that a full or read-only disk never ends it.

run.yaml  versions.json  metrics.jsonl  rollouts/step-N.jsonl  completions.jsonl  results.json
checkpoints/step-N/  final/  report.html
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from selftaught.errors import UserError

MARKS = ("run.yaml", "eval.yaml", "metrics.jsonl", "completions.jsonl", "checkpoints", "final")  # any: a run lives here
OURS = (*MARKS, "versions.json", "rollouts", "results.json", "report.html", "curves.png", "tensorboard")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def refuse_taken(path: Path, *, resume: bool) -> None:
    """Raise UserError where no run may live: there is a file, files that are no run's, or, to begin one, a run."""
    try:
        is_file = path.exists() and not path.is_dir()
        held = sorted(each.name for each in path.iterdir() if not each.name.startswith(".")) if path.is_dir() else []
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    if is_file:
        raise UserError(f"out: {path} is a file; choose a folder")
    if any(name in MARKS for name in held):
        if not resume:
            raise UserError(f"out: {path} already holds a run; add --resume to go on with it, choose another out, or "
                            "delete the folder")
    elif foreign := [name for name in held if name not in OURS]:
        raise UserError(f"out: {path} holds files that are no run's ({foreign[0]}); choose an empty folder")


def _unusable(path: Path, error: Exception) -> UserError:
    """What the system says of a folder; a ValueError is about a name that no file can have."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"out: {path} cannot be written ({reason}); free some space or choose another folder")


class RunFolder:
    """One run's folder. Writing the log never raises for want of room: it is said once and the run goes on."""

    def __init__(self, path: Path | str, *, resume: bool = False, warn: Callable[[str], None] = warnings.warn) -> None:
        """Make the folder, or take it over where `resume` is True.

        UserError: it holds another run and `resume` is False, it holds files that are no run's, it is a file,
        or nothing can be written to it.
        """
        self.path = Path(path)
        self.lost = 0  # writes that failed for want of room
        self._warn = warn
        refuse_taken(self.path, resume=resume)
        self._made = [each for each in (self.path, *self.path.parents) if not each.exists()]
        probe = self.path / ".write-test"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text("ok")
            probe.unlink()
        except (OSError, ValueError) as error:
            with suppress(OSError, ValueError):
                probe.unlink(missing_ok=True)
            self.leave()
            raise _unusable(self.path, error) from error

    def leave(self) -> None:
        """Remove the folders that were made for this run, where nothing was put into them."""
        with suppress(OSError, ValueError):
            for each in self._made:
                each.rmdir()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        return self.path / "completions.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def write_run(self, run: Mapping[str, Any], *, may_change: Collection[str] = (), name: str = "run.yaml") -> None:
        """Write run.yaml, the resolved recipe; or, where there is one, compare it with `run`.

        UserError: a key other than those in `may_change` ("out", "eval.every") differs from the run resumed.
        """
        path = self.path / name
        refuse_other(path, run, may_change)
        try:
            self.path.mkdir(parents=True, exist_ok=True)  # a run that began here too, and failed, may have removed it
            _replace(path, yaml.safe_dump(as_json(run), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"out: {path} cannot be written ({error.strerror}); free some space") from error

    def write_versions(self, versions: Mapping[str, Any]) -> None:
        """Write versions.json once; on resume, warn of what is no longer the same."""
        path = self.path / "versions.json"
        if not path.exists():
            with self.surviving("versions.json"):
                _replace(path, json.dumps(dict(versions), indent=2) + "\n")
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {begun.get(name)} -> {now}" for name, now in versions.items() if begun.get(name) != now]
        if changed:
            self._warn(f"resumed on other versions, so bits may differ from one whole run: {', '.join(changed)}")

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json: {"before", "after", "difference", "controls", "best_constant", "seconds"}."""
        with self.surviving("results.json"):
            _replace(self.path / "results.json", json.dumps(plain(results), indent=2) + "\n")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and force it to the disk. A number that is not finite becomes null."""
        line = json.dumps({"step": step, **plain(metrics)}) + "\n"
        with self.surviving("metrics.jsonl"), self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def log_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rollouts/step-N.jsonl, whole or not at all."""
        text = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
        with self.surviving(f"rollouts/step-{step}.jsonl"):
            self.rollouts.mkdir(exist_ok=True)
            _replace(self.rollouts / f"step-{step}.jsonl", text)

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Around writing the file `name` of this folder: where there is no room, warn once and go on.

        What a failed append left at the file's end is cut away, so that every line that is there is whole.
        """
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            yield
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _NO_ROOM:
                raise
            if self.lost == 0:
                self._warn(
                    f"{path} cannot be written ({cause.strerror}): the run goes on without this part of its log; "
                    "free some space and it will be written again"
                )
            self.lost += 1
            if path.is_file() and path.stat().st_size > size:
                os.truncate(path, size)

    def truncate(self, step: int) -> None:
        """Forget what was logged after `step`, and torn lines: a resumed run then logs what a whole one would.

        UserError: there is no room to rewrite a file; the file is then as it was.
        """
        for path in (self.metrics, self.completions):
            if not path.exists():
                continue
            try:
                _replace(path, _lines_until(path, step))
            except OSError as error:
                raise UserError(
                    f"resume: {path} cannot be rewritten ({error.strerror}); free some space and resume again"
                ) from error
        for path in self.rollouts.glob("step-*.jsonl"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                path.unlink()


def as_json(run: Mapping[str, Any]) -> Any:
    """A resolved recipe in plain types alone."""
    return json.loads(json.dumps(run, default=str))


def refuse_other(path: Path, run: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Raise UserError where the recipe at `path`, if there is one, differs from `run` in a key not in `may_change`."""
    if not path.exists():
        return
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        kept = str(error).splitlines()[0]
    if not isinstance(kept, Mapping) or not kept:
        raise UserError(f"resume: {path} does not hold the recipe that {path.parent} was begun with "
                        f"({kept if isinstance(kept, str) else 'no keys'}); restore it, or begin anew in another out")
    old = dict(_leaves(kept))
    new = dict(_leaves(as_json(run)))
    for key in sorted(old.keys() | new.keys()):
        allowed = any(key == free or key.startswith(free + ".") for free in may_change)
        if old.get(key) != new.get(key) and not allowed:
            raise UserError(
                f"{key} = {new.get(key)!r}, but {path.parent} was begun with {old.get(key)!r}; "
                "resume with the old value, or start anew in another out"
            )


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tensors and arrays as numbers or lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """Whole lines of a JSONL file whose step is at most `step`; lines without a step stay."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            try:
                at = json.loads(line).get("step")
            except (ValueError, AttributeError):
                continue
            if at is None or at <= step:
                yield line if line.endswith("\n") else line + "\n"


def _replace(path: Path, text: str | Iterable[str]) -> None:
    """Write a file whole or not at all: to a temporary name first, then renamed over the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of every leaf of nested mappings."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
