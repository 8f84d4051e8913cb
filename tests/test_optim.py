"""AdamW, schedules and teachers against closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from selftaught.errors import UserError
from selftaught.optim import Checkpoints, OptimConfig, Optimizer, Teachers, learning_rate
from selftaught.optim.optimizer import decays
from selftaught.optim.teachers import PIECE
from selftaught.records import View


def config(**fields: object) -> OptimConfig:
    return OptimConfig(**({"steps": 10, "learning_rate": 0.1, "max_grad_norm": None} | fields))  # type: ignore[arg-type]


KINDS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "master": {"dtype": "bfloat16"},
    "stochastic": {"dtype": "bfloat16", "master": "stochastic"},
}
DTYPE = {kind: getattr(torch, fields["dtype"]) for kind, fields in KINDS.items()}


class Tiny(nn.Module):
    """An embedding tied to the head, a norm, a biased layer, and buffers of both sorts."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.mid = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mid(self.embed(tokens)))))


def train(model: Tiny, optimizer: Optimizer, teachers: Teachers | None, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()
        skipped = optimizer.step(step)["skipped"] == 1
        if teachers:
            teachers.update(step, skipped)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_rises_in_equal_steps_to_the_peak_and_never_starts_at_zero(schedule: str) -> None:
    c = config(steps=12, warmup_steps=4, schedule=schedule, learning_rate=0.8)
    assert [learning_rate(c, s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_decay_follows_its_closed_form_from_the_peak_to_the_floor() -> None:
    linear = config(steps=12, warmup_steps=4, schedule="linear", learning_rate=1.0, min_lr_ratio=0.2)
    cosine = config(steps=12, warmup_steps=4, schedule="cosine", learning_rate=1.0, min_lr_ratio=0.2)
    for step in range(4, 12):
        x = (step - 4) / 8
        assert learning_rate(linear, step) == pytest.approx(1.0 - 0.8 * x)
        assert learning_rate(cosine, step) == pytest.approx(0.2 + 0.8 * math.cos(math.pi * x / 2) ** 2)
    assert learning_rate(linear, 8) == pytest.approx(0.6) == learning_rate(cosine, 8)
    for c in (linear, cosine):
        assert learning_rate(c, 12) == pytest.approx(0.2)
        assert learning_rate(c, 1000) == pytest.approx(0.2)


def test_without_warmup_the_first_step_has_the_peak_and_a_constant_rate_stays() -> None:
    for schedule in ("constant", "cosine", "linear"):
        assert learning_rate(config(schedule=schedule), 0) == 0.1
    assert learning_rate(config(min_lr_ratio=0.5), 9) == 0.1


def test_warmup_may_last_the_whole_run() -> None:
    c = config(steps=3, warmup_steps=3, schedule="cosine", learning_rate=0.3)
    assert [learning_rate(c, s) for s in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "below 1, not 1.0"),
        ({"warmup_steps": 11}, "more than the run's 10 steps"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"schedule": "cos"}, "schedule"),
        ({"lr": 0.1}, "lr"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**fields)


# --- the optimiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_equals_its_equations_over_several_steps(dtype: torch.dtype) -> None:
    c = config(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, schedule="linear", warmup_steps=2)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, dtype=dtype))
    theta, m, v = weight.detach().double().clone(), 0.0, 0.0
    optimizer = Optimizer([("w", weight)], c)
    for step in range(8):
        g = torch.randn(3, 4, dtype=dtype)
        weight.grad = g.clone()
        optimizer.step(step)
        rate, t = learning_rate(c, step), step + 1
        m, v = 0.8 * m + 0.2 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        theta = theta * (1 - rate * 0.3)
        theta = theta - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach().double(), theta, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


