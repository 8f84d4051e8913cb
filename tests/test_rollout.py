"""Sampling: the right distribution, keyed per rollout, and the log-probs that training will find."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import families
from selftaught.assemble import sample_and_verify
from selftaught.records import Problem, Prompt, Request, Rollout, Sampling
from selftaught.reward import RewardConfig, Rewarder
from selftaught.rollout import Engine, RolloutConfig, TransformersEngine, uniforms
from selftaught.rollout.sampling import BLOCK, draw, truncate
from selftaught.score import Backbone
from selftaught.tensors import MIN_COMMON
from tiny import tiny_tokenizer

Ids = tuple[int, ...]
LAST = 1 - 2**-53  # the largest number that a generator of [0, 1) gives
TOKENIZER = tiny_tokenizer()
HEAD = tuple(range(20, 20 + MIN_COMMON + 3))
PROMPTS: list[Ids] = [(*HEAD, 5, 9, 30), (*HEAD, 7), (*HEAD, *range(41, 49))]


def requests(prompts: Sequence[Ids] = PROMPTS, step: int = 0, seed: int = 0) -> list[Request]:
    return [Request(Problem(f"p{prompt}", "?"), Prompt(prompt), step, seed) for prompt in prompts]


def engine(model: Any, stop_ids: Iterable[int] = (), max_rows: int = 128, layout: str = "shared") -> TransformersEngine:
    return TransformersEngine(Backbone(model, layout), TOKENIZER, stop_ids, max_rows)


def tokens(rollouts: Iterable[Rollout]) -> dict[tuple[str, int], Ids]:
    return {(rollout.problem.id, rollout.sample): rollout.token_ids for rollout in rollouts}


def training_logits(model: Any, rollout: Rollout) -> Tensor:
    """What the model's own forward gives for every response token: (n, V)."""
    row = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    with torch.no_grad():
        return model(input_ids=row, use_cache=False).logits[0, len(rollout.prompt.token_ids) - 1 : -1].float()


def assert_drawn_from(logits_nV: Tensor, rollout: Rollout) -> None:
    """Every token is the inverse transform of its own number under these logits, and its log-prob is recorded."""
    sampled = torch.tensor(rollout.token_ids)[:, None]
    logp = logits_nV.log_softmax(-1)
    torch.testing.assert_close(torch.tensor(rollout.logp_sampler), logp.gather(1, sampled)[:, 0], atol=1e-5, rtol=1e-5)
    above = logp.double().exp().cumsum(-1).gather(1, sampled)[:, 0].numpy()
    below = above - logp.double().exp().gather(1, sampled)[:, 0].numpy()
    request = Request(rollout.problem, rollout.prompt, rollout.step, 0)
    u = uniforms(request, rollout.sample, rollout.sampling.max_completion_length)[: len(sampled)]
    assert ((below - 1e-5 <= u) & (u <= above + 1e-5)).all()


# The distribution.


def test_a_uniform_grid_draws_every_token_as_often_as_its_probability() -> None:
    probs = torch.tensor([0.0, 1 / 8, 1 / 2, 0.0, 1 / 4, 1 / 8, 0.0])
    grid = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    drawn, logp = draw(probs.log().expand(64, -1), grid)
    assert torch.bincount(drawn, minlength=7).tolist() == [0, 8, 32, 0, 16, 8, 0]
    torch.testing.assert_close(logp, probs.log()[drawn])
    assert drawn.tolist() == sorted(drawn.tolist())  # inverse transform: a larger number, a later token


