"""AdamW on bfloat16 weights without a float32 copy of them: each result is rounded up or down at random.

Rounded to the nearest, an update below half the distance to the next bfloat16 is lost, at every step anew. Rounded up
with a probability that is the share of the way that it goes, it is right in expectation (Gupta et al.,
arXiv:1502.02551; for bfloat16 weights Zamirai et al., arXiv:2010.06192).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

BLOCK = 2**24  # weights that are float32 at a time: as many as fill 64 MiB
_LOST = 16  # bits of a float32 that bfloat16 has not


def stand_in(parameter: Tensor) -> Parameter:
    """What gathers the gradients of `parameter` in float32 and is the key of its moments; itself one number large."""
    return Parameter(torch.zeros((), device=parameter.device).expand(parameter.shape))


def generator(seed: int, update: int, name: str, device: torch.device) -> torch.Generator:
    """The random numbers of one parameter's rounding: a function of (seed, update, name), and of the kind of device."""
    key = hashlib.blake2b(f"{seed}/{update}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)


def rounded_at_random(wide: Tensor, random: torch.Generator) -> Tensor:
    """A float32 tensor as bfloat16: one of the two neighbours, the nearer one more often, with mean `wide`.

    The bits that are lost are a fraction of the distance between the neighbours, in either sign: added to a number
    drawn from as many, they carry with just that probability. What bfloat16 can hold, infinities too, stays.
    """
    bits = torch.empty_like(wide, dtype=torch.int32).random_(0, 2**_LOST, generator=random)
    return bits.add_(wide.view(torch.int32)).bitwise_and_(-(2**_LOST)).view(torch.float32).bfloat16()


@torch.no_grad()
def update(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: Mapping[str, Any],
           random: torch.Generator) -> None:
    """One AdamW update of a bfloat16 `parameter` by its float32 `grad`, block by block; `state` as torch's AdamW's."""
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
    flat = [torch.atleast_1d(t) for t in (parameter.detach(), grad, state["exp_avg"], state["exp_avg_sq"])]
    rows = max(1, BLOCK * flat[0].shape[0] // max(1, parameter.numel()))
    done = state["step"]
    for narrow, block, average, square in zip(*(t.split(rows) for t in flat), strict=True):
        wide, done = narrow.float(), state["step"].clone()
        adamw([wide], [block], [average], [square], [], [done], fused=True, amsgrad=False, maximize=False,
              lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
              weight_decay=group["weight_decay"])
        narrow.copy_(rounded_at_random(wide, random))
    state["step"] = done
