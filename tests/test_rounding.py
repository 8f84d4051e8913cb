"""Rounding at random against its closed form: the two neighbours, and no bias."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from own import make_home, recipe_of
from selftaught.assemble import assemble, lay_ground
from selftaught.errors import UserError
from selftaught.forecast import forecast
from selftaught.optim import OptimConfig, Optimizer, rounding
from selftaught.optim.rounding import generator, rounded_at_random
from selftaught.run import load_run

CPU = torch.device("cpu")
STANDARD_ERRORS = 5


def config(**fields: object) -> OptimConfig:
    given = {"steps": 100, "learning_rate": 1e-4, "max_grad_norm": None, "dtype": "bfloat16", "master": "stochastic"}
    return OptimConfig(**(given | fields))  # type: ignore[arg-type]


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to float32 ones, below and above; both are x where bfloat16 holds x."""
    near = x.bfloat16()
    other = torch.where(near.float() == x, near, torch.nextafter(near, torch.sign(x - near.float()).bfloat16() * 3e38))
    return torch.minimum(near, other), torch.maximum(near, other)


def numbers(count: int) -> Tensor:
    """Of both signs and all magnitudes, none of which bfloat16 holds."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=random) * 10.0 ** torch.randint(-30, 30, (count,), generator=random)
    return torch.where(x.bfloat16().float() == x, x * 1.001, x)


def test_a_number_becomes_one_of_its_two_neighbours_and_both_occur() -> None:
    x = numbers(20_000)
    below, above = neighbours(x)
    rounded = rounded_at_random(x, generator(0, 0, "w", CPU))
    assert rounded.dtype == torch.bfloat16
    assert (below.float() < x).all() and (x < above.float()).all()
    up = rounded == above
    assert (up | (rounded == below)).all() and 0.45 < up.double().mean() < 0.55


def test_what_bfloat16_holds_stays() -> None:
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, torch.finfo(torch.bfloat16).max])
    held = torch.cat([numbers(1000).bfloat16().float(), ends])
    for update in range(20):
        rounded = rounded_at_random(held, generator(0, update, "w", CPU)).float()
        assert rounded.view(torch.int32).equal(held.view(torch.int32))


def test_the_mean_is_the_number_within_its_standard_error_and_the_odds_are_the_share_of_the_way() -> None:
    x, draws = numbers(50), 40_000
    below, above = (n.double() for n in neighbours(x))
    share = (x.double() - below) / (above - below)
    rounded = rounded_at_random(x.expand(draws, -1).contiguous(), generator(1, 0, "w", CPU)).double()
    error = (above - below) * (share * (1 - share) / draws).sqrt()
    assert ((rounded.mean(0) - x.double()).abs() <= STANDARD_ERRORS * error).all()
    nearest = x.bfloat16().double() - x.double()
    assert (nearest.abs() > STANDARD_ERRORS * error).double().mean() > 0.9  # the test would see the nearest


def test_updates_below_half_an_ulp_are_not_lost_on_average() -> None:
    """A gradient of 1 moves every weight by the learning rate a step: 1 - n lr; each step adds p (1 - p) ulp^2."""
    count, steps, rate, ulp = 4096, 100, 1e-4, 2.0**-8
    weight = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], config())
    for step in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step(step)
        optimizer.zero_grad()
    p = rate / ulp
    error = ulp * math.sqrt(steps * p * (1 - p) / count)
    found = weight.detach().double()
    assert abs(found.mean().item() - (1 - steps * rate)) < STANDARD_ERRORS * error
    assert found.std().item() == pytest.approx(ulp * math.sqrt(steps * p * (1 - p)), rel=0.1)


def test_an_update_is_that_of_float32_adamw_rounded_to_a_neighbour() -> None:
    """Decay, clipping, moments and the count of updates are those of torch's own AdamW on float32 weights."""
    start, random = torch.randn(64, 33, generator=torch.Generator().manual_seed(2)).bfloat16(), torch.Generator()
    c = config(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer, reference = Optimizer([("w", narrow)], c), torch.optim.AdamW([wide], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        random.manual_seed(step)
        grad = torch.randn(start.shape, generator=random)
        with torch.no_grad():
            wide.copy_(narrow)  # from where the rounded weight stands
        narrow.grad = grad.bfloat16()
        wide.grad = grad.bfloat16().float()
        nn.utils.clip_grad_norm_([wide], 0.5)
        optimizer.step(step)
        optimizer.zero_grad()
        reference.step()
        exact, found = wide.detach(), narrow.detach().float()
        ulp = 2.0 ** (exact.abs().log2().floor() - 7)
        assert ((found - exact).abs() < ulp * (1 + 1e-4)).all()
        gap = (found - exact) / ulp
        assert abs(gap.mean().item()) < STANDARD_ERRORS * 0.5 / math.sqrt(gap.numel())
        held = optimizer.state_tensors()
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(held[f"{key}/w"], reference.state[wide][key], rtol=1e-5, atol=1e-9)
        assert held["step/w"].item() == step + 1


def test_block_by_block_the_update_is_the_same_but_for_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for block in (rounding.CPU_BLOCK, 7 * 5):
        monkeypatch.setattr(rounding, "CPU_BLOCK", block)
        weight, scalar = (nn.Parameter(torch.full(shape, 0.75, dtype=torch.bfloat16)) for shape in ((23, 5), ()))
        optimizer = Optimizer([("w", weight), ("s", scalar)], config(learning_rate=2.0**-8))
        for step in range(2):
            weight.grad = torch.arange(115).reshape(23, 5).bfloat16() + 1
            scalar.grad = torch.ones_like(scalar)
            optimizer.step(step)
            optimizer.zero_grad()
        found.append(optimizer.state_tensors())
        below = torch.tensor(0.75 - 4 * 2.0**-8)
        assert ((weight < 0.75) & (weight > below)).all() and below < scalar < 0.75
    assert found[0].keys() == found[1].keys() == {f"{key}/{n}" for key in ("step", "exp_avg", "exp_avg_sq")
                                                   for n in ("w", "s")}
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-6, atol=0)
    assert found[1]["step/w"].item() == 2


def moved(names: list[str], seed: int = 0, start: int = 0) -> dict[str, Tensor]:
    """Weights of 0.75 after an update of 1e-4."""
    weights = {name: nn.Parameter(torch.full((500,), 0.75, dtype=torch.bfloat16)) for name in names}
    optimizer = Optimizer(weights.items(), config(learning_rate=1e-3), seed)
    optimizer.load({}, {"skipped": 0, "applied": start})
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step(0)
    return {name: weight.detach() for name, weight in weights.items()}


def test_draws_are_a_function_of_seed_update_and_name_and_of_nothing_else() -> None:
    one = moved(["a", "b"])
    other = moved(["b", "c", "a"])
    assert one["a"].equal(other["a"]) and one["b"].equal(other["b"])
    different = [one["a"], one["b"], moved(["a"], seed=1)["a"], moved(["a"], start=1)["a"]]
    assert not any(x.equal(y) for i, x in enumerate(different) for y in different[:i])


def test_no_weight_is_kept_in_float32() -> None:
    weight = nn.Parameter(torch.ones(1000, 10, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], config())
    assert optimizer.state_tensors() == {}
    assert all(p.untyped_storage().nbytes() == 4 for p in optimizer._updated.values())


def test_master_copies_and_random_rounding_do_not_load_each_others_state() -> None:
    def made(master: str) -> Optimizer:
        optimizer = Optimizer([("w", weight := nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))],
                              config(master=master))
        weight.grad = torch.ones_like(weight)
        optimizer.step(0)
        return optimizer

    with_copy, without = made("float32"), made("stochastic")
    with pytest.raises(UserError, match=r"float32 master copy of 'w'.*stochastic has none"):
        without.load(with_copy.state_tensors(), with_copy.state())
    with pytest.raises(UserError, match="holds no float32 master copy of 'w'"):
        with_copy.load(without.state_tensors(), without.state())


@pytest.mark.parametrize("fields", [{"dtype": "float32"}, {"lora": 4}])
def test_nothing_to_round_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="trained in float32: nothing would be rounded; leave it out"):
        config(**fields)


@pytest.mark.parametrize(("master", "size"), [("float32", 12), ("stochastic", 8)])
def test_the_forecast_counts_what_the_optimiser_keeps(tmp_path: Path, master: str, size: int) -> None:
    tree = recipe_of(make_home(tmp_path), optim={"steps": 1, "dtype": "bfloat16", "master": master})
    ground = lay_ground(load_run(tree), lambda line: None)
    assert ground.rewarder is not None
    ground.rewarder.close()
    optimizer = assemble(ground).optimizer
    for parameter in optimizer._parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0)
    told, kept = forecast(ground), optimizer.state_tensors()
    assert told.bytes["optimiser"] == size * told.parameters == sum(
        t.numel() * t.element_size() for name, t in kept.items() if not name.startswith("step/"))