def test_matrices_and_embeddings_decay_and_vectors_biases_and_norms_do_not() -> None:
    model = Tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model.named_parameters(), config(weight_decay=0.5, learning_rate=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0)
    for name, p in model.named_parameters():
        factor = 0.95 if name in ("embed.weight", "mid.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


def test_a_bias_or_a_norm_with_two_axes_does_not_decay() -> None:
    matrix = torch.zeros(2, 3)
    assert not decays("layers.0.experts.down_proj_bias", matrix)
    assert not decays("layers.0.post_attention_layernorm.weight", matrix)
    assert decays("layers.0.norm_mixer.proj.weight", matrix)
    assert not decays("layers.0.attention.sinks", torch.zeros(2))


def test_a_tied_parameter_is_counted_once_in_norm_and_state() -> None:
    model = Tiny()
    both = list(model.named_parameters(remove_duplicate=False))
    assert len(both) == len(list(model.parameters())) + 1
    optimizer = Optimizer(both, config())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.embed.weight.grad[0, 0] = 3.0
    assert optimizer.step(0)["grad_norm"] == 3.0
    assert "exp_avg/embed.weight" in optimizer.state_tensors()
    assert not [name for name in optimizer.state_tensors() if "head" in name]


def test_moments_lie_in_one_block_and_a_parameter_without_a_gradient_has_none() -> None:
    model = Tiny()
    optimizer = Optimizer(model.named_parameters(), config())
    model.mid(torch.ones(1, 4)).sum().backward()
    optimizer.step(0)
    state = optimizer.state_tensors()
    assert {key.split("/")[1] for key in state} == {"mid.weight", "mid.bias"}
    assert len({t.untyped_storage().data_ptr() for key, t in state.items() if not key.startswith("step/")}) == 1
    torch.testing.assert_close(state["exp_avg/mid.bias"], torch.full((4,), 0.1))


def test_frozen_parameters_are_left_out_and_a_model_without_others_is_refused() -> None:
    model = Tiny()
    model.embed.requires_grad_(False)
    optimizer = Optimizer(model.named_parameters(), config(weight_decay=0.5))
    before = model.embed.weight.detach().clone()
    train(model, optimizer, None, range(2))
    assert torch.equal(model.embed.weight, before)
    with pytest.raises(UserError, match="trainable"):
        Optimizer([("w", nn.Parameter(torch.ones(1), requires_grad=False))], config())


def test_gradients_are_scaled_to_the_norm_and_the_metric_tells_the_norm_before() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    optimizer = Optimizer([("a", a), ("b", b)], config(max_grad_norm=1.0))
    assert optimizer.step(0)["grad_norm"] == pytest.approx(5.0)
    moments = optimizer.state_tensors()
    torch.testing.assert_close(moments["exp_avg/a"], 0.1 * torch.tensor([0.6, 0.0]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments["exp_avg/b"], 0.1 * torch.tensor([0.8]), rtol=1e-5, atol=1e-7)


def test_a_gradient_below_the_norm_is_not_scaled_up() -> None:
    a = nn.Parameter(torch.zeros(1))
    a.grad = torch.tensor([0.25])
    optimizer = Optimizer([("a", a)], config(max_grad_norm=1.0))
    optimizer.step(0)
    assert optimizer.state_tensors()["exp_avg/a"].item() == pytest.approx(0.025)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad: float, kind: str) -> None:
    model = Tiny().to(DTYPE[kind])
    optimizer = Optimizer(model.named_parameters(), config(weight_decay=0.1, max_grad_norm=1.0, **KINDS[kind]))
    teachers = Teachers({"teacher": View("ema", rate=0.5), "reference": View("snapshot", every=1)}, model)
    train(model, optimizer, teachers, range(2))
    everything = dict(model.state_dict()) | optimizer.state_tensors() | teachers.state_tensors()
    before = {name: t.clone() for name, t in everything.items()}
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.mid.bias.grad[1] = bad
    metrics = optimizer.step(2)
    teachers.update(2, skipped=metrics["skipped"] == 1)
    assert metrics["skipped"] == 1 == metrics["skipped_total"] and not math.isfinite(metrics["grad_norm"])
    after = dict(model.state_dict()) | optimizer.state_tensors() | teachers.state_tensors()
    assert optimizer.state().get("applied", 2) == 2
    assert all(torch.equal(after[name], before[name]) for name in before) and before.keys() == after.keys()
    train(model, optimizer, teachers, range(3, 4))
    assert optimizer.step(4)["skipped"] == 0 and optimizer.skipped == 1
    assert optimizer.state_tensors()["step/mid.bias"].item() == 4  # updates done: 0, 1, 3, 4


def test_master_copies_gather_updates_that_bfloat16_alone_would_lose() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], config(steps=100, learning_rate=1e-4))
    alone = torch.ones(4, dtype=torch.bfloat16)
    for step in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step(step)
        optimizer.zero_grad()
        alone -= 1e-4
        if step == 9:
            assert torch.equal(weight.detach(), torch.ones_like(alone))  # still below what bfloat16 can show
    assert torch.equal(alone, torch.ones_like(alone))
    torch.testing.assert_close(optimizer.state_tensors()["master/w"], torch.full((4,), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(weight.detach(), torch.full((4,), 0.99).bfloat16())


@pytest.mark.parametrize("kind", ["master", "stochastic"])
def test_bfloat16_gradients_of_micro_batches_are_summed_in_float32(kind: str) -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], config(**KINDS[kind]))
    (256 * weight).sum().backward()
    for _ in range(8):
        (0.5 * weight).sum().backward()  # 256 + 0.5 is 256 in bfloat16
        assert weight.grad is None
    assert optimizer.step(0)["grad_norm"] == 260.0
    optimizer.zero_grad()
    (2 * weight).sum().backward()
    assert optimizer.step(1)["grad_norm"] == 2.0


