"""A method of a user's own: found wherever it is, trained like any other, and broken ones named at the first step."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import selftaught
from own import METHOD, cli, lines, make_home, recipe_of, write_recipe
from selftaught import methods
from selftaught.errors import UserError
from selftaught.loss import chunked_loss
from selftaught.methods import Several, batch_credit, build, checked, names
from selftaught.methods import base as methods_base
from selftaught.records import TokenBatch
from selftaught.vocabulary import Head, sampled_log_probs

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_method.py"
V, H = 37, 8
LENGTHS = (6, 1, 5, 2, 4, 7)
N = sum(LENGTHS)


def batch_of(**changes: Any) -> TokenBatch:
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(tokens, ids, torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1]))
    return replace(batch, **changes)


def one_step(method: Any, batch: TokenBatch, *, std: float = 1.0, banned: bool = False,
             same: bool = False) -> tuple[Tensor, Tensor]:
    """The loss of one optimiser batch in chunks of 16 tokens as the trainer takes it, and the student's gradient."""
    draw = torch.Generator().manual_seed(2)
    own = torch.randn(N, H, generator=draw)
    hidden = {"student": own.clone().requires_grad_(),
              **{view: own if same else torch.randn(N, H, generator=draw) for view in method.views}}
    bias = torch.zeros(V)
    if banned:  # a head that bans tokens, which none of the sampled ones is
        bias[[token for token in range(V) if token not in batch.tokens.tolist()][:5]] = -math.inf
    head = Head(torch.randn(V, H, generator=draw) * std / H**0.5, bias)
    heads = dict.fromkeys(hidden, head)
    logp = {}
    for name in sorted({scored.removesuffix(".entropy") for scored in method.scores}):
        logp[name], logp[f"{name}.entropy"] = sampled_log_probs(hidden[name].detach(), head, batch.tokens, entropy=True)
    credit, weight, _ = batch_credit(method, batch, logp, reduction="token_mean", length=None, sampler_cap=None)
    out = chunked_loss(method.loss, hidden, heads, batch.tokens, credit, weight, chunk=16)
    if out.loss.requires_grad:
        out.loss.backward()
    grad = hidden["student"].grad
    return out.token_loss, torch.zeros(N, H) if grad is None else grad


# Methods that keep their contract.

