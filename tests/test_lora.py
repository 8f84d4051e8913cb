"""Adapters: at first the model is its base, bit for bit; then A and B alone are trained, kept, saved and loaded."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

import families
import selftaught
from own import cli, lines, make_home, recipe_of, write_recipe
from selftaught.assemble import Parts, assemble, lay_ground
from selftaught.errors import UserError
from selftaught.forecast import forecast
from selftaught.loss import chunked_loss
from selftaught.optim import OptimConfig, Optimizer, Teachers
from selftaught.records import TokenLoss, View
from selftaught.run import load_run
from selftaught.score import Backbone
from selftaught.score.adapter import adapter, add_adapter, load_adapter, save_adapter, targets
from selftaught.score.hub import check_model, load_model, load_tokenizer
from selftaught.tensors import pack
from selftaught.vocabulary import sampled_log_probs
from test_resume import assert_same_run, kill_in, trained
from tiny import save_tiny

RANK, ALPHA = 3, 5.0
MODELS = {"llama": lambda: families.llama(tie_word_embeddings=False),
          "qwen3 tied": lambda: families.qwen3(tie_word_embeddings=True)}  # fmt: skip
PROMPTS = [(5, 6, 7, 8), (5, 6, 7, 8), (9, 10, 11)]
RESPONSES = [(20, 21, 22), (23, 24), (25, 26, 27, 28)]
TOKENS = torch.tensor([t for response in RESPONSES for t in response])
LORA = {"rank": RANK, "alpha": ALPHA}


def adapted(model: Any, *, random_b: bool = False) -> Any:
    add_adapter(model, RANK, ALPHA, "all-linear", seed=7)
    if random_b:
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, 0.0, 0.1)
    return model


def log_probs(backbone: Backbone, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Log-probs (N,) of the tokens of RESPONSES."""
    with backbone.frozen():
        hidden = backbone.hidden(pack(PROMPTS, RESPONSES, "cpu"), weights)
        return sampled_log_probs(hidden, backbone.head(weights), TOKENS)[0]


def train(backbone: Backbone, steps: int, teachers: Teachers | None = None) -> list[dict[str, Tensor]]:
    """A few large steps up the likelihood of RESPONSES; the trained tensors after each."""
    optimizer = Optimizer(backbone.model.named_parameters(), OptimConfig(steps=steps, learning_rate=0.05))
    after = []
    for step in range(steps):
        packed = pack(PROMPTS, RESPONSES, "cpu")
        loss = chunked_loss(lambda s, v, c: TokenLoss(-s.at_sampled), {"student": backbone.hidden(packed)},
                            {"student": backbone.head()}, TOKENS, {}, torch.ones(len(TOKENS)), chunk=4)  # fmt: skip
        loss.loss.backward()
        optimizer.step(step)
        optimizer.zero_grad()
        if teachers is not None:
            teachers.update(step)
        after.append({n: p.detach().clone() for n, p in backbone.model.named_parameters() if p.requires_grad})
    return after


