"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import selftaught.optim.checkpoints as module
from selftaught.errors import UserError
from selftaught.optim import Checkpoint, Checkpoints

Parts = dict[str, dict[str, Tensor]]


def parts(seed: int, size: int = 1000) -> Parts:
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "layer.weight": torch.randn(size, generator=g),
            "half": torch.randn(3, 5, generator=g).bfloat16(),
            "turned": torch.randn(4, 6, generator=g).T,
            "empty": torch.zeros(0),
        },
        "optimizer": {"step/layer.weight": torch.tensor(float(seed)), "count": torch.arange(3)},
        "teachers": {},
    }


def assert_same(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert found[part][name].dtype == tensor.dtype
            assert torch.equal(found[part][name], tensor), name


def silent(sentence: str) -> None:
    raise AssertionError(f"nothing should be said, but: {sentence}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a" / "checkpoints", 2, silent)
    state = {"step": 3, "x": 0.1 + 0.2, "generator": [2**63 - 1, 0], "name": "größer", "nothing": None}
    path = checkpoints.save(3, parts(1), state)
    assert path == tmp_path / "a" / "checkpoints" / "step-3"
    found, read = checkpoints.load(3)
    assert_same(found, parts(1))
    assert read == state
    assert checkpoints.newest() == Checkpoint(3, path)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept_and_the_protected_one_besides(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, silent)
    for step in (1, 2, 3):
        checkpoints.save(step, parts(step), {})
    assert names(tmp_path) == ["step-2", "step-3"]
    checkpoints.protect(2)
    for step in (9, 10, 11):
        checkpoints.save(step, parts(step), {})
    assert names(tmp_path) == ["step-10", "step-11", "step-2"]
    checkpoints.protect(11)
    checkpoints.save(12, parts(12), {})
    assert names(tmp_path) == ["step-11", "step-12"]
    assert checkpoints.newest() == Checkpoint(12, tmp_path / "step-12")


def test_an_old_one_is_deleted_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 1, lambda _: None)
    checkpoints.save(1, parts(1), {})
    monkeypatch.setattr(module, "_seal", refuse(errno.EIO))
    assert checkpoints.save(2, parts(2), {}) is None
    assert names(tmp_path) == ["step-1"]


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, silent)
    checkpoints.save(1, parts(1), {})
    assert checkpoints.save(1, parts(2), {"again": True})
    assert_same(checkpoints.load(1)[0], parts(2))
    assert names(tmp_path) == ["step-1"]


def test_a_resume_from_an_earlier_step_keeps_what_it_saves_beside_a_later_broken_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, lambda _: None)
    checkpoints.save(20, parts(20), {})
    (tmp_path / "step-20" / "manifest.json").unlink()
    checkpoints.save(12, parts(12), {})
    assert checkpoints.newest() == Checkpoint(12, tmp_path / "step-12")
    checkpoints.save(20, parts(21), {})
    assert checkpoints.newest() == Checkpoint(20, tmp_path / "step-20")
    assert names(tmp_path) == ["step-20"]


