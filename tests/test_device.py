"""On a GPU: every tensor of a run lies there, and the branches for GPUs compute what the CPU does (by `pretend`)."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten, tree_map

import pretend
import selftaught
from own import cli, lines, make_home, recipe_of, without_clocks, write_recipe
from selftaught import assemble, kernels, tensors
from selftaught.kernels import base, loops
from selftaught.methods import names
from selftaught.session import Session
from tiny import save_tiny

BFLOAT16 = {"optim": {"dtype": "bfloat16"}, "rollout": {"max_logp_gap": 9.0}}
DEMONSTRATIONS = {"kind": "demonstration", "count": 2, "threshold": 0.04}  # some of what a random model writes is right
CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": {"name": name}, "teacher": "teacher" if name in ("opd", "gkd", "dopd") else None}
       for name in names()},
    "demopsd over the vocabulary": {"method": {"name": "demopsd", "top_k": None}},
    "a mixture of teachers": {"method": {"name": "opsd"}, "privilege": {**DEMONSTRATIONS, "combine": "mixture"}},
    "an average of teachers": {"method": {"name": "opsd"}, "privilege": {**DEMONSTRATIONS, "combine": "average"}},
    "several updates": {"optim": {"updates_per_batch": 2, "minibatches": 2}},
    "recomputed layers": {"optim": {"activation_checkpointing": True}},
    "the plain layout": {"score": {"layout": "plain"}},
    "watched for leakage": {"method": {"name": "opsd"}, "eval": {"leakage": {"every": 1}}},
    "an adapter": {"optim": {"lora": 4}},
    "bfloat16": BFLOAT16,
    "rounded at random": {**BFLOAT16, "optim": {"dtype": "bfloat16", "master": "stochastic"}},
}  # fmt: skip

KERNELS = {"opsd": {"clipped", "gradient"}, "sdpo": {"buckets", "buckets_gradient"}, "sdpg": {"kl", "gradient"},
           "demopsd over the vocabulary": {"blend", "blend_gradient"}, "bfloat16": {"statistics", "sampled_gradient"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_home(tmp_path_factory.mktemp("device"))
    save_tiny(folder / "teacher", seed=1)
    return folder


@pytest.fixture(autouse=True)
def no_kernels() -> Any:
    """Triton's would not run, the CPU's loops are not there; what was found of this GPU is of no other."""
    loops.usable(torch.ones(1))  # loaded and tried once a process, which must not be where there is a GPU
    with kernels.off():
        tensors._multiplies_wide.cache_clear()
        yield
        tensors._multiplies_wide.cache_clear()


def trained(home: Path, name: str, device: str, **sections: Any) -> Path:
    """The folder of a short run, into `runs` of that device under that name."""
    if sections.get("teacher"):
        sections["teacher"] = {"model": str(home / sections["teacher"])}
    sections["optim"] = {"steps": 2, **sections.get("optim", {})}
    sections["eval"] = {"controls": name == "grpo", **sections.get("eval", {})}
    recipe = recipe_of(home, device=device, out=str(home / "runs" / device / name), **sections)
    with pretend.gpu() if device == "cuda" else contextlib.nullcontext():
        return selftaught.train(recipe, console=Console(file=io.StringIO())).folder


def close(one: Mapping[str, Any], other: Mapping[str, Any], within: float) -> bool:
    return one.keys() == other.keys() and all(
        x == y or math.isclose(x, y, rel_tol=within, abs_tol=within) for x, y in ((one[k], other[k]) for k in one))


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_gpu_leaves_nothing_behind_and_finds_what_the_cpu_finds(home: Path, name: str) -> None:
    there, here = (trained(home, name, device, **CASES[name]) for device in ("cuda", "cpu"))
    within = 2e-3 if "bfloat16" in str(CASES[name]) else 1e-5
    rows = [list(map(without_clocks, lines(folder / "metrics.jsonl"))) for folder in (there, here)]
    assert len(rows[0]) == len(rows[1]) == 3
    assert all(close(*pair, within) for pair in zip(*rows, strict=True)), rows
    texts = [[row["response"] for row in lines(folder / "completions.jsonl")] for folder in (there, here)]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same == len(texts[0]) or (within > 1e-3 and same >= 0.9 * len(texts[0]))  # a draw at the edge of two tokens
    ours, theirs = (load_file(next((folder / "final").glob("*.safetensors"))) for folder in (there, here))
    first = {key: value for file in (home / "model").glob("*.safetensors") for key, value in load_file(file).items()}
    moved = torch.cat([(ours[key] - first.get(key, torch.zeros(()))).flatten().float() for key in theirs])
    apart = torch.cat([(ours[key] - theirs[key]).flatten().float() for key in theirs])
    assert moved.norm() > 0 and apart.norm() < (0.3 if within > 1e-3 else 0.05) * moved.norm()


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:invalid value encountered")
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_of_a_gpu_find_there_what_torch_finds_on_the_cpu(home: Path, name: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    here = trained(home, f"{name}, without kernels", "cpu", **CASES[name])
    calls = interpreted(monkeypatch)
    there = trained(home, f"{name}, by kernels", "cuda", **CASES[name])
    within = 2e-3 if name == "bfloat16" else 2e-5
    rows = [list(map(without_clocks, lines(folder / "metrics.jsonl"))) for folder in (there, here)]
    assert all(close(*pair, within) for pair in zip(*rows, strict=True)), rows
    assert KERNELS[name] <= calls


def interpreted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From here on Triton's kernels read what lies there, by its interpreter: the names of those that did."""
    rows, calls = importlib.import_module("selftaught.kernels.rows"), set[str]()

    def reading(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **more: Any) -> Any:
            given = [x for x in tree_flatten((args, more))[0] if isinstance(x, torch.Tensor)]
            assert all(isinstance(x, pretend.OnGpu) for x in given), f"{name} is given a tensor of the CPU"
            calls.add(name)
            args, more = tree_map(lambda x: x.held if isinstance(x, pretend.OnGpu) else x, (args, more))
            return tree_map(lambda x: pretend.OnGpu(x) if isinstance(x, torch.Tensor) else x, kernel(*args, **more))

        return read

    for name in ("statistics", "buckets", "kl", "js", "clipped", "blend", "gradient", "sampled_gradient",
                 "buckets_gradient", "blend_gradient"):
        monkeypatch.setattr(rows, name, reading(name, getattr(rows, name)))
    monkeypatch.setattr(kernels, "_works_on", lambda z: True)
    monkeypatch.setattr(base, "_off", False)
    return calls


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", ["sdpo", "rounded at random"])
def test_a_run_on_a_gpu_is_gone_on_with_to_the_same_bits(home: Path, name: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {**CASES[name], "checkpoint": {"every": 1}}
    again = f"{name}, killed"
    whole = Path(shutil.move(trained(home, again, "cuda", **sections), home / "runs" / name))
    record = Session.record

    def killed(self: Session, metrics: Mapping[str, float]) -> None:
        if self.done == 2:
            raise KeyboardInterrupt
        record(self, metrics)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Session, "record", killed)
        trained(home, again, "cuda", **sections)
    folder = home / "runs" / "cuda" / again
    said = io.StringIO()
    with pretend.gpu():
        selftaught.train(str(folder), resume=True, console=Console(file=said))
    assert "resumed after step 1" in said.getvalue()
    assert [*map(without_clocks, lines(folder / "metrics.jsonl"))] == [
        *map(without_clocks, lines(whole / "metrics.jsonl"))]
    weights = Path("final") / "model.safetensors"
    assert (whole / weights).read_bytes() == (folder / weights).read_bytes()


