"""Checkpoints that are whole or absent: written under a temporary name, then renamed. safetensors and JSON only.

    checkpoints/step-40/  PART.safetensors ...  state.json  manifest.json (every file's size and CRC-32)

Tensors are saved under the names of parameters, never by position, so that a part can later be cut into
shards without a change of meaning. A broken disk costs a checkpoint and never the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selftaught.errors import UserError

_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-\d+\.tmp-(\d+)(-old)?")
_BLOCK = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: `step` is the number of steps done when it was made."""

    step: int
    path: Path


class Checkpoints:
    """The checkpoints of one run in `folder`, of which the newest `keep` and the protected one are kept.

    `say` gets one sentence for everything that went wrong and did not stop the run.
    """

    def __init__(self, folder: str | Path, keep: int, say: Callable[[str], None] = print) -> None:
        assert keep >= 1, f"keep must be at least 1, got {keep}"
        self.folder = Path(folder)
        self._keep = keep
        self._say = say
        self._protected: int | None = None
        for path in self._matching(_LEFTOVER):
            if not _alive(int(path.name.split("-")[2])):
                shutil.rmtree(path, ignore_errors=True)

    def protect(self, step: int | None) -> None:
        """Never delete the checkpoint of `step` (the best so far). The one protected before is freed."""
        self._protected = step

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path | None:
        """Write one checkpoint: a safetensors file for each part in `tensors`, and `state` as JSON.

        Each tensor must be given under one name (tied weights once). On a CPU nothing is copied; from a GPU
        one part at a time is. Returns the folder, or None where the disk refused: then `say` is told, no
        trace is left, and the earlier checkpoints stay.
        """
        text = json.dumps(state)  # first, so that a value that is no JSON costs nothing
        for part, named in tensors.items():
            _refuse_shared(part, named)
        final, work = self.folder / f"step-{step}", self.folder / f"step-{step}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            for part, named in tensors.items():
                save_file({name: t.detach().contiguous() for name, t in named.items()}, work / f"{part}.safetensors")
            (work / "state.json").write_text(text, encoding="utf-8")
            _seal(work, step)
            replaced = self._set_aside(final) if final.exists() else None  # a broken one, or the same step again
            os.rename(work, final)
            _sync(self.folder)
            if replaced:
                shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(work, ignore_errors=True)
            self._say(self._loss(step, error))
            return None
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self._prune(step)
        return final

    def _prune(self, step: int) -> None:
        """Delete old checkpoints. Later ones than `step` are not ours to judge: a resume passed them over."""
        for old in [s for s in self.steps() if s <= step][: -self._keep]:
            if old != self._protected:
                try:
                    shutil.rmtree(self._set_aside(self.folder / f"step-{old}"))
                except OSError as error:
                    self._say(f"the old checkpoint {self.folder / f'step-{old}'} could not be deleted: {error}")

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint. A broken one is passed over with a sentence."""
        for step in reversed(self.steps()):
            path = self.folder / f"step-{step}"
            fault = _fault(path)
            if fault is None:
                return Checkpoint(step, path)
            self._say(f"checkpoint {path} is not whole ({fault}); an earlier one is used if there is one")
        return None

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The tensors, by part and name, and the state (tuples come back as lists) of one checkpoint.

        Raises `UserError` where it is missing or broken.
        """
        path = self.folder / f"step-{step}"
        fault = _fault(path)
        if fault is not None:
            known = ", ".join(f"step-{s}" for s in self.steps()) or "none"
            raise UserError(f"checkpoint {path} cannot be used ({fault}); found here: {known}")
        parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return parts, json.loads((path / "state.json").read_text(encoding="utf-8"))

    def steps(self) -> list[int]:
        """Steps of every checkpoint on disk, whole or not, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._matching(_STEP))

    def _matching(self, pattern: re.Pattern[str]) -> list[Path]:
        return [p for p in self.folder.iterdir() if pattern.fullmatch(p.name)] if self.folder.is_dir() else []

    def _set_aside(self, path: Path) -> Path:
        """Rename a checkpoint before it is deleted, so that a kill half-way leaves no half of one under its name."""
        doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        return doomed

    def _loss(self, step: int, error: Exception) -> str:
        steps = [s for s in self.steps() if s != step]
        left = f"the newest before it is step-{steps[-1]}" if steps else "there is none before it"
        return (
            f"the checkpoint of step {step} could not be written to {self.folder} ({error}); the run goes on, {left}; "
            "make room or mend the folder, or a stop now loses the steps since then"
        )


def _refuse_shared(part: str, named: Mapping[str, Tensor]) -> None:
    """Assert that no two names share memory: safetensors has no word for it, and half the file would be waste."""
    owner: dict[tuple[str, int], str] = {}
    for name, tensor in named.items():
        if tensor.numel():
            first = owner.setdefault((str(tensor.device), tensor.data_ptr()), name)
            assert first == name, f"{part}: {first!r} and {name!r} share memory; give tied weights under one name"


def _seal(folder: Path, step: int) -> None:
    """Bring every file to the disk and, last, write the manifest that makes the folder a whole checkpoint.

    CRC-32 finds what breaks by accident and runs at 1.6 GB/s on one core, cryptographic digests at 1 or less.
    """
    files = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
    _sync(folder / "manifest.json")
    _sync(folder)


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint: None where it is whole."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, seal in files.items():
            if (size := (folder / name).stat().st_size) != seal["bytes"]:
                return f"{name} has {size} bytes, not {seal['bytes']}"
            if _crc32(folder / name) != seal["crc32"]:
                return f"the bytes of {name} have changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder, and need not
            raise
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    """Is another process of this machine writing under this number?"""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