# The model.


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_the_adapted_model_is_its_base_bit_for_bit(make: Any, layout: str, dtype: torch.dtype) -> None:
    base = log_probs(Backbone(make().to(dtype), layout))
    backbone = Backbone(adapted(make().to(dtype)), layout)
    assert log_probs(backbone).equal(base)
    trainable = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2 and all(".lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert all(p.abs().sum() > 0 for name, p in trainable.items() if ".lora_A." in name)
    assert not backbone.model.training and not any(module.training for module in backbone.model.modules())
    moved = log_probs(Backbone(adapted(make().to(dtype), random_b=True), layout))
    assert (moved - base).abs().max() > 1e-2


def test_the_first_adapter_is_a_function_of_the_seed_and_leaves_the_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    one = adapter(adapted(families.llama()))
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    two = adapter(adapted(families.llama()))
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    other = families.llama()
    add_adapter(other, RANK, ALPHA, "all-linear", seed=8)
    assert not all(tensor.equal(two[name]) for name, tensor in adapter(other).items())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_and_b_are_those_of_a_dense_model_with_merged_weights(make: Any, checkpointed: bool) -> None:
    backbone = Backbone(adapted(make(), random_b=True).double(), "shared")
    if checkpointed:
        backbone.checkpoint_activations()
    packed, weight = pack(PROMPTS, RESPONSES, "cpu"), torch.linspace(-1, 1, len(TOKENS), dtype=torch.float64)
    loss = chunked_loss(lambda s, v, c: TokenLoss(-s.at_sampled), {"student": backbone.hidden(packed)},
                        {"student": backbone.head()}, TOKENS, {}, weight, chunk=4).loss  # fmt: skip
    loss.backward()
    own = dict(backbone.model.named_parameters())
    assert all((p.grad is not None) == (".lora_" in name) for name, p in own.items())

    dense = make().double()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in own.items() if ".lora_" in n}
    merged = {}
    for name in {n.partition(".lora_")[0] for n in leaves}:
        a, b = leaves[f"{name}.lora_A.default.weight"], leaves[f"{name}.lora_B.default.weight"]
        merged[f"{name}.weight"] = dense.get_submodule(name).weight.detach() + ALPHA / RANK * b @ a
    reference = torch.zeros((), dtype=torch.float64)
    at = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        logits = functional_call(dense, merged, (), {"input_ids": ids, "use_cache": False}).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
        reference = reference - (weight[at : at + len(response)] * logp).sum()
        at += len(response)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-9)
    assert max(leaf.grad.abs().max().item() for leaf in leaves.values() if leaf.grad is not None) > 0.1
    for name, leaf in leaves.items():  # the models' norms compute in float32, whatever their weights are
        torch.testing.assert_close(own[name].grad, leaf.grad, rtol=1e-5, atol=1e-5)


# Teachers.


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_training_the_initial_view_is_still_the_base_exactly(make: Any, dtype: torch.dtype) -> None:
    base = log_probs(Backbone(make().to(dtype), "shared"))
    backbone = Backbone(adapted(make().to(dtype)), "shared")
    backbone.checkpoint_activations()
    teachers = Teachers({"teacher": View("initial", "plain")}, backbone.model)
    train(backbone, 3, teachers)
    assert (log_probs(backbone) - base).abs().max() > 0.05
    assert log_probs(backbone, teachers.weights("teacher")).equal(base)


def test_an_average_and_a_snapshot_hold_the_adapter_alone_and_equal_what_is_computed_by_hand() -> None:
    backbone = Backbone(adapted(MODELS["qwen3 tied"]().to(torch.bfloat16)), "shared")
    views = {"ema": View("ema", "plain", rate=0.3), "old": View("snapshot", "plain", every=2)}
    teachers = Teachers(views, backbone.model)
    before = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if p.requires_grad}
    after = train(backbone, 5, teachers)
    ema, old = teachers.weights("ema"), teachers.weights("old")
    assert ema is not None and old is not None and ema.keys() == old.keys() == before.keys()
    kept = teachers.state_tensors()
    assert sum(t.numel() for t in kept.values()) == 2 * sum(t.numel() for t in before.values())
    for name, start in before.items():
        by_hand = start.double()
        for stepped in after:
            by_hand = 0.7 * by_hand + 0.3 * stepped[name].double()
        torch.testing.assert_close(ema[name].double(), by_hand, rtol=1e-5, atol=1e-6)
        assert old[name].equal(after[3][name])
    # What the view computes is the model with those very adapters.
    student = log_probs(backbone, old)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if name in old:
                parameter.copy_(old[name])
    assert log_probs(backbone).equal(student)
    assert teachers.distances()["teacher/ema/distance"] > 0


# Which layers.


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    layers = {name.rpartition(".")[2] for name in targets(families.llama(tie_word_embeddings=False), "all-linear")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert targets(families.llama(), ("q_proj", "1.mlp.up_proj")) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]  # fmt: skip


@pytest.mark.parametrize(("wanted", "said"), [
    (("qproj",), "LlamaForCausalLM has no linear layer 'qproj'; did you mean 'q_proj'?"),
    (("q_proj", "c_attn"), "no linear layer 'c_attn'; "),
    (("q_proj", "lm_head"), "'lm_head' is the vocabulary head"),
    (("embed_tokens",), "'embed_tokens' is the vocabulary head or its embedding"),
    (("input_layernorm",), "no linear layer 'input_layernorm'"),
])  # fmt: skip
def test_a_layer_that_takes_no_adapter_is_refused_by_name(wanted: tuple[str, ...], said: str) -> None:
    for tied in (True, False):
        with pytest.raises(UserError) as refused:
            targets(families.llama(tie_word_embeddings=tied), wanted)
        assert str(refused.value).startswith("optim.lora.target_modules: ") and said in str(refused.value)


