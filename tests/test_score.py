"""Scoring: the shared layout against the model itself, and the views of a batch against their definitions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from selftaught import kernels
from selftaught.assemble import make_batch
from selftaught.errors import UserError
from selftaught.loss import chunked_loss
from selftaught.methods import Method, batch_credit, build, names
from selftaught.records import Batch, Privilege, Problem, Prompt, Rollout, Sampling, TokenLoss, Verdict, View
from selftaught.score import Backbone, Scorer, views
from selftaught.score.attention import Segments
from selftaught.score.fused import Fused
from selftaught.score.hub import load_model
from selftaught.score.operations import Forgets, Gate, Gated, Linear, Norm, Rotated, inverse_root
from selftaught.tensors import MIN_COMMON, fast_linear, pack, upcast
from selftaught.vocabulary import sampled_log_probs

Ids = tuple[int, ...]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(params=["loops", "torch"])
def operators(request: Any) -> Iterator[None]:
    """The compiled loops, where there are any, and what takes their place."""
    with kernels.off() if request.param == "torch" else nullcontext():
        yield


def ids(count: int, seed: int) -> Ids:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, families.VOCABULARY, (count,), generator=generator).tolist())


def ragged(prompts: list[Ids], rollouts: list[tuple[int, int]]) -> tuple[list[Ids], list[Ids]]:
    """Rollouts as (which prompt, tokens of response), in that order, as prompts and responses."""
    return [prompts[p] for p, _ in rollouts], [ids(size, 100 + i) for i, (_, size) in enumerate(rollouts)]


HEAD = ids(MIN_COMMON + 4, 1)  # what all prompts of a few-shot batch begin with
APART = [ids(11, 2), ids(8, 3), ids(17, 4)]
SEVERAL = [(0, 5), (1, 1), (0, 12), (2, 3), (0, 1), (2, 20)]  # groups interleaved, some responses of one token
BATCHES: dict[str, tuple[list[Ids], list[Ids]]] = {
    "several groups": ragged(APART, SEVERAL),
    "a common prefix": ragged([HEAD + prompt for prompt in APART], SEVERAL),
    "a prompt that begins another": ragged([HEAD, HEAD + ids(6, 5), HEAD + ids(6, 5) + ids(3, 6)], SEVERAL),
    "a common prefix too short to share": ragged([HEAD[: MIN_COMMON - 1] + prompt for prompt in APART], SEVERAL),
    "a group of one": ragged(APART[:1], [(0, 9)]),
    "responses of one token": ragged(APART, [(0, 1), (1, 1), (0, 1)]),
    "identical rollouts": ([HEAD] * 4, [ids(7, 8)] * 3 + [ids(5, 9)]),
}


def one_by_one(model: Any, prompts: list[Ids], responses: list[Ids]) -> Tensor:
    """Log-probs of all response tokens by the model's own forward, one rollout at a time: (N,)."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return torch.cat(found)


def log_probs(backbone: Backbone, prompts: list[Ids], responses: list[Ids]) -> Tensor:
    """The same by the backbone's layout."""
    logits = backbone.logits(backbone.hidden(pack(prompts, responses)))
    sampled = torch.tensor([token for response in responses for token in response])
    return logits.log_softmax(-1).gather(1, sampled[:, None]).squeeze(1)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter."""
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> None:
    """Equal within `tolerance` of the largest element of each parameter's gradient; none may vanish."""
    assert one.keys() == other.keys()
    for name, expected in other.items():
        size = expected.abs().max().item()
        assert size > 0, name
        assert (one[name] - expected).abs().max().item() <= tolerance * size, name


# The layouts.


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("family", families.SUPPORTED)
def test_both_layouts_are_the_model_itself_in_log_probs_and_every_gradient(family: str, case: str) -> None:
    model = families.SUPPORTED[family]()
    prompts, responses = BATCHES[case]
    expected = one_by_one(model, prompts, responses)
    weight = torch.linspace(-1, 2, expected.numel())
    of_model = gradients(model, (expected * weight).sum())
    for layout in ("shared", "plain"):
        found = log_probs(Backbone(model, layout), prompts, responses)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert_same_gradients(gradients(model, (found * weight).sum()), of_model, 2e-5)