def test_the_doctor_looks_at_a_gpu(home: Path) -> None:
    path = write_recipe(home, "doctor.yaml", device="cuda", method={"name": "rlsd"}, out=str(home / "runs" / "doctor"))
    with pretend.gpu():
        said = cli("doctor", path)
    assert "device cuda" in said.out and "ok      sampler against" in said.out and "ok      null teacher" in said.out


# The pretence itself.


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretend.gpu():
        there, here = torch.arange(3.0, device="cuda"), torch.ones(3)
        assert (there.device, there.is_cuda, there.is_cpu) == (pretend.CUDA, True, False)
        one = torch.tensor(2.0)
        refused: list[Callable[[], Any]] = [
            lambda: there + here, lambda: there.add_(here), lambda: torch.where(there > 1, here, there),
            lambda: torch.cat([there, here]), lambda: torch.stack([there[0], one]), lambda: one.add_(there[0]),
            lambda: torch.nn.functional.linear(there, here), lambda: here[there > 1],
            lambda: there + torch.zeros_like(there, device="cpu"),
            lambda: there.clone().normal_(generator=torch.Generator()),
        ]
        for act in refused:
            with pytest.raises(RuntimeError, match=r"at least two devices|indices should be|a generator of"):
                act()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + 1.0).device == (there * one).device == pretend.CUDA
        moved = there.cpu()
        assert type(moved) is torch.Tensor and torch.equal(moved, torch.arange(3.0)) and torch.equal(
            here.copy_(there), moved)
        assert there.to("cuda") is there and there[torch.tensor([0, 2])].tolist() == [0.0, 2.0]
        weight = torch.nn.Linear(3, 2).to("cuda").weight
        (weight @ there).sum().backward()
        assert weight.grad is not None and weight.grad.is_cuda and weight.grad.tolist() == [[0.0, 1.0, 2.0]] * 2


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_that_was_left_behind_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = assemble.make_batch

    def forgets(rollouts: Any, verdicts: Any, privileges: Any, step: int, device: Any, **more: Any) -> Any:
        return make(rollouts, verdicts, privileges, step, "cpu", **more)

    monkeypatch.setattr(sys.modules["selftaught.train"], "make_batch", forgets)
    with pytest.raises(RuntimeError, match="at least two devices"):
        trained(home, "forgets", "cuda")
