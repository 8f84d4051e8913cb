"""Time and memory of the vocabulary head with a full-vocabulary teacher term: chunked beside dense.

    python benchmarks/head.py --out head.json
    python benchmarks/head.py --tokens 2048 16384 --vocabulary 151936 --sides ours

One pass: from hidden states and heads of student and teacher to a loss and the gradients of the student's hidden states
and head (opsd without its clip: KL(T||S) over the whole vocabulary). Every measurement has a process of its own; the
sides take turns. Memory is the peak beyond inputs and gradients: of the resident set on a CPU, of what was allocated on
a GPU. Sides:

    ours       the package; of 16-bit heads the gradient is added to a float32 tensor, as its optimiser keeps it
    eager      the same without kernels, by torch's operators
    compiled   the same with the divergence by torch.compile in their place
    dense      logits of all tokens, by torch's operators alone
    liger, liger-eager, trl    peers, where installed (head_peers.py)
    floor      the matrix products alone, by the fastest kernels known here, four of (N, H) by (V, H) in the type of the
               heads and nothing else: both projections and the student's two gradients
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import head_peers
from shared import forget_peak, peak_since

SIDES = ("ours", "dense", "floor")
FURTHER = ("eager", "compiled", "liger", "liger-eager", "trl")
CHUNK = 128  # tokens at a time of the floor's products


def measure(side: str, tokens: int, vocabulary: int, width: int, dtype: str, device: str, runs: int,
            chunk: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Seconds of each pass after one for warm-up, and peak GB beyond inputs and gradients."""
    import torch

    from selftaught import TokenBatch, chunked_objective, kernels, objective
    from selftaught.loss import fused
    from selftaught.tensors import fast_linear

    kind = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(kind)

    hidden = {view: normal(tokens, width, scale=1.0) for view in ("student", "teacher")}
    heads = {view: normal(vocabulary, width, scale=4 * width**-0.5) for view in ("student", "teacher")}
    ids = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    rows = torch.arange(tokens, device=device) // 64
    batch = TokenBatch(ids, rows, torch.zeros(int(rows.max()) + 1, device=device),
                       torch.zeros(int(rows.max()) + 1, dtype=torch.int64, device=device))
    student, head = hidden["student"].requires_grad_(), heads["student"].requires_grad_()

    def ours() -> float:
        out = chunked_objective("opsd", batch, hidden, heads, clip=None, temperature=1.0, chunk=chunk, head_grad=wide)
        out.loss.backward()
        return out.loss.item()

    def eager() -> float:
        with kernels.off():
            return ours()

    @torch.compile(dynamic=False)
    def divergence(logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        logs, logt = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
        return (logt.exp() * (logt - logs)).sum(-1)

    def compiled() -> float:
        fast, fused.kl = fused.kl, lambda p, q: divergence(q.logits, p.logits)
        try:
            return ours()
        finally:
            fused.kl = fast

    def dense() -> float:
        logits = {view: hidden[view].float() @ heads[view].float().t() for view in hidden}
        with kernels.off():
            out = objective("opsd", batch, logits, clip=None, temperature=1.0)
            out.loss.backward()
        return out.loss.item()

    def floor() -> float:
        if device == "cuda":
            return products()
        with torch.no_grad():
            head.grad, student.grad = torch.zeros_like(head), torch.empty_like(student)
            for start in range(0, tokens, CHUNK):
                part = slice(start, start + CHUNK)
                logits = fast_linear(student[part], head)
                fast_linear(hidden["teacher"][part], heads["teacher"])
                student.grad[part] = fast_linear(logits, head.t())
                head.grad.addmm_(logits.t(), student[part])
        return 0.0

    @torch.no_grad()
    def products() -> float:
        torch.mm(hidden["teacher"], heads["teacher"].t())
        logits = torch.mm(student, head.t())
        student.grad, head.grad = torch.mm(logits, head), torch.mm(logits.t(), student)
        return 0.0

    narrow = kind != torch.float32 and side in ("ours", "eager", "compiled")
    wide = torch.zeros(head.shape, device=device) if narrow else None
    passes: dict[str, Callable[[], float]] = {
        "ours": ours, "eager": eager, "compiled": compiled, "dense": dense, "floor": floor}  # fmt: skip
    if side not in passes:
        passes = head_peers.passes(hidden, heads, ids, [side])
    seconds, loss, peak = [], 0.0, 0.0
    gradients = sum(t.numel() * t.element_size() for t in ([student] if narrow else [student, head])) / 1e9
    for _ in range(runs + 1):
        student.grad = head.grad = None
        before = forget_peak(device)
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        loss = passes[side]()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
        peak = max(peak, peak_since(device) - before - gradients)
    return {"side": side, "tokens": tokens, "vocabulary": vocabulary, "width": width, "dtype": dtype,
            "chunk": chunk, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "seconds": [round(s, 5) for s in seconds[1:]], "median_s": round(statistics.median(seconds[1:]), 5),
            "peak_gb": round(peak, 3), "loss": loss}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256, 151_936, 262_144])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES + FURTHER)
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="tokens per chunk of ours; 0: its own choice")
    parser.add_argument("--runs", type=int, default=2, help="passes that count, after one for warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="head.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one measurement in this process, as JSON arguments
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    rows: list[dict[str, Any]] = []
    print("      N |      V | side        | chunk |        s | of floor | peak GB")
    for tokens in args.tokens:
        for vocabulary in args.vocabulary:
            found = {}
            order = sorted(args.sides, key=lambda side: side != "floor")
            for side, chunk in [(s, c) for s in order for c in (args.chunk if s == "ours" else [0])]:
                case = {"side": side, "tokens": tokens, "vocabulary": vocabulary, "width": args.width,
                        "dtype": args.dtype, "device": args.device, "runs": args.runs,
                        "chunk": chunk or None}  # fmt: skip
                command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(case)]
                done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
                                      capture_output=True, text=True, check=False)  # fmt: skip
                if done.returncode != 0:
                    reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}: out of memory?"])[-1]
                    rows.append({**case, "error": reason})
                    print(f"{tokens:7} | {vocabulary:6} | {side:11} | {reason}", flush=True)
                    continue
                found[side] = row = json.loads(done.stdout.strip().splitlines()[-1])
                rows.append(row)
                ratio = f"{row['median_s'] / found['floor']['median_s']:8.2f}" if "floor" in found else "       -"
                print(f"{tokens:7} | {vocabulary:6} | {side:11} | {chunk or '':5} | {row['median_s']:8.4f} | {ratio} | "
                      f"{row['peak_gb']:7.3f}", flush=True)  # fmt: skip
    Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