@pytest.mark.parametrize("vocabulary", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_blocks_of_a_large_vocabulary_lose_no_tokens_share(vocabulary: int) -> None:
    logits = 3 * torch.randn(vocabulary)
    logits[torch.randperm(vocabulary)[: vocabulary // 3]] = float("-inf")
    count = 20_011
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.cat([draw(logits.expand(len(part), -1), part)[0] for part in grid.split(2000)])
    found = torch.bincount(drawn, minlength=vocabulary).double()
    expected = logits.double().softmax(-1) * count
    assert (found - expected).abs().max() < 1.05  # a grid is off by one at most
    assert bool((found[expected == 0] == 0).all())
    equal, _ = draw(torch.zeros(vocabulary).expand(vocabulary, -1),
                    (torch.arange(vocabulary, dtype=torch.float64) + 0.5) / vocabulary)
    assert equal.tolist() == list(range(vocabulary))


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_of_any_mass() -> None:
    for vocabulary in (5, BLOCK, 3 * BLOCK + 7):
        for first, last in [(0, vocabulary - 1), (1, vocabulary - 3), (2, 2)]:
            for seed in range(20):
                generator = torch.Generator().manual_seed(seed)
                logits = torch.full((vocabulary,), float("-inf"))
                logits[first : last + 1] = 4 * torch.randn(last + 1 - first, generator=generator)
                drawn, logp = draw(logits.expand(2, -1), torch.tensor([0.0, LAST], dtype=torch.float64))
                assert drawn.tolist() == [first, last]
                assert bool(torch.isfinite(logp).all())


def test_a_row_is_drawn_from_its_own_logits_and_number_alone() -> None:
    logits, uniform = 3 * torch.randn(9, 700), torch.rand(9, dtype=torch.float64)
    together, _ = draw(logits, uniform)
    assert together.tolist() == [draw(logits[i : i + 1], uniform[i : i + 1])[0].item() for i in range(9)]


def test_truncation_by_hand() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.05, 0.6, 0.1]])

    def kept(top_k: int | None, top_p: float) -> list[list[int]]:
        out = truncate(probs.log(), top_k, top_p)
        inside = torch.isfinite(out)
        torch.testing.assert_close(out[inside], probs.log()[inside])
        return [row.nonzero()[:, 0].tolist() for row in inside]

    assert kept(None, 1.0) == kept(4, 1.0) == kept(9, 1.0) == [[0, 1, 2, 3]] * 2
    assert kept(2, 1.0) == [[1, 3], [0, 2]]
    assert kept(1, 1.0) == [[1], [2]]
    assert kept(None, 0.35) == [[1], [2]]  # the first token of all is always kept
    assert kept(None, 0.65) == [[1, 3], [0, 2]]
    assert kept(None, 0.8) == [[1, 2, 3], [0, 2]]
    assert kept(None, 0.95) == [[0, 1, 2, 3], [0, 2, 3]]
    assert kept(3, 0.8) == [[1, 2, 3], [0, 2]]  # of the mass that top_k leaves: .4 + .3 of .9; .6 + .25 of .95
    assert kept(2, 0.5) == [[1], [2]]  # .4 of .7 is enough
    assert kept(2, 0.6) == [[1, 3], [2]]


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_temperature_zero_takes_the_likeliest_token_and_records_its_log_prob(layout: str) -> None:
    model = families.llama()
    sampling = Sampling(temperature=0.0, top_p=0.5, top_k=2, max_completion_length=6)
    found = engine(model, layout=layout).sample(requests(), 2, sampling)
    assert len(found) == 6 and all(len(rollout.token_ids) == 6 for rollout in found)
    for rollout in found:
        logits = training_logits(model, rollout)
        assert tuple(logits.argmax(-1).tolist()) == rollout.token_ids
        expected = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(rollout.logp_sampler), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValidationError, match="temperature"):
        RolloutConfig(temperature=0)  # log-probs of an argmax are no policy to train


def test_uniforms_are_those_of_their_key_alone() -> None:
    request = requests()[0]
    base = uniforms(request, 0, 50)
    assert base.dtype == np.float64 and ((base >= 0) & (base < 1)).all()
    assert (uniforms(request, 0, 20) == base[:20]).all()
    others = [uniforms(request, 1, 50), uniforms(dataclasses.replace(request, step=1), 0, 50),
              uniforms(dataclasses.replace(request, seed=1), 0, 50), uniforms(requests()[1], 0, 50)]
    for other in others:
        assert not np.isclose(base, other).any()
    many = np.concatenate([uniforms(request, sample, 100) for sample in range(200)])
    assert np.abs(np.bincount((many * 10).astype(int), minlength=10) - 2000).max() < 5 * np.sqrt(1800)