def test_a_dropped_optimiser_takes_no_gradients_from_its_successor() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    Optimizer([("w", weight)], config())
    optimizer = Optimizer([("w", weight)], config())
    (2 * weight).sum().backward()
    assert optimizer.step(0)["grad_norm"] == 2.0


def test_a_float32_parameter_is_updated_in_place_without_a_master() -> None:
    model = Tiny()
    optimizer = Optimizer(model.named_parameters(), config())
    train(model, optimizer, None, range(1))
    names = [n for n, _ in model.named_parameters()]
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert sorted(optimizer.state_tensors()) == sorted(f"{k}/{n}" for n in names for k in kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_twice_gives_the_same_bits(kind: str) -> None:
    ends = []
    for _ in range(2):
        model = Tiny().to(DTYPE[kind])
        train(model, Optimizer(model.named_parameters(), config(max_grad_norm=0.1, **KINDS[kind])), None, range(5))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_then_load_then_five_equal_ten_bit_for_bit(kind: str, disk: bool, tmp_path: Path) -> None:
    views = {"teacher": View("ema", rate=0.1), "reference": View("initial"), "old": View("snapshot", every=3)}
    c = config(schedule="cosine", warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5, **KINDS[kind])

    def fresh(seed: int) -> tuple[Tiny, Optimizer, Teachers]:
        model = Tiny(seed).to(DTYPE[kind])
        return model, Optimizer(model.named_parameters(), c), Teachers(views, model)

    whole = fresh(0)
    train(*whole, range(10))
    first = fresh(0)
    train(*first, range(5))
    second = fresh(1)  # other weights: everything must come from the state
    tensors: Any = {
        "model": {n: p.detach() for n, p in first[0].named_parameters()},
        "optimizer": first[1].state_tensors(),
        "teachers": first[2].state_tensors(),
    }
    state: Any = {"optimizer": first[1].state(), "teachers": first[2].state()}
    if disk:
        Checkpoints(tmp_path, 1).save(5, tensors, state)
        tensors, state = Checkpoints(tmp_path, 1).load(5)
    second[0].load_state_dict(tensors["model"], strict=False)
    second[1].load(tensors["optimizer"], state["optimizer"])
    second[2].load(tensors["teachers"], state["teachers"])
    train(*first, range(5, 10))  # the loaded one shares no memory with the one it came from
    train(*second, range(5, 10))
    left, right = (
        dict(model.state_dict()) | optimizer.state_tensors() | teachers.state_tensors()
        for model, optimizer, teachers in (whole, second)
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole[2].state() == second[2].state() == {"snapshot": 9}


def test_load_refuses_another_models_state_and_forgets_moments_that_were_not_saved() -> None:
    model = Tiny()
    optimizer = Optimizer(model.named_parameters(), config())
    empty = dict(optimizer.state_tensors())
    train(model, optimizer, None, range(1))
    with pytest.raises(UserError, match=r"exp_avg/mid\.weight.*shape \(4, 5\).*\(4, 4\)"):
        optimizer.load({"exp_avg/mid.weight": torch.zeros(4, 5)}, {"skipped": 0})
    with pytest.raises(UserError, match="no such parameter"):
        optimizer.load({"exp_avg/other": torch.zeros(4)}, {"skipped": 0})
    with pytest.raises(UserError, match="master"):
        Optimizer(Tiny().bfloat16().named_parameters(), config()).load({}, {"skipped": 0})
    assert empty == {}
    optimizer.load(empty, {"skipped": 3})
    assert optimizer.state_tensors() == {} and optimizer.skipped == 3


# --- teachers ---------------------------------------------------------------------------------------------------------


def scalar(dtype: torch.dtype = torch.float64) -> nn.Linear:
    student = nn.Linear(1, 1, bias=False, dtype=dtype)
    put(student, 0.0)
    return student


def put(student: nn.Linear, value: float) -> None:
    with torch.no_grad():
        student.weight.fill_(value)


def read(teachers: Teachers, view: str) -> float:
    weights = teachers.weights(view)
    assert weights is not None
    return weights["weight"].item()


def test_ema_equals_its_closed_form() -> None:
    student, rate, values = scalar(), 0.3, [1.0, -2.0, 0.5, 4.0, 4.0]
    put(student, 7.0)
    teachers = Teachers({"teacher": View("ema", rate=rate)}, student)
    for step, value in enumerate(values):
        put(student, value)
        teachers.update(step)
        n = step + 1
        closed = (1 - rate) ** n * 7.0 + sum(rate * (1 - rate) ** (n - 1 - i) * values[i] for i in range(n))
        assert read(teachers, "teacher") == pytest.approx(closed, abs=1e-13)


def test_snapshot_is_taken_when_every_divides_the_steps_done() -> None:
    student = scalar()
    teachers = Teachers({"teacher": View("snapshot", every=3)}, student)
    seen = []
    for step in range(7):
        put(student, step + 1.0)
        teachers.update(step)
        seen.append(read(teachers, "teacher"))
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_a_snapshot_due_on_a_skipped_step_is_taken_after_the_next() -> None:
    student = scalar()
    teachers = Teachers({"teacher": View("snapshot", every=3)}, student)
    seen = []
    for step in range(7):
        put(student, step + 1.0)
        teachers.update(step, skipped=step == 2)
        seen.append(read(teachers, "teacher"))
    assert seen == [0, 0, 0, 4, 4, 6, 6]


def test_a_loaded_snapshot_waits_for_its_own_time() -> None:
    student, views = scalar(), {"teacher": View("snapshot", every=3)}
    first = Teachers(views, student)
    for step in range(3):
        first.update(step)
    second = Teachers(views, student)
    second.load(first.state_tensors(), first.state())
    put(student, 9.0)
    second.update(3)
    assert read(second, "teacher") == 0.0
    second.update(5)
    assert read(second, "teacher") == 9.0


def test_initial_never_moves_and_live_is_the_student_itself() -> None:
    student = scalar()
    teachers = Teachers({"reference": View("initial"), "teacher": View("live", "privileged")}, student)
    put(student, 5.0)
    teachers.update(0)
    assert read(teachers, "reference") == 0.0
    assert teachers.weights("teacher") is None
    with pytest.raises(AssertionError, match="another model"):
        Teachers({"teacher": View("external")}, student).weights("teacher")


def test_views_of_the_same_weights_share_one_copy_and_others_do_not() -> None:
    views = {
        "teacher": View("ema", "privileged", rate=0.1),
        "reference": View("ema", "plain", rate=0.1),
        "slow": View("ema", rate=0.01),
        "first": View("initial"),
        "start": View("initial", "privileged"),
    }
    student = scalar()
    teachers = Teachers(views, student)
    assert teachers.weights("teacher") is teachers.weights("reference")
    assert teachers.weights("first") is teachers.weights("start")
    assert sorted(teachers.state_tensors()) == ["ema-0.01/weight", "ema-0.1/weight", "initial/weight"]
    put(student, 1.0)
    teachers.update(0)
    assert read(teachers, "teacher") == pytest.approx(0.1) and read(teachers, "slow") == pytest.approx(0.01)


def test_a_teachers_weights_give_the_old_students_output_through_tied_weights_and_buffers() -> None:
    model, tokens = Tiny(), torch.arange(7)
    model.count.fill_(3)
    before = model(tokens).detach()
    teachers = Teachers({"reference": View("initial")}, model)
    weights = teachers.weights("reference")
    assert weights is not None
    assert "embed.weight" in weights and "head.weight" not in weights
    assert "count" in weights and "scratch" not in weights
    train(model, Optimizer(model.named_parameters(), config()), teachers, range(3))
    assert not torch.equal(model(tokens), before)
    assert torch.equal(functional_call(model, dict(weights), (tokens,)), before)
    assert not any(t.requires_grad for t in weights.values())


def test_frozen_parameters_are_not_copied_and_buffers_are_followed_exactly() -> None:
    model = Tiny()
    model.mid.requires_grad_(False)
    teachers = Teachers({"teacher": View("ema", rate=0.25)}, model)
    model.count.fill_(8)
    teachers.update(0)
    weights = teachers.weights("teacher")
    assert weights is not None
    assert "mid.weight" not in weights
    assert weights["count"].item() == 8


def test_the_average_of_a_bfloat16_student_is_kept_in_float32_and_served_in_bfloat16() -> None:
    student = scalar(torch.bfloat16)
    put(student, 1.0)
    teachers = Teachers({"teacher": View("ema", rate=1e-3)}, student)
    put(student, 2.0)
    for step in range(10):
        teachers.update(step)
    weights = teachers.weights("teacher")
    assert weights is not None and weights["weight"].dtype == torch.bfloat16
    exact = 2.0 - 0.999**10
    assert teachers.state_tensors()["ema/weight"].item() == pytest.approx(exact, abs=1e-6)
    assert weights["weight"].item() == torch.tensor(exact).bfloat16().item() != 1.0


def test_distance_is_relative_to_the_students_norm() -> None:
    student = nn.Linear(2, 1, bias=False)
    views = {"reference": View("initial"), "teacher": View("ema", rate=0.5)}
    with torch.no_grad():
        student.weight.copy_(torch.tensor([[3.0, 0.0]]))
    teachers = Teachers(views, student)
    assert set(teachers.distances().values()) == {0.0}
    with torch.no_grad():
        student.weight.copy_(torch.tensor([[3.0, 4.0]]))
    teachers.update(0)
    assert teachers.distances() == pytest.approx({"teacher/initial/distance": 0.8, "teacher/ema/distance": 0.4})


def test_distances_are_found_without_a_tensor_as_large_as_an_embedding() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)]
            made = [x.untyped_storage() for x in tensors]
            self.numbers = max([self.numbers, *(x.nbytes() // 4 for x in made if x.data_ptr() not in given)])
            return out

    student = nn.Linear(2 * PIECE + 5, 1, bias=False)
    teachers = Teachers({"teacher": View("ema", rate=0.5)}, student)
    with torch.no_grad():
        student.weight.normal_(generator=torch.Generator().manual_seed(0))
    kept = teachers.state_tensors()["ema/weight"]
    exact = float((student.weight.detach().double() - kept.double()).norm() / student.weight.detach().double().norm())
    given = {x.untyped_storage().data_ptr() for x in (student.weight, kept)}
    with Largest() as largest:
        found = teachers.distances()
    assert found == {"teacher/ema/distance": pytest.approx(exact, rel=1e-5)}
    assert 0 < largest.numbers <= PIECE


def test_teachers_refuse_wrong_rates_and_another_runs_tensors() -> None:
    student = scalar()
    with pytest.raises(UserError, match="rate"):
        Teachers({"teacher": View("ema", rate=1.5)}, student)
    with pytest.raises(UserError, match="rate"):
        Teachers({"teacher": View("ema")}, student)
    with pytest.raises(UserError, match="every"):
        Teachers({"teacher": View("snapshot", every=0)}, student)
    saved = Teachers({"teacher": View("initial")}, student).state_tensors()
    with pytest.raises(UserError, match="ema/weight"):
        Teachers({"teacher": View("ema", rate=0.5)}, student).load(saved, {})
