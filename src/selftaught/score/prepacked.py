"""Linear layers while weights stay as they are, as in decoding: a CPU reads them in its matrix kernel's own order.

A matrix product first copies the weights into that order, piece by piece; with the few rows of a decoding step this
copy is most of the work. oneDNN can do it once for many products. Measured on two cores with AVX-512, in float32,
weights of a 135M model out of memory: 3 rows 35 against 9 GFLOP/s, 16 rows 115 against 65, 64 rows 190 against 130,
256 rows 210 against 175.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PATIENCE = 4  # uses of a weight before it is packed: packing costs as much as a few products of some dozen rows,
MANY = 256  # or as one of so many
ROWS = 1024  # with more rows at once the plain product is as fast


class Prepacked:
    """Products with weights that do not change while this object lives; packs a weight once it was used often enough.

    The packed copies take as much memory as the weights.
    """

    def __init__(self) -> None:
        self._uses: dict[tuple[int, torch.Size], int] = {}  # by where a weight lies: a slice of it is anew each time
        self._packed: dict[tuple[int, torch.Size], Tensor] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, the same numbers as the plain product's but for the order of sums."""
        rows = x.numel() // x.shape[-1]
        if rows > ROWS or not _can_pack(weight) or x.dtype != weight.dtype:
            return linear(x, weight, bias)
        key = weight.data_ptr(), weight.shape
        packed = self._packed.get(key)
        if packed is None:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] <= PATIENCE and rows < MANY:
                return linear(x, weight, bias)
            packed = self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _can_pack(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and torch.backends.mkldnn.is_available()


@contextmanager
def prepacked(model: Any) -> Iterator[Prepacked]:
    """Every plain linear layer of `model` goes through one `Prepacked` inside this block, which is handed out."""
    plain = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    products = Prepacked()
    try:
        for module in plain:
            module.forward = partial(_forward, products, module)  # type: ignore[method-assign]
        yield products
    finally:
        for module in plain:
            del module.forward


def _forward(products: Prepacked, module: nn.Linear, x: Tensor) -> Tensor:
    return products.linear(x, module.weight, module.bias)