# The engine against the model.


@pytest.mark.parametrize("family", families.SUPPORTED)
def test_tokens_and_log_probs_are_those_of_the_models_own_forward(family: str) -> None:
    model = families.SUPPORTED[family]()
    rollouts = engine(model).sample(requests(), 3, Sampling(max_completion_length=40))
    assert [(r.problem.id, r.sample) for r in rollouts] == [(q.problem.id, i) for q in requests() for i in range(3)]
    for rollout in rollouts:
        assert len(rollout.token_ids) == 40 and rollout.finish == "length"
        assert_drawn_from(training_logits(model, rollout), rollout)


@pytest.mark.parametrize("window", [1, 3, 26, 30, 200])  # within, around and beyond prompt and response
def test_sliding_windows_of_every_length_are_decoded_right(window: int) -> None:
    model = families.gemma3(sliding_window=window)
    for rollout in engine(model).sample(requests(), 2, Sampling(max_completion_length=12)):
        assert_drawn_from(training_logits(model, rollout), rollout)


def test_a_long_response_outgrows_its_buffer_twice() -> None:
    model = families.smollm()
    for rollout in engine(model).sample(requests(PROMPTS[:1]), 2, Sampling(max_completion_length=80)):
        assert len(rollout.token_ids) == 80
        assert_drawn_from(training_logits(model, rollout), rollout)


@pytest.mark.parametrize("family", families.UNSUPPORTED)
def test_the_fallback_decoder_is_right_where_the_segmented_one_cannot_serve(family: str) -> None:
    model = families.UNSUPPORTED[family]()
    for rollout in engine(model, layout="plain").sample(requests(), 2, Sampling(max_completion_length=10)):
        assert_drawn_from(training_logits(model, rollout), rollout)


