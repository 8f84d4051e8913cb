"""What vLLM's workers are taught, who import this in processes of their own: to take weights over whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

EXTENSION = f"{__name__}.Taught"
# May a prompt be computed in parts? After each part but the last vLLM takes a drawn token back by turning the request's
# generator back, which generators of a CPU refuse; its engine then ends.
CHUNKS = torch.accelerator.is_available()


class Taught:
    """Methods that vLLM adds to its worker's class (`--worker-extension-cls`), to be called by name."""

    model_runner: Any
    reload_weights: Callable[..., None]
    reset_weights: Callable[[], None]

    def take_weights(self, folder: str | None = None, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Load the safetensors in `folder`, or `weights`, by the names of a checkpoint."""
        self.reload_weights(weights_iterator=read(Path(folder)) if folder is not None else iter(weights))
        repack(self.model_runner.get_model())

    def drop_weights(self) -> None:
        """Make every weight zero that is held as a parameter."""
        self.reset_weights()
        repack(self.model_runner.get_model())


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all safetensors in `folder`, one at a time. Raises FileNotFoundError where it holds none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"this process sees no weights in {folder}")
    for file in files:
        with safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 (it is no mapping)
                yield name, held.get_tensor(name)


def repack(model: nn.Module) -> None:
    """On a CPU, let heads compute with the weights that they hold.

    vLLM packs each layer's weights for its kernels when they are loaded. A tied head is never loaded by itself, and
    would go on with those that it was packed from at first.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]