@pytest.mark.parametrize("case", BATCHES)
def test_both_layouts_have_the_same_hidden_states(case: str) -> None:
    for family in ("llama", "gemma3"):
        model, packed = families.SUPPORTED[family](), pack(*BATCHES[case])
        shared, plain = (Backbone(model, layout).hidden(packed) for layout in ("shared", "plain"))
        assert shared.shape == (sum(map(len, BATCHES[case][1])), model.config.hidden_size)
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)


def test_a_prompt_and_what_prompts_share_are_computed_once() -> None:
    prompts, responses = BATCHES["a common prefix"]
    packed = pack(prompts, responses)
    assert packed.common == len(HEAD)
    own_inputs = sum(len(response) - 1 for response in responses)
    assert packed.token_ids.numel() == len(HEAD) + sum(map(len, APART)) + own_inputs


def test_a_window_longer_than_everything_is_no_window() -> None:
    wide = families.gemma3(sliding_window=400)
    none = families.gemma3(layer_types=["full_attention"] * 2)
    none.load_state_dict(wide.state_dict())
    none.model.rotary_emb = wide.model.rotary_emb  # sliding layers have a base of their own
    prompts, responses = BATCHES["several groups"]
    narrow = log_probs(Backbone(families.gemma3(), "shared"), prompts, responses)
    found = log_probs(Backbone(wide, "shared"), prompts, responses)
    torch.testing.assert_close(found, one_by_one(wide, prompts, responses), **CLOSE)
    assert (found - narrow).abs().max() > 0.1  # so the window of the other tests does matter


def test_a_pass_leaves_the_models_own_attention_in_place() -> None:
    model = families.llama()
    own = model.config._attn_implementation
    Backbone(model, "shared").hidden(pack(*BATCHES["several groups"]))
    assert model.config._attn_implementation == own
    with pytest.raises(IndexError):  # a token id outside the vocabulary, in the middle of a pass
        Backbone(model, "shared").hidden(pack([(9999,)], [(1, 2)]))
    assert model.config._attn_implementation == own


# Verification.


@pytest.mark.parametrize("family", families.SUPPORTED)
def test_verify_passes_on_supported_families_with_tiny_gaps(family: str) -> None:
    backbone = Backbone(families.SUPPORTED[family]())
    backbone.model.train()
    own = backbone.config._attn_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gap = backbone.verify(*BATCHES["a common prefix"])
    assert backbone.layout == "shared" and gap.keys() == {"head", "layout"}
    assert max(gap.values()) < 1e-5
    assert backbone.model.training and backbone.config._attn_implementation == own


@pytest.mark.parametrize("family", families.UNSUPPORTED)
def test_an_unsupported_family_falls_back_with_a_warning_and_is_right(family: str) -> None:
    model = families.UNSUPPORTED[family]()
    prompts, responses = BATCHES["several groups"]
    backbone = Backbone(model, "auto")
    with pytest.warns(UserWarning, match="falling back to one row per rollout"):
        backbone.verify(prompts, responses)
    assert backbone.layout == "plain"
    with torch.no_grad():
        torch.testing.assert_close(log_probs(backbone, prompts, responses), one_by_one(model, prompts, responses),
                                   **CLOSE)
    with pytest.raises(UserError, match=r"score\.layout: shared, but"):
        Backbone(model, "shared").verify(prompts, responses)
    asked = Backbone(model, "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked.verify(prompts, responses).keys() == {"head"}


@pytest.mark.parametrize("family", families.UNSUPPORTED)
def test_an_unsupported_family_loads_from_its_folder_and_falls_back_there_too(family: str, tmp_path: Path) -> None:
    made = families.UNSUPPORTED[family]()
    made.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.float32, "cpu")
    prompts, responses = BATCHES["several groups"]
    backbone = Backbone(model, "auto")
    with pytest.warns(UserWarning, match="falling back to one row per rollout"):
        backbone.verify(prompts, responses)
    with torch.no_grad():
        torch.testing.assert_close(log_probs(backbone, prompts, responses), one_by_one(made, prompts, responses),
                                   **CLOSE)