ALL_EQUAL = {"reward": torch.full((6,), 0.5)}
SOME = {"privileged": torch.tensor([True, False, True, False, True, False])}
SITUATIONS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "plain": ({}, {}),
    "some without privilege": (SOME, {}),
    "none with privilege": ({"privileged": torch.zeros(6, dtype=torch.bool)}, {}),
    "dead groups": (ALL_EQUAL, {}),
    "no opinion": ({"reward": torch.full((6,), math.nan)}, {}),
    "off-policy": ({"logp_old": -torch.rand(N, generator=torch.Generator().manual_seed(3)) * 4}, {}),
    "banned tokens": ({}, {"banned": True}),
    "sharp": ({}, {"std": 30.0}),
    "teacher is the student": ({}, {"same": True}),
    "sharp teacher is the student": ({}, {"same": True, "std": 30.0}),
    "masked": ({"mask": torch.arange(N) % 3 > 0}, {}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", [*names(), f"{EXAMPLE}:EntropyGRPO"], ids=lambda name: name.rpartition(":")[2])
def test_a_sound_method_passes_its_first_step_with_the_same_bits(name: str, situation: str) -> None:
    changes, drawn = SITUATIONS[situation]
    watched = checked(build(name))
    for _ in range(2):  # watched, and no longer
        loss, grad = one_step(watched, batch_of(**changes), **drawn)
        plain_loss, plain_grad = one_step(build(name), batch_of(**changes), **drawn)
        assert torch.equal(loss, plain_loss) and torch.equal(grad, plain_grad)


@pytest.mark.parametrize("name", names())
def test_a_step_without_gradient_does_not_end_the_watch(name: str) -> None:
    watched: Any = checked(build(name))
    dead = {**ALL_EQUAL, "privileged": torch.zeros(6, dtype=torch.bool)}
    needs = build(name).needs
    one_step(watched, batch_of(**dead))
    if needs and name != "sdpg":  # opd and gkd need neither reward nor privilege; sdpg's leash holds all the same
        assert not watched._shown
    one_step(watched, batch_of())
    assert watched._shown
    calls = []
    watched._method = Spy(watched._method, calls)
    one_step(watched, batch_of())
    assert calls == ["loss"] * math.ceil(N / 16)


class Spy:
    def __init__(self, method: Any, calls: list[str]) -> None:
        self.method, self.calls = method, calls

    def __getattr__(self, name: str) -> Any:
        if name == "loss":
            self.calls.append(name)
        return getattr(self.method, name)


# Methods that do not.

CREDIT, LOSS = 'return {**base_credit(batch), "weight":', "return TokenLoss(-self.scale * credit[\"weight\"] *"
ROW = "(logp[\"teacher\"] > logp[\"student\"]).to(logp[\"student\"].dtype)}"
LAST = "return TokenLoss(-self.scale * credit[\"weight\"] * student.at_sampled)"
BROKEN = {
    "credit without counted": ("{**base_credit(batch), ", "{", "its credit must return a mapping with `counted`"),
    "credit that is a number": (ROW, "1.0}", "credit['weight'] as a float, not as a tensor (25,)"),
    "credit per rollout": (ROW, "batch.reward}", "credit['weight'] of shape (6,), not (25,), one number per token; "
                           "broadcast(value_B, batch) gives every token"),
    "credit of NaN": (ROW, "batch.reward[batch.sequence_ids] * float('nan')}", "credit['weight'] with NaN at 25 of 25"),
    "credit with gradient": (ROW, "torch.ones(25, requires_grad=True)}", "credit['weight'] with a gradient"),
    "counted of numbers": (ROW, "logp['teacher'], 'counted': logp['teacher']}", "'counted'] as torch.float32; it says"),
    "loss that is a tensor": (LAST, "return -student.at_sampled", "its loss returns a Tensor; return TokenLoss(loss)"),
    "loss that is reduced": (LAST, "return TokenLoss(-student.at_sampled.mean())",
                             "its loss returns a loss of shape (), not (16,), one number per token; leave the mean"),
    "metric that is reduced": (LAST, "return TokenLoss(-student.at_sampled, {'m': credit['weight'].mean()})",
                               "metric 'm' of shape (), not (16,)"),
    "metric of a taken name": (LAST, "return TokenLoss(-student.at_sampled, {'entropy': credit['weight']})",
                               "a metric 'entropy', a name that every method's metrics have"),
    "loss of NaN": (LAST, "return TokenLoss((student.at_sampled - 99).log())", "its loss is NaN at 16 of 16 counted"),
    "loss of infinity": (LAST, "return TokenLoss(-student.at_sampled / (student.tokens != student.tokens[0]))",
                         re.compile(r"its loss is infinite at \d+ of 16 counted tokens")),
    "gradient of NaN": (LAST, "x = student.at_sampled\n        "
                        "return TokenLoss(torch.where(x < -4, x, (x + 4).sqrt()))",
                        "its loss is finite, but its gradient is not, at"),
    "no gradient": (LAST, "return TokenLoss(-student.at_sampled.detach())", "does not depend on the student"),
    "gradient into the teacher": (LAST, "return TokenLoss(views['teacher'].logits.requires_grad_().logsumexp(-1) - "
                                  "student.at_sampled)", "sends gradient into view 'teacher'; only the student"),
    "gradient into its own": (LAST, "return TokenLoss(-student.at_sampled * torch.ones(3, requires_grad=True).sum())",
                              "sends gradient into a tensor of shape (3,); only the student learns"),
    "mean over the chunk": (LAST, "loss = -student.at_sampled\n        return TokenLoss(loss.mean().expand_as(loss))",
                            "its loss depends on the chunk"),
    "whitened by the chunk": (LAST, "loss = -student.at_sampled\n"
                              "        return TokenLoss(loss / loss.detach().abs().max())", "depends on the chunk"),
    "ranked within the chunk": (LAST, "rank = student.at_sampled.argsort().argsort()\n"
                                "        return TokenLoss(-student.at_sampled * rank)", "depends on the chunk"),
    "random": (LAST, "return TokenLoss(-student.at_sampled * torch.rand_like(student.at_sampled))",
               "gives other values for the same tokens when it is called again"),
    "an error inside credit": (ROW, "logp['teachr']}", re.compile(r"its credit raised KeyError: 'teachr' \(.*mine.py, "
                                                                  r"line \d+\)")),
    "an error inside loss": (LAST, "return TokenLoss(1 / 0)", re.compile(r"its loss raised ZeroDivisionError: division "
                                                                         r"by zero \(.*mine.py, line \d+\)")),
}  # fmt: skip


def mine(path: Path, old: str, new: str) -> str:
    """The name of a method in a file, made of `METHOD` with one thing changed."""
    assert METHOD.count(old) == 1
    path.write_text(METHOD.replace(old, new).replace("from torch", "import torch\nfrom torch"))
    return f"{path}:Mine"


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_method_is_named_at_its_first_step(tmp_path: Path, case: str) -> None:
    old, new, words = BROKEN[case]
    method = checked(build(mine(tmp_path / "mine.py", old, new)))
    with pytest.raises(UserError) as caught:
        one_step(method, batch_of())
    message = str(caught.value)
    assert message.startswith("method 'mine': its ") and "\n" not in message
    assert re.search(words, message) if isinstance(words, re.Pattern) else words in message


@pytest.mark.parametrize("step", [1, 2])
def test_metrics_that_come_and_go_between_chunks_are_named_in_every_step(tmp_path: Path, step: int) -> None:
    late = ("names = {'often': credit['weight']} if len(student.tokens) == 16 or student.tokens[0] == 0 else {}\n"
            "        return TokenLoss(-student.at_sampled, names)")
    method = checked(build(mine(tmp_path / "mine.py", LAST, late)))
    if step == 2:
        one_step(method, batch_of(tokens=torch.zeros(N, dtype=torch.int64)))  # a step whose chunks all have it
    with pytest.raises(UserError, match="method 'mine': its loss returns metrics 'often' of one chunk and '' of ano"):
        one_step(method, batch_of(tokens=torch.ones(N, dtype=torch.int64)))


def test_metrics_may_change_from_batch_to_batch(tmp_path: Path) -> None:
    late = ("return TokenLoss(-student.at_sampled, {'often': credit['weight']} if student.tokens[0] == 0 else {})")
    method = checked(build(mine(tmp_path / "mine.py", LAST, late)))
    for token in (1, 0, 1):
        one_step(method, batch_of(tokens=torch.full((N,), token)))


@pytest.mark.parametrize("combine", ["average", "mixture"])
def test_a_broken_method_is_named_with_its_line_also_under_several_teachers(tmp_path: Path, combine: str) -> None:
    method = build(mine(tmp_path / "mine.py", LAST, "return TokenLoss(1 / 0)"))
    with pytest.raises(UserError, match=r"its loss raised ZeroDivisionError: division by zero \(.*mine.py, line \d+"):
        one_step(checked(Several(method, 2, combine)), batch_of(privileges=torch.full((6,), 2)))  # type: ignore


def test_a_shipped_method_under_several_teachers_is_not_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_base.registry()["opsd"], "credit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one_step(checked(Several(build("opsd"), 2, "mixture")), batch_of(privileges=torch.full((6,), 2)))  # type: ignore


def test_a_shipped_methods_error_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_base.registry()["grpo"], "credit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one_step(checked(build("grpo")), batch_of())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("own"))


def test_a_broken_method_ends_the_run_before_anything_is_updated(home: Path) -> None:
    old, new, words = BROKEN["mean over the chunk"]
    path = write_recipe(home, "broken.yaml", out=str(home / "runs" / "broken"), checkpoint={"every": 1},
                        method={"name": mine(home / "broken.py", old, new)})  # fmt: skip
    said = cli("train", path)
    assert said.code == 2 and "Traceback" not in said.err and words in said.err
    assert [row["step"] for row in lines(home / "runs" / "broken" / "metrics.jsonl")] == [0]
    mine(home / "broken.py", "scale: float = 1.0", "scale: float = 2.0")  # mended
    said = cli("train", path, "--resume")
    assert said.code == 0, said.err
    assert [row["step"] for row in lines(home / "runs" / "broken" / "metrics.jsonl")] == [0, 1, 2, 3]


# Where a method may lie.


def test_the_example_trains_and_at_sharpness_0_it_is_grpo(home: Path) -> None:
    quiet = Console(quiet=True)
    mine = {"name": f"{EXAMPLE}:EntropyGRPO"}
    runs = [selftaught.train(recipe_of(home, out=str(home / "runs" / f"example-{number}"), method=method),
                             console=quiet)
            for number, method in enumerate([mine, {**mine, "sharpness": 0.0}, "grpo"])]  # fmt: skip
    sharp, flat, grpo = ([row["grad_norm"] for row in lines(run.folder / "metrics.jsonl")[1:]] for run in runs)
    assert flat == grpo and sharp != grpo and all(norm > 0 for norm in sharp)
    weights = [row["method/weight"] for row in lines(runs[0].folder / "metrics.jsonl")[1:]]
    assert all(weight == pytest.approx(1, abs=0.2) for weight in weights)  # a share: its mean in a rollout is 1


def test_a_method_may_be_a_file_a_module_or_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_users_methods.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(methods_base, "entry_points", lambda group: [
        EntryPoint("theirs", "a_users_methods:Mine", group), EntryPoint("gone", "no_such_module:Mine", group)])
    for name in (f"{tmp_path / 'a_users_methods.py'}:Mine", "a_users_methods:Mine", "theirs"):
        assert build(name, scale=3.0).scale == 3.0  # type: ignore[attr-defined]
        said = cli("methods", name)
        assert said.code == 0 and "loss = -scale log S(y)" in said.out and "scale = 1.0" in said.out
    with pytest.raises(UserError, match=r"'theirz'; did you mean 'theirs'\?"):
        build("theirz")
    with pytest.raises(UserError, match="entry point 'no_such_module:Mine', which cannot be imported: No mod"):
        build("gone")
    sys.modules.pop("a_users_methods", None)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class Mine", "class Mines", "mine.py has no 'Mine'; did you mean 'Mines'?"),
        ("    scale: float = 1.0\n", "    scale: float = 1.0\n\n    def __post_init__(self) -> None:\n        [][0]\n",
         "cannot be made with its fields at their defaults: IndexError: list index"),
        ('    scale: float = 1.0\n', '    scale: float = 1.0\n\n    def __post_init__(self) -> None:\n        '
         'raise ValueError("scale is odd")\n', "with its fields at their defaults: scale is odd"),
        ('frozenset({"privilege"})', 'frozenset({"rewrd"})', "needs names 'rewrd'; did you mean 'reward'?"),
        ('frozenset({"privilege"})', '"privilege"', "needs must be a frozenset of names, not 'privilege'"),
        ('frozenset({"teacher", "student"})', 'frozenset({"techer"})', "scores names 'techer'; did you mean 'teacher'"),
        ('View("live", "privileged")', '"live"', "views must be a mapping of names to View(weights, context)"),
        ('View("live", "privileged")', 'View("alive", "privileged")', None),
        ("def loss(self, student: TokenDist, views: Mapping[str, TokenDist], credit: Credit)",
         "def loss(self, student: TokenDist, credit: Credit)", "it must be loss(self, student, views, credit)"),
    ],
)  # fmt: skip
def test_what_a_file_gets_wrong_is_said_before_a_model_loads(tmp_path: Path, old: str, new: str,
                                                             words: str | None) -> None:
    name = mine(tmp_path / "mine.py", old, new)
    if words is None:  # the recipe's own check knows views
        with pytest.raises(UserError, match="weights = 'alive'; did you mean 'live'"):
            selftaught.train(model="m", data="d", privilege="answer", method=name)
        return
    with pytest.raises(UserError, match=re.escape(words)):
        build(name)


def test_an_unknown_field_of_a_users_method_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no field 'scael'; did you mean 'scale'\?"):
        build(mine(tmp_path / "mine.py", "1.0", "1.0"), scael=2.0)
    with pytest.raises(UserError, match="is no dataclass"):
        (tmp_path / "function.py").write_text("def Mine():\n    pass\n")
        methods.build(f"{tmp_path / 'function.py'}:Mine")