@pytest.mark.parametrize("harm", ["truncate", "flip", "manifest", "half manifest", "part", "state"])
def test_a_harmed_checkpoint_is_passed_over_and_refused(tmp_path: Path, harm: str) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 2, said.append)
    checkpoints.save(1, parts(1), {})
    checkpoints.save(2, parts(2), {})
    file = tmp_path / "step-2" / "model.safetensors"
    if harm == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "flip":
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(content)
    elif harm == "half manifest":
        manifest = tmp_path / "step-2" / "manifest.json"
        os.truncate(manifest, manifest.stat().st_size // 2)
    else:
        gone = {"manifest": "manifest.json", "part": "optimizer.safetensors", "state": "state.json"}[harm]
        (tmp_path / "step-2" / gone).unlink()
    assert checkpoints.newest() == Checkpoint(1, tmp_path / "step-1")
    assert len(said) == 1 and "step-2" in said[0] and "not whole" in said[0]
    with pytest.raises(UserError, match="step-2 cannot be used"):
        checkpoints.load(2)


def test_without_a_checkpoint_there_is_no_newest_and_no_folder_is_made(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", 2, silent)
    assert checkpoints.newest() is None
    with pytest.raises(UserError, match=r"manifest\.json is missing.*found here: none"):
        checkpoints.load(4)
    assert names(tmp_path) == []


def refuse(code: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow past `size` bytes, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_disk_that_refuses_costs_one_checkpoint_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 2, said.append)
    checkpoints.save(1, parts(1), {})
    with files_limited_to(limit):
        assert checkpoints.save(2, parts(2, size=1_000_000), {}) is None
    assert names(tmp_path) == ["step-1"]
    assert len(said) == 1
    assert all(words in said[0] for words in ("step 2", "the run goes on", "before it is step-1"))
    assert checkpoints.save(3, parts(3), {}) is not None
    assert checkpoints.newest() == Checkpoint(3, tmp_path / "step-3")


@pytest.mark.parametrize("place", ["save_file", "_seal", "_sync", "os.rename", "Path.mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_point_of_saving_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int
) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 2, said.append)
    checkpoints.save(1, parts(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(f"selftaught.optim.checkpoints.{place}", refuse(code))
        assert checkpoints.save(2, parts(2), {}) is None
    assert names(tmp_path) == ["step-1"]
    assert os.strerror(code) in said[0]
    assert_same(checkpoints.load(1)[0], parts(1))


def test_a_file_in_the_folders_place_is_survived(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    said: list[str] = []
    assert Checkpoints(tmp_path / "checkpoints", 2, said.append).save(1, parts(1), {}) is None
    assert "none before it" in said[0]


def test_an_interrupt_while_saving_is_not_swallowed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path, 2, silent).save(1, parts(1), {})
    assert names(tmp_path) == []


def test_a_state_that_is_no_json_is_our_mistake_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Checkpoints(tmp_path / "c", 2, silent).save(1, parts(1), {"bad": object()})
    assert names(tmp_path) == []


def test_tensors_that_share_memory_are_refused_by_both_names(tmp_path: Path) -> None:
    weight = torch.ones(3)
    with pytest.raises(AssertionError, match="'embed' and 'head' share memory"):
        Checkpoints(tmp_path, 2, silent).save(1, {"model": {"embed": weight, "head": weight}}, {})
    flat = torch.arange(6.0)
    checkpoints = Checkpoints(tmp_path, 2, silent)
    checkpoints.save(1, {"model": {"a": flat[:3], "b": flat[3:]}}, {})
    assert_same(checkpoints.load(1)[0], {"model": {"a": torch.arange(3.0), "b": torch.arange(3.0, 6.0)}})


def test_leftovers_of_dead_runs_are_removed_at_the_start_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"step-1.tmp-{dead.pid}", f"step-2.tmp-{dead.pid}-old", f"step-3.tmp-{os.getpid()}", "step-4.tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("")
    Checkpoints(tmp_path, 2, silent)
    assert names(tmp_path) == ["step-4.tmp-1"]
    assert Checkpoints(tmp_path, 2, silent).newest() is None


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import selftaught.optim.checkpoints as module

root, calls = Path(sys.argv[1]), 0

def save(folder, step, fatal):
    def counted(call):
        def wrapped(*args, **kwargs):
            global calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped
    module.os.fsync, module.os.rename = counted(os.fsync), counted(os.rename)
    module.save_file, module.shutil.rmtree = counted(module.save_file), counted(module.shutil.rmtree)
    parts = {part: {"w": torch.full((1000,), float(step))} for part in ("model", "optimizer")}
    module.Checkpoints(folder, 1).save(step, parts, {"step": step})

for fatal in range(1, 100):
    folder = root / f"{fatal:02d}"
    for step, when in ((1, 0), (2, fatal)):
        if (child := os.fork()) == 0:
            save(folder, step, when)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
    print(fatal, status)
    if status == 0:
        break
"""


def test_sigkill_at_any_point_of_saving_leaves_a_whole_newest(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True)
    outcomes = [line.split()[1] for line in done.stdout.splitlines()]
    assert set(outcomes[:-1]) == {"9"} and outcomes[-1] == "0" and len(outcomes) > 10
    steps = []
    for folder in sorted(tmp_path.iterdir()):
        checkpoints = Checkpoints(folder, 1, silent)
        assert not [name for name in names(folder) if "tmp" in name]
        newest = checkpoints.newest()
        assert newest is not None
        found, state = checkpoints.load(newest.step)
        assert state == {"step": newest.step}
        assert_same(found, {p: {"w": torch.full((1000,), float(newest.step))} for p in ("model", "optimizer")})
        steps.append(newest.step)
    assert steps == sorted(steps) and {1, 2} == set(steps)  # never back, and both sides of the rename were hit


def test_the_manifest_names_every_file_and_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(module, "_sync", lambda path: order.append(path.name))
    path = Checkpoints(tmp_path, 1, silent).save(1, parts(1), {})
    assert path is not None
    assert [name for name in order if name.endswith((".json", ".safetensors"))][-1] == "manifest.json"
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == names(path)
    assert {name: (path / name).stat().st_size for name in manifest["files"]} == {
        name: seal["bytes"] for name, seal in manifest["files"].items()
    }


def test_saving_copies_no_contiguous_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, written = parts(1)["model"], {}
    monkeypatch.setattr(module, "save_file", lambda tensors, path: written.update(tensors) or path.write_bytes(b""))
    Checkpoints(tmp_path, 1, silent).save(1, {"model": given}, {})
    copied = {name for name in given if given[name].data_ptr() != written[name].data_ptr()}
    assert copied == {"turned"}