def test_verify_finds_a_layout_that_gives_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Segments._causal
    monkeypatch.setattr(Segments, "_causal", lambda self, q, k, v, window: right(self, q, k, v, 3))
    backbone = Backbone(families.llama())
    with pytest.warns(UserWarning, match="differs by"):
        backbone.verify(*BATCHES["several groups"])
    assert backbone.layout == "plain"


def test_logits_that_are_scaled_in_an_unknown_way_are_refused() -> None:
    from transformers import LlamaForCausalLM

    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    plain = families.llama()
    model = Scaled(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    for layout in ("auto", "plain"):
        with pytest.raises(UserError, match="Scaled: its logits are not its hidden states through its head"):
            Backbone(model, layout).verify(*BATCHES["several groups"])


@pytest.mark.parametrize("kind", ["granite", "cohere"])
def test_logit_scales_that_are_known_are_applied(kind: str) -> None:
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    made = {"granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
            "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25})}
    cls, config, own = made[kind]
    backbone = Backbone(families._made(cls, config(**families.COMMON, **own), 0))
    assert backbone.head().scale == 0.25
    assert max(backbone.verify(*BATCHES["several groups"]).values()) < 1e-5


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="use a causal language model"):
        Backbone(families.llama().model)


# Views.


def rollouts_of(prompts: list[Ids], responses: list[Ids]) -> list[Rollout]:
    problems = {prompt: Problem(f"p{i}", "?") for i, prompt in enumerate(dict.fromkeys(prompts))}
    sampling = Sampling(max_completion_length=64)
    return [Rollout(problems[prompt], i, Prompt(prompt), response, (0.0,) * len(response), "", "stop", sampling, 0, 0)
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))]


def make(case: str = "a common prefix") -> Batch:
    """A batch with rewards, and a privilege of its own length for all rollouts but the second."""
    rollouts = rollouts_of(*BATCHES[case])
    verdicts = [Verdict(float(i % 3 == 0)) for i in range(len(rollouts))]
    privileges = [None if i == 1 else Privilege("hint", "", Prompt(r.prompt.token_ids + ids(2 + i % 2, 50 + i % 2)))
                  for i, r in enumerate(rollouts)]
    return make_batch(rollouts, verdicts, privileges, 3)


def scorer(model: Any, views: Mapping[str, View], weights: Mapping[str, Any], budget: int = 10_000,
           temperature: float = 1.0, layout: str = "shared", external: Any = None) -> Scorer:
    other = None if external is None else Backbone(external, layout)
    return Scorer(Backbone(model, layout), views, lambda name: weights.get(name), budget, temperature, other)


def whole(of: Scorer, batch: Batch) -> Iterator[Mapping[str, Tensor]]:
    for micro in of.split(batch):
        yield of.hidden(batch, micro)


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # tied, and with a head of its own
def test_given_weights_are_a_second_model_with_those_weights(family: str, layout: str) -> None:
    student, other, batch = families.SUPPORTED[family](), families.SUPPORTED[family](1), make()
    given = dict(other.named_parameters())
    of = scorer(student, {"teacher": View("initial", "privileged")}, {"teacher": given}, layout=layout)
    hidden = next(whole(of, batch))
    packed = pack(batch.contexts["privileged"], batch.responses)
    torch.testing.assert_close(hidden["teacher"], Backbone(other, layout).hidden(packed))
    plain = pack(batch.contexts["plain"], batch.responses)
    torch.testing.assert_close(hidden["student"], Backbone(student, layout).hidden(plain))
    heads = of.heads()
    assert heads["teacher"].weight is other.get_output_embeddings().weight
    assert heads["student"].weight is student.get_output_embeddings().weight
    assert hidden["student"].requires_grad and not hidden["teacher"].requires_grad
    logp = of.sampled(frozenset({"teacher", "student"}), batch)
    torch.testing.assert_close(
        logp["teacher"], one_by_one(other, list(batch.contexts["privileged"]), list(batch.responses)), **CLOSE)
    torch.testing.assert_close(
        logp["student"], one_by_one(student, list(batch.contexts["plain"]), list(batch.responses)), **CLOSE)
    assert all(p.grad is None for model in (student, other) for p in model.parameters())


