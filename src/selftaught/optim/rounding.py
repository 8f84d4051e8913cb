"""AdamW on bfloat16 weights without a float32 copy of them: each result is rounded up or down at random.

Rounded to the nearest, an update below half the distance to the next bfloat16 is lost, at every step anew. Rounded up
with a probability that is the share of the way that it goes, it is right in expectation (Gupta et al.,
arXiv:1502.02551; for bfloat16 weights Zamirai et al., arXiv:2010.06192).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

BLOCK = 2**24  # weights that are float32 at a time: 64 MiB
CPU_BLOCK = 2**20  # as many as caches hold: 7 ns per weight on one core, where 2**24 at a time take 12
_LOST = 16  # bits of a float32 that bfloat16 has not


def stand_in(parameter: Tensor) -> Parameter:
    """What gathers the gradients of `parameter` in float32; itself it takes one number of memory."""
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
def update(parameter: Tensor, grad: Tensor, moments: dict[str, Tensor], random: torch.Generator, *, lr: float,
           betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One AdamW update of a bfloat16 `parameter` by its float32 `grad`, block by block.

    `moments` is what torch's AdamW keeps of a parameter, all in float32; empty before the first update.
    """
    if not moments:
        moments["step"] = torch.zeros((), device=parameter.device)
        moments |= {name: torch.zeros_like(grad, memory_format=torch.contiguous_format)
                    for name in ("exp_avg", "exp_avg_sq")}
    flat = [torch.atleast_1d(t) for t in (parameter.detach(), grad, moments["exp_avg"], moments["exp_avg_sq"])]
    block_size = CPU_BLOCK if parameter.is_cpu else BLOCK
    rows = max(1, block_size * flat[0].shape[0] // max(1, parameter.numel()))
    done = moments["step"]
    for narrow, block, average, square in zip(*(t.split(rows) for t in flat), strict=True):
        wide, done = narrow.float(memory_format=torch.contiguous_format), moments["step"].clone()
        adamw([wide], [block.contiguous()], [average], [square], [], [done], fused=True, amsgrad=False, maximize=False,
              lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        narrow.copy_(rounded_at_random(wide, random))
    moments["step"] = done