# The recipe.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import selftaught.train  # imported before any fork  # noqa: F401

    folder = make_home(tmp_path_factory.mktemp("lora"))
    save_tiny(folder / "tied", tie_word_embeddings=True, initializer_range=0.2)
    return folder


def sections(home: Path, name: str, **more: Any) -> dict[str, Any]:
    optim = {"steps": 4, "learning_rate": 1e-2, "lora": LORA, **more.pop("optim", {})}
    method = {"name": "opsd", "teacher": {"weights": "ema", "rate": 0.1}}
    return {"method": method, "optim": optim, "out": str(home / "runs" / name), "eval": {"every": 2}, **more}


def test_a_rank_alone_is_short_for_the_section(home: Path) -> None:
    lora = OptimConfig(steps=1, lora=8).lora  # type: ignore[arg-type]
    assert lora is not None and (lora.rank, lora.alpha, lora.target_modules) == (8, 32, "all-linear")
    assert OptimConfig(steps=1).lora is None
    run = load_run(recipe_of(home), ["optim.lora.alpha=4", "optim.lora.target_modules=[q_proj]"])
    assert run.optim.lora is not None and run.optim.lora.target_modules == ("q_proj",)
    assert load_run(run.resolved()) == run


@pytest.mark.parametrize(("lora", "said"), [
    ({"dropout": 0.1}, "optim.lora.dropout = 0.1: the responses were sampled without it"),
    ({"rank": 0}, "optim.lora.rank = 0"),
    (True, "optim.lora = True"),
    ({"rnak": 4}, "unknown key 'optim.lora.rnak'; did you mean 'rank'?"),
    ({"modules_to_save": ["lm_head"]}, "unknown key 'optim.lora.modules_to_save'"),
    ({"target_modules": []}, "optim.lora.target_modules"),
])  # fmt: skip
def test_a_wrong_field_is_refused_by_name(home: Path, lora: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_run(recipe_of(home, optim={"lora": lora}))
    assert said in str(refused.value)


def test_what_cannot_be_adapted_is_refused_before_a_weight_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("selftaught.assemble.load_model", never)
    for layers, said in ((["lm_head"], "is the vocabulary head"), (["query"], "has no linear layer 'query'")):
        lora = {"target_modules": layers}
        path = write_recipe(home, "refused.yaml", **sections(home, "refused", optim={"lora": lora}))
        told = cli("train", path)
        assert told.code == 2 and said in told.err and "Traceback" not in told.err
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    told = cli("train", write_recipe(home, "refused.yaml", **sections(home, "refused")))
    assert told.code == 2 and "optim.lora needs the package peft" in told.err and "'selftaught[lora]'" in told.err


def parts_of(home: Path, **more: Any) -> Parts:
    ground = lay_ground(load_run(recipe_of(home, **sections(home, "parts", **more))), lambda line: None)
    assert ground.rewarder is not None
    ground.rewarder.close()
    return assemble(ground)


def test_the_forecast_counts_what_is_really_trained(home: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        parts = parts_of(home, optim={"dtype": dtype})
        told = forecast(parts.ground)
        parameters = list(parts.backbone.model.parameters())
        trained_ones = [p for p in parameters if p.requires_grad]
        count = sum(p.numel() for p in trained_ones)
        assert told.trained == count and {p.dtype for p in trained_ones} == {torch.float32}
        assert told.parameters == sum(p.numel() for p in parameters) - count
        assert told.bytes["weights"] == sum(p.numel() * p.element_size() for p in parameters)
        for p in trained_ones:
            p.grad = torch.ones_like(p)
        parts.optimizer.step(0)
        moments = [t for name, t in parts.optimizer.state_tensors().items() if not name.startswith("step/")]
        assert told.bytes["optimiser"] == sum(t.numel() * t.element_size() for t in moments)
        held = parts.teachers.state_tensors().values()
        assert told.bytes["teachers"] == sum(t.numel() * t.element_size() for t in held)
        assert "trained in adapters" in told.lines()[0]


def test_a_killed_run_goes_on_with_the_same_bits_and_saves_nothing_but_adapters(home: Path) -> None:
    for name in ("whole", "killed"):
        chosen = sections(home, name, model=str(home / "tied"))
        path = write_recipe(home, f"{name}.yaml", **chosen)
        if name == "killed":
            code, said = trained(path, act=kill_in("step", 3))
            assert code == -signal.SIGKILL, said
        code, said = trained(path, "--resume")
        assert code == 0, said
    assert "resumed after step" in said
    one, two = (home / "runs" / name for name in ("whole", "killed"))
    assert_same_run(one, two)
    for file in ("model", "optimizer", "teachers"):
        saved = load_file(one / "checkpoints" / "step-4" / f"{file}.safetensors")
        assert saved and all(".lora_" in name for name in saved)
    rows = lines(one / "metrics.jsonl")[1:]
    assert all(row["grad_norm"] > 0 and row["teacher/ema/distance"] > 0 for row in rows)
    refused = cli("train", path, "--resume", "optim.lora.rank=4")
    assert refused.code == 2 and "optim.lora.rank = 4" in refused.err and "begun with 3" in refused.err


def test_an_adapter_does_not_go_on_over_another_base(home: Path) -> None:
    base = save_tiny(home / "moved", initializer_range=0.2)
    path = write_recipe(home, "moved.yaml", **sections(home, "moved", model=str(base)))
    assert cli("train", path).code == 0
    assert cli("train", path, "--resume").code == 0
    save_tiny(base, initializer_range=0.2, seed=1)
    told = cli("train", path, "--resume")
    assert told.code == 2 and f"model = '{base}': its weights are not those" in told.err and "another out" in told.err


def the_card_s_model(final: Path) -> Any:
    """What the code in the model card makes of the folder."""
    code = re.findall(r"^```python\n(.*?)^```", (final / "README.md").read_text(), re.M | re.S)[0]
    made: dict[str, Any] = {}
    exec(code.replace('"final"', repr(str(final))), made)
    assert made["tokenizer"].encode("Hint")
    return made["model"].float()


@pytest.mark.parametrize("more", [{"dtype": "bfloat16", "activation_checkpointing": True},
                                  {"lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]}}])  # fmt: skip
def test_an_adapter_folder_is_peft_s_and_merged_it_is_our_model(home: Path, more: dict[str, Any], tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.chdir(home)
    chosen = sections(home, str(tmp_path / "run"), model="tied", optim=more)  # a relative path must not end up in it
    run = selftaught.train(recipe_of(home, **chosen), console=Console(quiet=True))
    monkeypatch.chdir(tmp_path)
    final = run.folder / "final"
    assert {p.name for p in final.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert not any(final.glob("model*.safetensors"))
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(home / "tied")

    ours = Backbone(load_model(str(final), torch.float32, "cpu"), "shared")
    base = load_model(str(home / "tied"), torch.float32, "cpu")
    start = log_probs(Backbone(base, "shared"))
    theirs = PeftModel.from_pretrained(base, str(final)).merge_and_unload()
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert (log_probs(ours) - start).abs().max() > 1e-2
    assert the_card_s_model(final)(ids).logits.sub(ours.model(ids).logits).abs().max() < 1e-4
    assert log_probs(ours).sub(log_probs(Backbone(theirs, "shared"))).abs().max() < 1e-4


def test_eval_of_an_adapter_folder_samples_what_the_run_s_last_evaluation_did(home: Path) -> None:
    out = home / "runs" / "evaluated"
    path = write_recipe(home, "evaluated.yaml", **sections(home, "evaluated", optim={"dtype": "bfloat16"}))
    told = cli("train", path)
    assert told.code == 0, told.err
    last = [row for row in lines(out / "completions.jsonl") if row["step"] == 4 and row["arm"] == "student"]
    for model, name in ((out / "final", "by-folder"), (out, "by-run")):
        told = cli("eval", model, *([path] if name == "by-folder" else []), f"out={home / name}")
        assert told.code == 0, told.err
        rows = lines(home / name / "completions.jsonl")
        assert [row["response"] for row in rows] == [row["response"] for row in last]
    begun = [row for row in lines(out / "completions.jsonl") if row["step"] == 0 and row["arm"] == "student"]
    assert [row["response"] for row in begun] != [row["response"] for row in last]
    told = cli("train", write_recipe(home, "on.yaml", **sections(home, "on", model=str(out / "final"))))
    assert told.code == 2 and "is an adapter, which can be evaluated but not trained on" in told.err
    assert str(home / "model") in told.err


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_before_the_first_update_a_teacher_without_privilege_is_the_student(home: Path, weights: str) -> None:
    teacher = {"weights": weights, "context": "privileged"} | ({"rate": 0.1} if weights == "ema" else {})
    parts = parts_of(home, method={"name": "opsd", "teacher": teacher}, privilege={"kind": "answer"})
    assert log_probs(parts.backbone, parts.teachers.weights("teacher")).equal(log_probs(parts.backbone))


def test_doctor_finds_an_adapter_s_recipe_sane(home: Path) -> None:
    rollout = {"max_completion_length": 4}
    told = cli("doctor", write_recipe(home, "doctor.yaml", **sections(home, "doctor", rollout=rollout)))
    assert "trained in adapters" in told.out
    assert "null teacher: an empty privilege moves log-probs by 0.0e+00" in told.out
    assert not any(line.startswith("CHANGE") and "memory" in line for line in told.out.splitlines()), told.out


# Folders.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    base = save_tiny(tmp_path / "base")
    save_adapter(adapted(load_model(str(base), torch.float32, "cpu")), tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


def test_the_embedded_model_is_an_adapter_s_base_by_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the folder means the same in another user's cache."""
    monkeypatch.setattr("selftaught.score.hub.quickstart_folder", lambda: saved.parent / "base")
    model = adapted(load_model("quickstart", torch.float32, "cpu"), random_b=True)
    from selftaught.score.hub import lasting_name

    save_adapter(model, saved, lasting_name("quickstart"))
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "quickstart"
    check_model(str(saved))
    again = load_model(str(saved), torch.float32, "cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert again(ids).logits.equal(model(ids).logits)
    assert load_tokenizer(str(saved)).encode("Hint") == load_tokenizer("quickstart").encode("Hint")


def edited(folder: Path, **fields: Any) -> str:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(folder)


def test_a_folder_that_is_no_adapter_of_its_base_is_refused(saved: Path) -> None:
    check_model(str(saved))
    tensors = load_file(saved / "adapter_model.safetensors")
    first = next(iter(tensors))
    for wrong in ({n: t for n, t in tensors.items() if n != first}, {**tensors, first: tensors[first][:, :-1].clone()},
                  {**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}):  # fmt: skip
        save_file(wrong, saved / "adapter_model.safetensors")
        with pytest.raises(UserError, match="does not fit its base model"):
            load_adapter(load_model(str(saved.parent / "base"), torch.float32, "cpu"), saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="but no adapter_model"):
        check_model(str(saved))
    with pytest.raises(UserError, match="of the kind IA3"):
        check_model(edited(saved, peft_type="IA3"))
    with pytest.raises(UserError, match="names no base model; merge the adapter"):
        check_model(edited(saved, base_model_name_or_path=None))


def test_an_adapter_is_refused_as_a_model_to_train_before_a_weight_is_read_and_evaluated_all_the_same(
    home: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was read")

    path = write_recipe(home, "adapter.yaml", model=str(saved), out=str(home / "runs" / "adapter"))
    with monkeypatch.context() as patch:
        patch.setattr("selftaught.assemble.load_model", never)
        for command in (("train", path), ("train", "--dry-run", path), ("doctor", path)):
            told = cli(*command)
            assert told.code == 2 and "is an adapter, which can be evaluated but not trained on" in told.err, told
    told = cli("eval", saved, path)
    assert told.code == 0, told.err


def test_a_lost_base_is_named_with_the_adapter_that_needs_it(saved: Path) -> None:
    gone = saved.parent / "gone" / "model" / "x"
    with pytest.raises(UserError) as refused:
        check_model(edited(saved, base_model_name_or_path=str(gone)))
    assert str(gone) in str(refused.value) and f"the base of the adapter in {saved}" in str(refused.value)