def test_what_given_weights_leave_out_is_the_students_own() -> None:
    model = families.qwen3()
    norm = {"model.norm.weight": torch.full((32,), 0.5)}
    backbone, packed = Backbone(model), pack(*BATCHES["a group of one"])
    own = backbone.hidden(packed)
    assert backbone.head(norm).weight is model.lm_head.weight
    torch.testing.assert_close(backbone.hidden(packed, norm), own / model.model.norm.weight * 0.5)


def test_a_live_privileged_view_is_the_student_with_the_other_prompt_and_no_gradient() -> None:
    model, batch = families.llama(), make()
    of = scorer(model, {"teacher": View("live", "privileged")}, {})
    hidden = next(whole(of, batch))
    expected = Backbone(model).hidden(pack(batch.contexts["privileged"], batch.responses))
    torch.testing.assert_close(hidden["teacher"], expected)
    assert not hidden["teacher"].requires_grad
    second = slice(5, 6)  # the one token of the rollout without a privilege: both see the same
    torch.testing.assert_close(hidden["teacher"][second], hidden["student"][second], **CLOSE)
    assert (hidden["teacher"][:5] - hidden["student"][:5]).abs().max() > 0.1


def test_equal_views_are_run_once_and_different_ones_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, batch = families.llama(), families.llama(1), make()
    views = {"teacher": View("snapshot", every=5), "again": View("snapshot", every=5),
             "reference": View("snapshot", every=9), "average": View("ema", rate=0.1)}
    given = {name: dict((other if name in ("teacher", "again") else model).named_parameters()) for name in views}
    of, runs = scorer(model, views, given), []
    right = Scorer._run
    monkeypatch.setattr(Scorer, "_run", lambda self, *a: runs.append(a[2]) or right(self, *a))
    hidden = dict(next(whole(of, batch)))
    assert runs == ["student", "teacher", "reference", "average"]
    assert hidden["again"] is hidden["teacher"]
    torch.testing.assert_close(hidden["reference"], hidden["student"])
    assert (hidden["teacher"] - hidden["reference"]).abs().max() > 0.1


@pytest.mark.parametrize(("room", "again"), [(2**28, []), (0, ["teacher"]), (2_000, ["teacher"])], ids=str)
def test_what_credit_has_scored_is_not_run_again_for_the_loss_of_that_batch(
        monkeypatch: pytest.MonkeyPatch, room: int, again: list[str]) -> None:
    model, batch = families.llama(), make()
    of, runs = scorer(model, {"teacher": View("live", "privileged")}, {}, budget=60), list[tuple[str, int]]()
    micros = list(of.split(batch))
    fresh = [dict(of.hidden(batch, micro)) for micro in micros]
    right = Scorer._run
    monkeypatch.setattr(Scorer, "_run", lambda self, *a: runs.append((a[2], a[1].rollouts[0])) or right(self, *a))
    monkeypatch.setattr(views, "KEPT_BYTES", room)
    of.sampled(frozenset({"teacher", "student"}), batch)
    runs.clear()
    found = [dict(of.hidden(batch, micro)) for micro in micros]
    for one, two in zip(found, fresh, strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)
    assert found[0]["student"].requires_grad
    run_again = [first for name, first in runs if name == "teacher"]
    assert len(micros) > 2 and len([first for name, first in runs if name == "student"]) == len(micros)
    assert bool(run_again) == bool(again) and (room != 2_000 or len(run_again) < len(micros))
    runs.clear()
    of.sampled(frozenset({"teacher"}), batch)
    dict(of.hidden(make(), micros[0]))  # of another batch nothing is known
    assert ("teacher", 0) in runs[len(micros):]


