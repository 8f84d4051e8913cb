"""Peers of head.py: KL(T||S) over the whole vocabulary from hidden states, by Liger's and by TRL's chunked losses.

    python benchmarks/head_peers.py            # is each peer's number the one that ours is? against float64

All compute what head.py's `ours` does, opsd without its clip: the mean over tokens of sum_v T_v log(T_v / S_v), with
gradients in the student's hidden states and head. Both peers make it the end beta = 0 of their generalised JSD:

* `liger` and `liger-eager` (liger-kernel 0.8.5): `LigerFusedLinearJSDLoss`, no hard loss, chunks of 1024 tokens.
  `liger` is as it comes, each chunk through torch.compile; `liger-eager` is without. Below float32 both take the
  log-softmax and the divergence of logits in the heads' type, and add up the head's gradient in that type.
* `trl` (trl 1.16.0): `ChunkedDivergenceFunction` of its distillation trainer, tiles of 4096 tokens by 32,768 entries,
  projected again in the backward pass; float32 logits and sums in every type. It returns the student's entropy too.

A peer that is not installed is left out. All run in one environment with selftaught's own requirements: a python with
both peers and `PYTHONPATH=src` will do, since nothing here needs selftaught to be installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NEEDS = {"liger": "liger_kernel", "liger-eager": "liger_kernel", "trl": "trl"}
TOLERANCE = 1e-4  # relative, of values and gradients in float32 against float64


def installed() -> tuple[str, ...]:
    """The names of the sides that can run here."""
    return tuple(name for name, module in NEEDS.items() if importlib.util.find_spec(module))


def passes(hidden: Mapping[str, Any], heads: Mapping[str, Any], ids: Any,
           names: Sequence[str] | None = None) -> dict[str, Callable[[], float]]:  # fmt: skip
    """{side: one pass forward and backward that returns the loss}, of `names` or of all that are installed.

    `hidden` (N, H) and `heads` (V, H) of "student", with gradient, and "teacher", without; `ids` (N,), the tokens said,
    which Liger asks for and does not use here. A pass adds to `.grad` of the student's two. Whatever a pass needs is
    imported before it is returned, so that no pass is charged for it.
    """
    made: dict[str, Callable[[], float]] = {}
    for name in installed() if names is None else names:
        made[name] = _trl(hidden, heads) if name == "trl" else _liger(hidden, heads, ids, compiled=name == "liger")
    return made


def _liger(hidden: Mapping[str, Any], heads: Mapping[str, Any], ids: Any, compiled: bool) -> Callable[[], float]:
    chunked = importlib.import_module("liger_kernel.chunked_loss")
    objective = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0,
                                                compiled=compiled)  # fmt: skip

    def work() -> float:
        loss = objective(hidden["student"], heads["student"], hidden["teacher"], heads["teacher"], ids)
        loss.backward()
        return loss.item()

    return work


def _trl(hidden: Mapping[str, Any], heads: Mapping[str, Any]) -> Callable[[], float]:
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def work() -> float:
        divergence_N, _ = divergence.apply(hidden["student"], heads["student"], None,
                                           hidden["teacher"], heads["teacher"], None, 0.0)  # fmt: skip
        loss = divergence_N.mean()
        loss.backward()
        return loss.item()

    return work


def gaps(tokens: int, vocabulary: int, width: int, dtype: str = "float32",
         device: str = "cpu") -> dict[str, dict[str, float]]:  # fmt: skip
    """{side: {loss, hidden, head}}: the relative distance of value and gradients from the dense float64 ones.

    Of `ours` and all peers installed; distances of gradients are of Euclidean norms.
    """
    import torch

    from selftaught import TokenBatch, chunked_objective

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Any:
        return (scale * torch.randn(*shape, generator=generator)).to(device, getattr(torch, dtype))

    hidden = {view: normal(tokens, width, scale=1.0) for view in ("student", "teacher")}
    heads = {view: normal(vocabulary, width, scale=4 * width**-0.5) for view in ("student", "teacher")}
    ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    batch = TokenBatch(ids, torch.zeros_like(ids), torch.zeros(1, device=device),
                       torch.zeros(1, dtype=torch.int64, device=device))  # fmt: skip
    student, head = hidden["student"].requires_grad_(), heads["student"].requires_grad_()

    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (student, head))
    logs = (exact_h @ exact_w.t()).log_softmax(-1)
    logt = (hidden["teacher"].double() @ heads["teacher"].double().t()).log_softmax(-1)
    exact = (logt.exp() * (logt - logs)).sum(-1).mean()
    exact.backward()

    def ours() -> float:
        loss = chunked_objective("opsd", batch, hidden, heads, clip=None, temperature=1.0).loss
        loss.backward()
        return loss.item()

    found = {}
    for name, work in {"ours": ours, **passes(hidden, heads, ids)}.items():
        student.grad = head.grad = None
        loss = work()
        apart = {part: float((mine.grad.double() - true.grad).norm() / true.grad.norm())
                 for part, mine, true in (("hidden", student, exact_h), ("head", head, exact_w))}  # fmt: skip
        found[name] = {"loss": abs(loss / exact.item() - 1), **apart}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2100, help="not a multiple of a chunk, so that the last is short")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    found = gaps(args.tokens, args.vocabulary, args.width, args.dtype, args.device)
    print("side        | gap of the loss | of the hidden states' gradient | of the head's gradient")
    for name, gap in found.items():
        print(f"{name:11} | {gap['loss']:15.1e} | {gap['hidden']:30.1e} | {gap['head']:22.1e}")
    far = [name for name, gap in found.items() if max(gap.values()) > TOLERANCE]
    if far and args.dtype == "float32":
        raise SystemExit(f"not KL(T||S), by more than {TOLERANCE:g}: {', '.join(far)}")


if __name__ == "__main__":
    main()
