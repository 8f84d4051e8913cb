"""The only place that knows model classes, attention layouts, and where a model keeps its head."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.nn import Parameter

from selftaught.errors import UserError
from selftaught.heap import MAPPED_FROM
from selftaught.records import Section
from selftaught.score.adapter import adapter, save_adapter
from selftaught.score.attention import NAME, Attends, Recorded, Segments, UnsupportedAttention
from selftaught.score.export import exported
from selftaught.score.fused import Fused
from selftaught.score.layers import packed_layers
from selftaught.score.turned import TurnedLayers
from selftaught.tensors import Packed, is_wide, pack, upcast
from selftaught.vocabulary import Head, project

PROBE_HEAD, PROBE_TAIL, PROBE_WRITTEN = 24, 40, 16  # tokens of each: enough for a shared prefix, bounded in memory
PROBE_TOLERANCE = 1e-3  # of the largest logit; in float32 layouts differ by the order of sums alone
LOW_TOLERANCE = 0.1  # the same in bfloat16
Named = Mapping[str, Tensor]


class ScoreConfig(Section):
    """How responses are scored under each view."""

    layout: Literal["auto", "shared", "plain"] = Field(
        "auto", description="shared: every prompt once per group; plain: one row per rollout; auto: shared where it "
        "gives the same numbers, else plain with a warning")


class Backbone:
    """A causal language model split in two: hidden states of packed rollouts, and the vocabulary head.

    Weights other than the model's own are passed as a mapping from parameter name to tensor; the module, its mode
    and its gradients are never touched by such a pass. `rows` cuts the vocabulary: rows of the head from there on
    are in no distribution, neither the sampler's nor the scorer's.
    """

    def __init__(self, model: Any, layout: str = "auto", rows: int | None = None) -> None:
        self.model, self._rows = model, rows
        self.layout = layout
        self.config = model.config.get_text_config()
        prefix = model.base_model_prefix
        if not hasattr(model, prefix) or model.get_output_embeddings() is None:
            raise UserError(f"model {type(model).__name__}: no backbone with a vocabulary head was found in it; "
                            "use a causal language model")
        self._base, self._prefix = getattr(model, prefix), f"{prefix}."
        names = {id(p): name for name, p in model.named_parameters()}
        embeddings = model.get_output_embeddings()
        bias = getattr(embeddings, "bias", None)
        self._head = names[id(embeddings.weight)], None if bias is None else names[id(bias)]
        self._scale, self._softcap = _logit_transform(self.config)
        self._fused = Fused(model)
        self._turned = TurnedLayers(model, self._fused)
        self._frozen = 0  # how many `frozen` blocks are open
        self._upcast: Head | None = None  # the head in float32, until the last of them closes
        recurrent = "cache_params" in inspect.signature(self._base.forward).parameters  # as Mamba calls its state
        self._cache = "cache_params" if recurrent else "past_key_values"
        with torch.no_grad(), self._attention(NAME):
            self._fused.add(packed_layers(model, self._fused))
            self._turned.prepare()  # on the weights of the start: a run that resumes decides the same

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary(self) -> int:
        return self.head().weight.shape[0]

    def head(self, weights: Named | None = None) -> Head:
        """The vocabulary head under the model's own weights or the given ones."""
        (weight, bias), own, held = self._head, self.model.get_output_embeddings(), weights or {}
        # A teacher holds what is trained alone: the student's own stands in for the rest.
        weight_VH, bias_V = held.get(weight, own.weight), None if bias is None else held.get(bias, own.bias)
        if self._rows is not None and self._rows < weight_VH.shape[0]:
            weight_VH, bias_V = weight_VH[: self._rows], None if bias_V is None else bias_V[: self._rows]
        return Head(weight_VH, bias_V, self._scale, self._softcap)

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """(n, V) in float32, under the model's own weights.

        Inside `frozen`, where weights do not change, a float32 copy of the head is made once, if the device needs one.
        """
        head = self.head()
        if not self._frozen:
            return project(hidden_nH, head)
        if head.weight.dtype != upcast(head.weight[:0]).dtype and not is_wide(hidden_nH, head.weight):
            if self._upcast is None:
                self._upcast = replace(head, weight=upcast(head.weight.detach()))
            head = self._upcast
        return project(hidden_nH, head)

    def hidden(self, packed: Packed, weights: Named | None = None) -> Tensor:
        """The hidden states (N, H) that predict each scored token, in rollout order."""
        if self.layout == "plain":
            return self._plain(packed, weights)
        return self.run(packed.token_ids, packed.positions, Segments(packed), weights)[packed.predict]

    def run(self, token_ids_T: Tensor, positions_T: Tensor, segments: Attends, weights: Named | None = None) -> Tensor:
        """One pass over packed tokens with attention computed by `segments`: hidden states (T, H)."""
        with self._attention(NAME):
            return self._call({"input_ids": token_ids_T[None], "position_ids": positions_T[None],
                               "segments": segments}, weights)[0]

    def prefill(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Distinct prompts, each computed once: last hidden states (P, H), and keys and values by layer.

        Keys and values are (Hkv, prompts, longest prompt, D), padded on the right.
        """
        packed = pack(prompts, [(0,)] * len(prompts), str(self.device))
        segments = Recorded(packed)
        return self.run(packed.token_ids, packed.positions, segments)[packed.predict], segments.layers

    def step(self, token_ids_BT: Tensor, past: Any) -> tuple[Tensor, Any]:
        """The model's own incremental forward, for decoding where `run` cannot: last hidden states (B, H), cache."""
        with self._fused.installed():
            out = self._base(input_ids=token_ids_BT, use_cache=True, **{self._cache: past})
        return out.last_hidden_state[:, -1], getattr(out, self._cache)

    def _plain(self, packed: Packed, weights: Named | None) -> Tensor:
        """The reference: one row per rollout, padded on the right, by the model's own attention."""
        inputs = [prompt + response[:-1] for prompt, response in packed.rows]
        longest = max(map(len, inputs))
        ids = torch.zeros(len(inputs), longest, dtype=torch.int64)
        real = torch.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            real[row, : len(tokens)] = 1
        hidden = self._call({"input_ids": ids.to(self.device), "attention_mask": real.to(self.device)}, weights)
        return torch.cat([hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(response)]
                          for row, (prompt, response) in enumerate(packed.rows)])

    def _call(self, inputs: dict[str, Any], weights: Named | None) -> Tensor:
        inputs = {**inputs, "use_cache": False}
        if weights is None:
            with self._fused.installed():
                return self._base(**inputs).last_hidden_state
        own = {name.removeprefix(self._prefix): value for name, value in weights.items()
               if name.startswith(self._prefix)}
        with self.frozen(), self._fused.installed():
            return functional_call(self._base, own, (), inputs).last_hidden_state

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Dropout off and no gradient, whatever mode the student is in; its mode comes back afterwards."""
        training = {module for module in self.model.modules() if module.training}
        self._frozen += 1
        try:
            if training:
                self.model.eval()
            with torch.no_grad():
                yield
        finally:
            self._frozen -= 1
            if not self._frozen:
                self._upcast = None
            for module in training:
                module.training = True

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """`frozen`, with the fused modules and the turned layers in place once for many steps."""
        with self.frozen(), self._fused.installed(), self._turned.installed():
            yield

    @contextmanager
    def accumulating(self, gathered: Callable[[Parameter], Tensor | None] | None = None) -> Iterator[Tensor | None]:
        """Micro-batches inside this block add the head's gradient in place, and on a CPU the embedding's too.

        Hands out where the head's belongs, in float32, for `chunked_loss`: its own, or of narrower weights what
        `gathered` says (an optimiser's); None where there is none, as of a frozen head. Without this every micro-batch
        makes and adds one more tensor of the vocabulary's size for each of the two.
        """
        weight = self.model.get_output_embeddings().weight
        if not weight.requires_grad or weight.dtype != upcast(weight[:0]).dtype:
            wide = gathered(weight) if gathered is not None and weight.requires_grad else None
            yield None if wide is None else wide[: self._rows]
            return
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        self._fused.adds = self._room
        try:
            yield weight.grad[: self._rows]
        finally:
            self._fused.adds = None

    @cached_property
    def _room(self) -> Mapping[int, Tensor]:
        """Memory for the gradients of small matrices on a CPU, by the parameter's id: one block, kept between updates.

        They would stay with the process anyway, on its heap, where the first pass of an update would lay them among the
        activations and the next would find no room: .07 GB of a 135M model's peak. Larger ones are mapped one by one.
        """
        small = [p for p in self.model.parameters() if p.requires_grad and p.is_cpu and p.dtype == torch.float32
                 and p.dim() == 2 and p.is_contiguous() and p.numel() * p.itemsize < MAPPED_FROM]
        block = torch.empty(sum(p.numel() for p in small))
        pieces = block.split([p.numel() for p in small])
        return {id(p): piece.view_as(p) for p, piece in zip(small, pieces, strict=True)}

    def exported(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as another engine loads them: see `export.exported`."""
        return exported(self.model)

    def save(self, folder: Path, base: str) -> None:
        """Write the model as `from_pretrained` reads it; where an adapter is trained, that alone, with its `base`."""
        if adapter(self.model):
            save_adapter(self.model, folder, base)
        else:
            self.model.save_pretrained(folder)

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations.

        Only the layers themselves enter training mode, in which alone transformers recomputes; what is inside them
        stays as it is, so that no dropout comes between the sampler's distribution and the scorer's.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every transformers 5
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": self._same_attention})
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def _same_attention(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of a layer's pass and of its recomputation, which runs after `run` has put the attention back."""
        return nullcontext(), self._recomputed(self.config._attn_implementation)

    @contextmanager
    def _recomputed(self, attention: str) -> Iterator[None]:
        with self._attention(attention), self._fused.installed():
            yield

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before = self.config._attn_implementation
        self.config._attn_implementation = name
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def verify(self, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> dict[str, float]:
        """Compare the head and the shared layout with the model's own forward on a probe batch.

        Falls back to the plain layout, with a warning, where the shared one is not supported or gives other
        numbers. Returns the largest differences of logits, relative to the largest logit where that is above 1.

        Raises:
            UserError: the model's logits are not its hidden states through its head (an unknown scale or cap).
        """
        packed = pack(prompts, responses, str(self.device))
        asked, self.layout = self.layout, "plain"
        with self.frozen():
            row = torch.tensor([prompts[0] + responses[0][:-1]], device=self.device)
            own = self.model(input_ids=row, use_cache=False).logits[0, len(prompts[0]) - 1 :, : self._rows].float()
            reference = self.hidden(packed)
            size = max(1.0, own.abs().max().item())
            tolerance = PROBE_TOLERANCE if reference.dtype in (torch.float32, torch.float64) else LOW_TOLERANCE
            gap = {"head": (self.logits(reference[: len(responses[0])]) - own).abs().max().item() / size}
            if gap["head"] > tolerance:
                raise UserError(f"model {type(self.model).__name__}: its logits are not its hidden states through its "
                                f"head (relative difference {gap['head']:.3g}): an unknown scale, cap or adapter on "
                                "the head; use a model whose head is a plain linear map")
            if asked == "plain":
                return gap
            try:
                self.layout = "shared"
                gap["layout"] = (self.logits(self.hidden(packed)) - self.logits(reference)).abs().max().item() / size
                reason = f"it differs by {gap['layout']:.3g} from the plain layout" if gap["layout"] > tolerance else ""
            except (UnsupportedAttention, TypeError) as error:
                reason = f"{error} is not supported"
        if reason:
            self.layout = "plain"
            if asked == "shared":
                raise UserError(f"score.layout: shared, but {reason} with {type(self.model).__name__}; use auto")
            warnings.warn(f"{type(self.model).__name__}: {reason} in the shared-prefix layout; falling back to one row "
                          "per rollout: the same numbers, slower", stacklevel=2)
        return gap


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) of the logits by the names that model families give them; `verify` checks the result."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    return scale, getattr(config, "final_logit_softcapping", None)


def probe(prompts: Sequence[tuple[int, ...]], written: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Two rollouts of each prompt, no longer than the run's own and of at most 80 tokens: their prompts and responses.

    A long prompt keeps its beginning, which others may share, and its end.
    """
    written = min(written, PROBE_WRITTEN)
    short = [ids if len(ids) <= PROBE_HEAD + PROBE_TAIL else (*ids[:PROBE_HEAD], *ids[-PROBE_TAIL:]) for ids in prompts]
    return [*short, *short], [*(ids[-written:] for ids in reversed(short)), *(ids[-min(3, written):] for ids in short)]