def test_the_students_own_scores_are_not_those_of_an_equal_view_without_dropout() -> None:
    model, batch = families.llama(attention_dropout=0.5).train(), make()
    of = scorer(model, {"again": View("live", "plain")}, {}, layout="plain")
    found = of.sampled(frozenset({"again", "student"}), batch)
    assert (found["again"] - found["student"]).abs().max() > 0.01
    model.eval()
    torch.testing.assert_close(of.sampled(frozenset({"student"}), batch)["student"], found["again"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_and_entropy_are_at_the_sampling_temperature(temperature: float) -> None:
    model, batch = families.gemma3(), make()
    of = scorer(model, {}, {}, budget=40, temperature=temperature)
    found = of.sampled(frozenset({"student", "student.entropy"}), batch)
    backbone = Backbone(model)
    logits = backbone.logits(backbone.hidden(pack(batch.contexts["plain"], batch.responses))) / temperature
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found["student"], expected.log_prob(batch.tokens.tokens), **CLOSE)
    torch.testing.assert_close(found["student.entropy"], expected.entropy(), **CLOSE)
    assert not found["student"].requires_grad
    assert of.sampled(frozenset({"student.entropy"}), batch).keys() == {"student.entropy"}


def test_a_frozen_pass_touches_nothing_of_the_student() -> None:
    model = families.llama(attention_dropout=0.5)
    packed = pack(*BATCHES["several groups"])
    backbone = Backbone(model, "plain")
    expected = backbone.hidden(packed)
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = held = torch.ones_like(model.lm_head.weight)
    assert (backbone.hidden(packed) - expected).abs().max() > 0.01  # dropout is on
    with backbone.frozen():
        found = backbone.hidden(packed)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(backbone.hidden(packed, dict(model.named_parameters())), expected)
    with pytest.raises(RuntimeError), backbone.frozen():
        raise RuntimeError
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert model.lm_head.weight.grad is held and bool((held == 1).all())
    assert all(p.grad is None for p in model.model.layers.parameters())


# Micro-batches.


def update(model: Any, method: Method, teacher: Any, batch: Batch, budget: int,
           chunk: int | None = None) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients and the number of micro-batches of one optimiser batch, as the training loop takes them."""
    of = scorer(model, method.views, {view: dict(teacher.named_parameters()) for view in method.views}, budget,
                external=teacher)
    logp = of.sampled(method.scores, batch)
    credit, weight, _ = batch_credit(method, batch.tokens, logp, reduction="token_mean", length=None, sampler_cap=None)
    model.zero_grad()
    loss, micros = 0.0, list(of.split(batch))
    for micro in micros:
        rows = micro.tokens
        reduced = chunked_loss(method.loss, of.hidden(batch, micro), of.heads(), batch.tokens.tokens[rows],
                               {name: value[rows] for name, value in credit.items()}, weight[rows], chunk=chunk)
        reduced.loss.backward()
        loss += reduced.loss.item()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss, found, len(micros)


@pytest.mark.parametrize("name", names())
def test_every_cut_into_micro_batches_and_chunks_gives_the_same_gradient(name: str) -> None:
    model, teacher, batch = families.smollm(), families.smollm(1), make()
    method = build(name)
    loss, expected, count = update(model, method, teacher, batch, 10_000)
    assert count == 1
    counts = set()
    for budget, chunk in [(1, None), (60, None), (90, 3), (10_000, 5)]:
        cut_loss, found, count = update(model, method, teacher, batch, budget, chunk)
        counts.add(count)
        assert cut_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert_same_gradients(found, expected, 1e-5)
    assert max(counts) == len(batch.responses) and len(counts) >= 3


def test_micro_batches_hold_every_rollout_once_in_order_within_the_budget() -> None:
    batch, model = make(), families.llama()
    views = {"teacher": View("live", "privileged")}
    ends = torch.tensor([0, *map(len, batch.responses)]).cumsum(0).tolist()
    for budget in (1, 40, 55, 70, 10_000):
        micros = list(scorer(model, views, {}, budget).split(batch))
        assert [i for micro in micros for i in micro.rollouts] == list(range(len(batch.responses)))
        for micro in micros:
            assert micro.tokens == slice(ends[micro.rollouts[0]], ends[micro.rollouts[-1] + 1])
            for context in ("plain", "privileged"):
                packed = pack([batch.contexts[context][i] for i in micro.rollouts],
                              [batch.responses[i] for i in micro.rollouts])
                assert packed.token_ids.numel() <= budget or len(micro.rollouts) == 1


def test_in_the_plain_layout_the_budget_bounds_the_padded_rows() -> None:
    batch, model = make(), families.llama()
    views = {"teacher": View("live", "privileged")}
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    for budget in (1, 60, 90, 10_000):
        shapes.clear()
        of = scorer(model, views, {}, budget, layout="plain")
        found = torch.cat([hidden["student"] for hidden in whole(of, batch)])
        assert all(rows * width <= budget or rows == 1 for rows, width in shapes)
        assert found.shape[0] == batch.tokens.tokens.shape[0]
    assert shapes[0][0] == len(batch.responses)


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recomputed_activations_give_the_same_gradient(family: str, layout: str) -> None:
    model = families.SUPPORTED[family](attention_dropout=0.5)  # which recomputation must not switch on
    backbone, (prompts, responses) = Backbone(model, layout), BATCHES["a common prefix"]
    weight = torch.linspace(-1, 2, sum(map(len, responses)))
    own = model.config._attn_implementation

    def run() -> tuple[dict[str, Tensor], int]:
        calls = []
        hooks = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
        found = gradients(model, (log_probs(backbone, prompts, responses) * weight).sum())
        for hook in hooks:
            hook.remove()
        return found, len(calls)

    expected, once = run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.checkpoint_activations()
    found, twice = run()
    assert twice == 2 * once > 0
    assert_same_gradients(found, expected, 1e-6)
    assert model.config._attn_implementation == own
    with torch.no_grad():
        torch.testing.assert_close(log_probs(backbone, prompts, responses), one_by_one(model, prompts, responses),
                                   **CLOSE)


def test_the_float32_head_is_made_once_per_frozen_block_and_follows_the_weights(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.llama().to(torch.bfloat16)
    backbone = Backbone(model)
    hidden = torch.randn(3, model.config.hidden_size, dtype=torch.bfloat16)
    made: list[int] = []
    monkeypatch.setattr("selftaught.score.backbone.upcast", lambda x: made.append(x.shape[0]) or upcast(x))
    for block in range(2):
        made.clear()
        with torch.no_grad():
            fresh = backbone.logits(hidden)  # outside of a block nothing is kept
        with backbone.frozen():
            with backbone.frozen():
                first = backbone.logits(hidden)
            assert first.equal(fresh) and first.equal(backbone.logits(hidden)) and first.dtype == torch.float32
        assert made.count(backbone.vocabulary) == 1, block
        with torch.no_grad():  # an update between two samplings
            model.get_output_embeddings().weight.mul_(1.5)
        with backbone.frozen():
            moved = backbone.logits(hidden)
        with torch.no_grad():
            assert moved.equal(backbone.logits(hidden)) and not moved.equal(first)


def test_a_bfloat16_model_is_verified_scored_and_trained() -> None:
    wide = families.qwen3()
    narrow = families.qwen3().to(torch.bfloat16)
    batch = make()
    backbone = Backbone(narrow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.verify(list(batch.contexts["plain"]), list(batch.responses))
    hidden = backbone.hidden(pack(batch.contexts["plain"], batch.responses))
    assert hidden.dtype == torch.bfloat16
    logp, _ = sampled_log_probs(hidden, backbone.head(), batch.tokens.tokens)
    exact = one_by_one(wide, list(batch.contexts["plain"]), list(batch.responses))
    assert logp.dtype == torch.float32 and (logp - exact).abs().mean() < 0.1
    _, found, _ = update(narrow, build("opsd"), families.qwen3(1).to(torch.bfloat16), batch, 60)
    _, reference, _ = update(wide, build("opsd"), families.qwen3(1), batch, 60)
    a, b = (torch.cat([g.float().flatten() for g in grads.values()]) for grads in (found, reference))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95


# ------------------------------------------------------------------------------------------------------ fused


def test_decoding_leaves_every_layer_as_it_was_also_after_an_error() -> None:
    backbone = Backbone(families.llama())
    layers = [module for module in backbone.model.modules() if isinstance(module, torch.nn.Linear)]
    with pytest.raises(KeyboardInterrupt), backbone.decoding():
        assert all("forward" in vars(layer) for layer in layers)
        raise KeyboardInterrupt
    assert not any("forward" in vars(layer) for layer in layers)


# Norms, gated layers with SiLU, and linear layers.
FORMS = {"llama": 5 + 2 + 15, "smollm": 5 + 2 + 15, "qwen2": 5 + 2 + 15, "qwen3": 9 + 2 + 15, "gemma3": 13 + 15}


@pytest.mark.parametrize("family", sorted(families.SUPPORTED))
def test_the_known_modules_of_a_family_are_fused_and_only_inside_the_block(family: str) -> None:
    model = families.SUPPORTED[family]()
    fused = Fused(model)
    with fused.installed(), fused.installed():
        assert sum("forward" in vars(module) for module in model.modules()) == FORMS[family]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("family", sorted(families.SUPPORTED))
def test_fused_modules_give_the_models_own_numbers_and_gradients(family: str) -> None:
    """Against the model itself in float64: the fused float32 pass is as near to it as the plain float32 one."""
    ids = torch.randint(4, 300, (2, 19), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, dtype in (("exact", torch.float64), ("plain", torch.float32), ("fused", torch.float32)):
        model = families.SUPPORTED[family]().to(dtype)
        with Fused(model).installed() if name == "fused" else nullcontext():
            logits = model(input_ids=ids).logits
        logits.log_softmax(-1).gather(-1, ids[..., None]).sum().backward()
        found[name] = torch.cat([logits.flatten(), *(p.grad.flatten() for p in model.parameters())]).double()
    error = {name: (found[name] - found["exact"]).norm() / found["exact"].norm() for name in ("plain", "fused")}
    assert error["fused"] < max(4 * error["plain"], 1e-6), error
    assert not torch.equal(found["fused"], found["plain"]), "nothing was fused"


@pytest.mark.parametrize("function, shapes", [
    (Norm, [(2, 3, 8), (8,)]), (Gate, [(6, 5), (6, 5)]), (Gated, [(6, 8), (5, 8), (5, 8), (8, 5)]),
    (Linear, [(6, 8), (5, 8)]), (Rotated, [(1, 2, 3, 8), (1, 1, 3, 8), (1, 1, 3, 8)]),
])
def test_the_gradient_of_a_fused_function_is_that_of_its_differences(function: Any, shapes: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if function is Rotated:
        inputs[0].requires_grad_()
    else:
        inputs = [x.requires_grad_() for x in inputs]
    rest = {Rotated: (), Gate: ()}.get(function, (None, None))
    if function is Norm:
        assert torch.autograd.gradcheck(lambda x, weight: Norm.apply(x, weight, inverse_root(x, 1e-6)), inputs)
    else:
        assert torch.autograd.gradcheck(lambda *given: function.apply(*given, *rest), inputs)


def test_memory_for_gradients_is_used_again_and_holds_nothing_of_the_last_update() -> None:
    def gradients(backbone: Backbone, seed: int) -> dict[str, torch.Tensor]:
        backbone.model.zero_grad()
        with backbone.accumulating():
            backbone.hidden(pack([ids(6, seed)], [ids(4, seed + 1)])).square().sum().backward()
        return {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}

    used = Backbone(families.llama())
    first = gradients(used, 0)
    name = next(name for name in first if name.endswith("q_proj.weight"))
    place, value = first[name].data_ptr(), first[name].clone()
    again, fresh = gradients(used, 5), gradients(Backbone(families.llama()), 5)
    assert again[name].data_ptr() == place and not again[name].equal(value)
    assert again.keys() == fresh.keys() and all(again[n].equal(fresh[n]) for n in fresh)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("changed", [False, True])
def test_a_product_keeps_what_a_norm_was_made_of_unless_it_was_changed_since(changed: bool) -> None:
    found, kept = [], list[int]()
    for form in ("plain", "fused"):
        model = families.llama()
        layer = model.model.layers[0]
        width = layer.self_attn.q_proj.weight.shape[1]
        x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with Fused(model).installed() if form == "fused" else nullcontext():
            y = layer.input_layernorm(x)
            y = y.mul_(2) if changed else y
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
                product = layer.self_attn.q_proj(y)
        product.square().sum().backward()
        found.append((layer.self_attn.q_proj.weight.grad, layer.input_layernorm.weight.grad, x.grad))
    assert (y.data_ptr() in kept) is changed
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # a tied head, and one of its own
@pytest.mark.parametrize("rows", [None, 310])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_added_in_place_are_the_gradients(family: str, rows: int | None, recomputed: bool) -> None:
    """Two micro-batches, with the padding token in a prompt: it teaches the embedding nothing, as ever."""
    found = []
    for in_place in (False, True):
        backbone = Backbone(families.SUPPORTED[family](), rows=rows)
        if recomputed:
            backbone.checkpoint_activations()
        with backbone.accumulating() if in_place else nullcontext() as head_grad:
            for seed in (0, 1):
                response = tuple(token % 300 for token in ids(4, seed + 2))
                packed = pack([(0, *ids(5, seed)), (0, *ids(6, seed + 7))], [response] * 2)
                reduced = chunked_loss(
                    lambda student, views, credit: TokenLoss(-student.at_sampled, {}),
                    {"student": backbone.hidden(packed)}, {"student": backbone.head()},
                    torch.tensor([t for _, response in packed.rows for t in response]), {}, torch.ones(8), chunk=3,
                    head_grad=head_grad)
                reduced.loss.backward()
        found.append({name: p.grad for name, p in backbone.model.named_parameters()})
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, atol=1e-5, rtol=1e-5, msg=name)


def test_the_embedding_makes_no_gradient_of_its_own_where_one_is_there() -> None:
    """The padding row of an embedding with a gradient stays as it was, and the others are added to, once."""
    model = families.llama(tie_word_embeddings=False)
    embedding, fused = model.get_input_embeddings(), Fused(model)
    embedding.weight.grad = torch.full_like(embedding.weight, 2.0)
    before, fused.adds = embedding.weight.grad, {}
    with fused.installed():
        embedding(torch.tensor([0, 5, 5, 7])).sum().backward()
    assert embedding.weight.grad is before
    assert before[[0, 5, 7, 8], 0].tolist() == [2.0, 4.0, 3.0, 2.0]


@pytest.mark.parametrize("rows", [1, 3, 16, 64, 65])
@pytest.mark.parametrize("inner", [7, 32 * 16 * 3])
def test_a_gated_layer_of_few_rows_has_the_bits_of_its_separate_layers(rows: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, gate, up = (torch.randn(n, 24, generator=generator) for n in (rows, inner, inner))
    down = torch.randn(24, inner, generator=generator)
    apart = Gate.forward(Forgets(), fast_linear(x, gate), fast_linear(x, up))
    with torch.no_grad():
        found = Gated.forward(Forgets(), x, gate, up, down, None, None)
    assert found.equal(fast_linear(apart, down))


def test_a_module_that_only_looks_like_a_known_one_keeps_its_forward() -> None:
    class OddRMSNorm(type(families.llama().model.norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.001

    class GatedRMSNorm(torch.nn.Module):
        """As Qwen3-Next's and Mamba2's: a second argument changes what it computes."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            own = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
            return own if gate is None else own * gate

    class BareRMSNorm(type(families.llama().model.norm)):  # type: ignore[misc]
        """As Gemma 4's: of one class some have a weight and some have none."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return own * self.weight if hasattr(self, "weight") else own

    model = families.llama()
    model.model.norm.__class__ = OddRMSNorm
    model.gated, model.scaled, model.bare = GatedRMSNorm(), BareRMSNorm(32, 1e-6), BareRMSNorm(32, 1e-6)
    del model.bare.weight
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    wanted = [model.gated(x, x), model.scaled(x), model.bare(x)]
    with Fused(model).installed():
        assert [name in vars(m) for m, name in ((model.gated, "forward"), (model.scaled, "forward"),
                                                (model.bare, "forward"))] == [False, True, False]
        for got, own in zip((model.gated(x, x), model.scaled(x), model.bare(x)), wanted, strict=True):
            torch.testing.assert_close(got, own)
    with Fused(model).installed():
        assert "forward" not in vars(model.model.norm) and "forward" in vars(model.model.layers[0].input_layernorm)


def test_a_gated_layer_is_known_by_its_activation_whatever_its_weights() -> None:
    """Tiny or zero weights make every activation look alike; training makes them differ."""
    model = families.gemma3(initializer_range=1e-3)
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    with Fused(model).installed():
        assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


def test_a_forward_of_somebody_elses_survives_and_outputs_can_be_changed_in_place() -> None:
    model = families.llama()
    layer = model.model.layers[0]
    patched = model.model.norm.forward = lambda x: x
    with Fused(model).installed():
        assert model.model.norm.forward is patched
        layer.self_attn.q_proj(torch.randn(1, 3, 32)).mul_(2)
        layer.mlp(torch.randn(1, 3, 32)).mul_(2)
    assert model.model.norm.forward is patched