def test_both_decoders_draw_the_same_tokens() -> None:
    model, sampling = families.llama(), Sampling(max_completion_length=40)
    stop_ids = range(3, 12)
    shared, plain = (engine(model, stop_ids, layout=layout).sample(requests(), 4, sampling)
                     for layout in ("shared", "plain"))
    assert len({len(rollout.token_ids) for rollout in shared}) > 3  # they end at different times
    for one, other in zip(shared, plain, strict=True):
        assert dataclasses.replace(one, logp_sampler=()) == dataclasses.replace(other, logp_sampler=())
        assert one.logp_sampler == pytest.approx(other.logp_sampler, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_the_logits_and_is_in_the_recorded_log_probs(temperature: float) -> None:
    model = families.llama()
    sampling = Sampling(temperature=temperature, max_completion_length=10)
    for rollout in engine(model).sample(requests(), 2, sampling):
        assert rollout.sampling == sampling
        assert_drawn_from(training_logits(model, rollout) / temperature, rollout)


def test_recorded_log_probs_are_of_the_truncated_distribution() -> None:
    model = families.llama()
    for rollout in engine(model).sample(requests(), 2, Sampling(top_k=3, max_completion_length=10)):
        logits = training_logits(model, rollout)
        top = logits.topk(3).values[:, -1:]
        assert_drawn_from(logits.masked_fill(logits < top, float("-inf")), rollout)


def test_results_do_not_depend_on_the_company() -> None:
    model, sampling = families.llama(), Sampling(max_completion_length=20)
    stop_ids = range(3, 9)
    expected = tokens(engine(model, stop_ids).sample(requests(), 4, sampling))
    assert len(set(expected.values())) == 12
    for max_rows in (1, 5, 8):
        assert tokens(engine(model, stop_ids, max_rows).sample(requests(), 4, sampling)) == expected
    assert tokens(engine(model, stop_ids).sample(requests()[::-1], 4, sampling)) == expected
    alone = {}
    for request in requests():
        alone |= tokens(engine(model, stop_ids).sample([request], 4, sampling))
    assert alone == expected
    fewer = tokens(engine(model, stop_ids).sample(requests(), 2, sampling))
    assert fewer == {key: value for key, value in expected.items() if key[1] < 2}
    strangers = requests([(9, 8, 7), *PROMPTS, tuple(range(50, 120))])
    beside = tokens(engine(model, stop_ids).sample(strangers, 4, sampling))
    assert {key: beside[key] for key in expected} == expected


def test_problems_with_the_same_prompt_share_it_and_keep_their_own_randomness() -> None:
    model, sampling = families.llama(), Sampling(max_completion_length=12)
    twins = [Request(Problem(name, "?"), Prompt(PROMPTS[0]), 0, 0) for name in "abc"]
    among = [twins[0], requests()[1], *twins[1:]]
    rollouts = engine(model).sample(among, 2, sampling)
    assert [rollout.problem for rollout in rollouts] == [request.problem for request in among for _ in range(2)]
    assert len({rollout.token_ids for rollout in rollouts}) == 8
    for rollout in rollouts:
        assert_drawn_from(training_logits(model, rollout), rollout)


def test_seed_step_and_sample_each_change_the_tokens_and_nothing_else_does() -> None:
    model, sampling = families.llama(), Sampling(max_completion_length=12)
    base = tokens(engine(model).sample(requests(), 3, sampling))
    torch.manual_seed(99)
    np.random.seed(99)
    assert tokens(engine(model).sample(requests(), 3, sampling)) == base
    for other in (requests(seed=1), requests(step=1)):
        found = tokens(engine(model).sample(other, 3, sampling))
        assert all(found[key] != base[key] for key in base)
    assert len(set(base.values())) == 9


def test_rows_that_finish_change_nothing_for_those_that_go_on() -> None:
    model, sampling = families.gemma3(), Sampling(max_completion_length=40)
    free = engine(model).sample(requests(), 8, sampling)
    # Tokens that end the whole first group early, and some rows of the others at any time.
    stop_ids = {rollout.token_ids[2] for rollout in free[:8]}
    stopped = engine(model, stop_ids).sample(requests(), 8, sampling)
    lengths = []
    for one, other in zip(free, stopped, strict=True):
        end = next((i + 1 for i, token in enumerate(one.token_ids) if token in stop_ids), 40)
        lengths.append(end)
        assert other.token_ids == one.token_ids[:end]
        assert other.logp_sampler == pytest.approx(one.logp_sampler[:end], abs=1e-5)
        assert other.finish == ("stop" if one.token_ids[end - 1] in stop_ids else "length")
    assert max(lengths[:8]) <= 3 and max(lengths) == 40 and len(set(lengths)) > 5


def test_finished_rows_are_not_computed_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = families.llama(), Sampling(max_completion_length=30)
    sampler = engine(model, range(3, 60))
    computed: list[int] = []
    right = sampler.backbone.run
    monkeypatch.setattr(sampler.backbone, "run",
                        lambda ids, *rest, **named: computed.append(len(ids)) or right(ids, *rest, **named))
    rollouts = sampler.sample(requests(), 8, sampling)
    needed = sum(len(rollout.token_ids) - 1 for rollout in rollouts)
    assert sum(computed[1:]) <= 1.25 * needed  # the first pass is that of the prompts
    assert computed[0] == len(HEAD) + sum(len(prompt) - len(HEAD) for prompt in PROMPTS)


def test_sampling_leaves_the_student_in_its_mode_and_without_dropout() -> None:
    model, sampling = families.llama(attention_dropout=0.5), Sampling(max_completion_length=8)
    for layout in ("shared", "plain"):
        expected = tokens(engine(model.eval(), layout=layout).sample(requests(), 2, sampling))
        model.train()
        assert tokens(engine(model, layout=layout).sample(requests(), 2, sampling)) == expected
        assert all(module.training for module in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_engine_hands_out_batches_stamped_with_the_version_and_can_be_closed() -> None:
    sampler = engine(families.llama(), max_rows=7)
    sampling = Sampling(max_completion_length=3)
    assert sampler.poll() == []
    sampler.sync((), 4)
    sampler.submit(requests(step=2), 3, sampling)
    first, second = sampler.poll(), sampler.poll()
    assert (len(first), len(second), sampler.poll()) == (6, 3, [])  # whole groups, as many as fit
    assert {(r.version, r.step) for r in [*first, *second]} == {(4, 2)}
    sampler.submit(requests(), 9, sampling)
    assert [len(sampler.poll()) for _ in range(4)] == [7, 7, 7, 6]  # groups larger than a batch are cut
    sampler.submit(requests(), 3, sampling)
    sampler.close()
    assert sampler.poll() == []


# Where a response ends.


class Recited:
    """A model that says one thing after each prompt, which is the number of what it says."""

    layout = "plain"
    device = torch.device("cpu")

    def __init__(self, *said: Ids) -> None:
        self.said = said

    def decoding(self) -> Any:
        return nullcontext()

    def step(self, token_ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        line, at = (self.said[int(token_ids[0, 0])], 0) if past is None else past
        return torch.nn.functional.one_hot(torch.tensor([line[at]] * len(token_ids)), 320).float(), (line, at + 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.log()


def spelt(text: str) -> Ids:
    """One token per byte, as no tokenizer would write it: every stop string spans tokens."""
    return tuple(TOKENIZER.convert_tokens_to_ids(c) for c in "".join(
        piece for piece, _ in TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)))


def recite(said: Ids, stop: tuple[str, ...] = (), stop_ids: Iterable[int] = (3,), most: int = 60) -> Rollout:
    model: Any = Recited(said)
    sampler = TransformersEngine(model, TOKENIZER, stop_ids)
    rollouts = sampler.sample(requests([(0,)]), 2, Sampling(max_completion_length=min(most, len(said)), stop=stop))
    assert rollouts[0].token_ids == rollouts[1].token_ids and rollouts[0].text == rollouts[1].text
    return rollouts[0]


def test_text_ends_before_a_stop_token_special_or_not() -> None:
    said = (*spelt("so 4"), 3, *spelt("more"))
    found = recite(said)
    assert (found.token_ids, found.text, found.finish) == (said[:5], "so 4", "stop")
    newline = spelt("\n")[0]
    found = recite(spelt("so 4\nmore"), stop_ids=[newline])
    assert (found.token_ids, found.text, found.finish) == (spelt("so 4\n"), "so 4", "stop")
    found = recite((3, *spelt("more")))
    assert (found.token_ids, found.text, found.finish) == ((3,), "", "stop")


@pytest.mark.parametrize(
    ("said", "stop", "ends"),
    [
        ("the answer.\nQuestion", ("\n",), ("the answer.\n", "the answer.")),
        ("x = 4 END of it", ("END",), ("x = 4 END", "x = 4 ")),  # over three tokens
        ("ENND END", ("END",), ("ENND END", "ENND ")),
        ("\nand so on", ("\n",), ("\n", "")),  # at the first token: no text
        ("a stop b", ("b", "st"), ("a st", "a ")),  # whichever comes first
        ("abcd", ("bcd", "cd"), ("abcd", "a")),  # two at once: the longer
        ("das heißt é nichts", ("é",), ("das heißt é", "das heißt ")),  # one character over two tokens
        ("an end of thirty characters: " * 2, ("an end of thirty characters: a",),
         ("an end of thirty characters: a", "")),  # a long one
    ],
)
def test_text_ends_before_a_stop_string_and_its_tokens_are_kept(said: str, stop: tuple[str, ...],
                                                                ends: tuple[str, str]) -> None:
    found = recite(spelt(said), stop)
    assert (found.token_ids, found.text, found.finish) == (spelt(ends[0]), ends[1], "stop")
    assert len(found.logp_sampler) == len(found.token_ids)


def test_a_stop_string_inside_or_across_whole_tokens_is_found() -> None:
    said = tuple(TOKENIZER("Answer: 11\n\nQuestion: 3", add_special_tokens=False)["input_ids"])
    pieces = [TOKENIZER.decode([token]) for token in said]
    assert "Answer" in pieces[0]  # the tokenizer has words
    assert recite(said, ("swer",)).token_ids == said[:1] and recite(said, ("swer",)).text == "An"
    across = "".join(pieces[:3])[-len(pieces[2]) - 2 :]
    found = recite(said, (across,))
    assert found.token_ids == said[:3] and found.text == "".join(pieces[:3])[: -len(across)]


def test_a_response_that_does_not_end_is_cut_at_the_limit_and_says_so() -> None:
    found = recite(spelt("on and on"), ("END",), most=5)
    assert (found.token_ids, found.text, found.finish) == (spelt("on an"), "on an", "length")
    found = recite(spelt("on E"), ("EN",))
    assert (found.text, found.finish) == ("on E", "length")
    found = recite(spelt("on\n"), ("\n",), most=3)  # an end at the very limit is an end
    assert (found.text, found.finish) == ("on", "stop")
    found = recite((*spelt("a"), 1, *spelt("b")))  # special tokens are no text
    assert (found.text, found.finish) == ("ab", "length")


def test_the_section_becomes_the_sampling_that_rollouts_record() -> None:
    config = RolloutConfig(max_completion_length=9, temperature=0.5, top_p=0.9, top_k=4, stop=("\n",))
    assert config.sampling() == Sampling(0.5, 0.9, 4, 9, ("\n",))


# Another engine.


class ScriptedEngine:
    """Answers from a table: an engine without a model, one request at a time."""

    def __init__(self, table: Mapping[str, Sequence[str]]) -> None:
        self.table, self.version = table, 0
        self.queue: list[tuple[Request, int, Sampling]] = []

    def submit(self, requests: Sequence[Request], n: int, sampling: Sampling) -> None:
        self.queue += [(request, n, sampling) for request in requests]

    def poll(self) -> list[Rollout]:
        if not self.queue:
            return []
        request, n, sampling = self.queue.pop(0)
        texts = self.table[request.problem.id]
        said = [texts[i % len(texts)] for i in range(n)]
        return [Rollout(request.problem, i, request.prompt, spelt(text), (0.0,) * len(spelt(text)), text, "stop",
                        sampling, self.version, request.step) for i, text in enumerate(said)]

    def sample(self, requests: Sequence[Request], n: int, sampling: Sampling) -> list[Rollout]:
        self.submit(requests, n, sampling)
        return [rollout for _ in requests for rollout in self.poll()]

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    def close(self) -> None:
        self.queue.clear()


def test_another_engine_takes_the_built_in_ones_place() -> None:
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public == {"submit", "poll", "sample", "sync", "close"}
    assert all(callable(getattr(TransformersEngine, name)) for name in public)
    other: Engine = ScriptedEngine({"a": ["it is 4", "it is 5"], "b": ["seven: 7", "no idea"]})
    asked = [Request(Problem("a", "2 + 2?", "4"), Prompt((5,)), 3, 0),
             Request(Problem("b", "3 + 4?", "7"), Prompt((6,)), 3, 0)]
    other.sync((), 3)
    with Rewarder(RewardConfig.parse("numeric").model_copy(update={"workers": 1})) as rewarder:
        ground: Any = SimpleNamespace(rewarder=rewarder)
        rollouts, verdicts = sample_and_verify(ground, other, asked, 3, Sampling())
    assert [(r.problem.id, r.sample, r.version) for r in rollouts] == [(p, i, 3) for p in "ab" for i in range(3)]
    assert [v.score for v in verdicts] == [1, 0, 1, 1, 0, 1]
    assert verdicts[4].status == "unparsed"
    without: Any = SimpleNamespace(rewarder=None)
    rollouts, verdicts = sample_and_verify(without, other, asked, 2, Sampling())
    assert len(rollouts) == 4 and [v.score for v in verdicts] == [None] * 4
