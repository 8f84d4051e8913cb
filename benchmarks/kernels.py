"""Time of the kernels beside torch.compile and torch's operators: each divergence, forward and backward.

    python benchmarks/kernels.py --out kernels.json
    python benchmarks/kernels.py --rows 512 --vocabulary 32000 128256 262144
    python benchmarks/kernels.py --device cpu --rows 64 --vocabulary 49152 151936    # the compiled loops

From float32 logits (rows, V) of student, teacher and, for the barycenter, a reference to the loss of each row and the
gradient of the student's logits. The three take turns; the times are medians, on a GPU by CUDA events, of the device
alone: it sleeps while the work is queued, as it is queued in training behind a chunk's matrix products; what asks for
a number on its way, as some of torch's operators' forms do, pays for what it queues after that. MiB is the peak of
memory beyond the logits, the gradient included. GB/s counts what the kernels must move: logits as often as they are
read forward and backward, and the gradient written. A kernel stays where it is faster than compiled.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import forget_peak, peak_since

FORMS = ("kl(T, S)", "kl(S, T)", "js", "clipped", "barycenter", "top-k", "sampled")
READS = {"kl(T, S)": 4, "kl(S, T)": 4, "js": 6, "clipped": 6, "barycenter": 9, "top-k": 3,
         "sampled": 2}  # of logits (rows, V)
SLEEP = 40_000_000  # cycles, some 20 ms: longer than any of the work takes to be queued


def forms(tokens: Any, kind: str) -> dict[str, Callable[..., Any]]:
    """{name: function of the logits of student, teacher and reference}, by `kernels`, `eager` or `compiled`."""
    import torch

    from selftaught import kernels
    from selftaught.loss import clipped_kl, divergence, js, kl, kl_to_barycenter, with_tail
    from selftaught.vocabulary import TokenDist

    share = torch.full(tokens.shape, 0.1, device=tokens.device)
    made = {
        "kl(T, S)": lambda s, t, r: kl(t, s),
        "kl(S, T)": lambda s, t, r: kl(s, t),
        "js": lambda s, t, r: js(t, s, 0.5),
        "clipped": lambda s, t, r: clipped_kl(t, s, 0.05),
        "barycenter": lambda s, t, r: kl_to_barycenter(s, t, r, share, 1e-8),
        "top-k": lambda s, t, r: divergence("js", *reversed(with_tail(100, s, t))),
        "sampled": lambda s, t, r: s.at_sampled,
    }

    def sampled(s: Any, t: Any, r: Any) -> Any:
        """With the entropy beside it, which the other two find on their way; + 0 x, so that it is computed."""
        logp = s.log_softmax(-1)
        return logp.gather(-1, tokens[:, None])[:, 0] + 0.0 * (logp.exp() * logp).sum(-1).detach()

    def with_(form: Callable[..., Any]) -> Callable[..., Any]:
        if kind == "kernels":
            return lambda *logits: form(*(TokenDist(z, tokens) for z in logits))
        if kind == "compiled":
            return torch.compile(plain(form), dynamic=False)

        def eager(*logits: Any) -> Any:
            with kernels.off():
                return form(*(TokenDist(z, tokens) for z in logits))

        return eager

    def plain(form: Callable[..., Any]) -> Callable[..., Any]:
        """The same formula of log-probs, so that the compiler sees the whole of it."""
        if form is made["sampled"]:
            return sampled
        if form is made["top-k"]:
            def top(s: Any, t: Any, r: Any) -> Any:
                both = [x.log_softmax(-1) for x in (s, t)]
                index = both[0].detach().topk(100, dim=-1).indices
                out = [torch.cat([x.gather(-1, index), x.exp().scatter(-1, index, 0.0).sum(-1, True).log()], -1)
                       for x in both]
                return js(out[1], out[0], 0.5)
            return top
        return lambda *logits: form(*(z.log_softmax(-1) for z in logits))

    return {name: with_(form) for name, form in made.items()}


def measured(form: Callable[..., Any], s: Any, *others: Any) -> tuple[float, float]:
    """Milliseconds that the device works, forward and backward, and MiB of memory beyond what was taken before."""
    import torch

    held = forget_peak(s.device.type)
    if s.is_cuda:
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP)
        begin.record()
        torch.autograd.grad(form(s, *others).sum(), s)
        end.record()
        torch.cuda.synchronize()
        ms = begin.elapsed_time(end)
    else:
        began = time.perf_counter()
        torch.autograd.grad(form(s, *others).sum(), s)
        ms = 1000 * (time.perf_counter() - began)
    return ms, (peak_since(s.device.type) - held) * 1e9 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--runs", type=int, default=7, help="turns that count, after two for warm-up")
    parser.add_argument("--out", default="kernels.json")
    args = parser.parse_args()
    import torch

    from selftaught import kernels

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("the kernels need an NVIDIA GPU, and torch sees none; --device cpu takes the compiled loops")
    if not kernels.usable(torch.ones(1, 1, device=args.device)):
        raise SystemExit("there are no kernels here: a GPU's need Triton, a CPU's a C compiler")
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    found: list[dict[str, Any]] = []
    print(f"{name}, torch {torch.__version__}, {args.rows} rows")
    print(f"{'V':>6} | {'form':10} | {'ms: kernels (GB/s)':>19} {'compiled':>10} {'eager':>8} | {'MiB: kernels':>12} "
          f"{'compiled':>8} {'eager':>8} | compiled / kernels (of ms)")
    for vocabulary in args.vocabulary:
        generator = torch.Generator(args.device).manual_seed(0)
        s, *noise = torch.randn(3, args.rows, vocabulary, device=args.device, generator=generator).unbind()
        t, r = (3 * s + each for each in noise)
        s = 3 * s
        s.requires_grad_()
        tokens = torch.randint(vocabulary, (args.rows,), device=args.device, generator=generator)
        sides = {kind: forms(tokens, kind) for kind in ("kernels", "compiled", "eager")}
        for form in args.forms:
            runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in sides}
            for turn in range(args.runs + 2):
                for kind, made in sides.items():
                    run = measured(made[form], s, t, r)
                    if turn >= 2:
                        runs[kind].append(run)
            ms, mib = ({kind: statistics.median(run[i] for run in of) for kind, of in runs.items()} for i in (0, 1))
            rate = (READS[form] + 1) * args.rows * vocabulary * 4 / ms["kernels"] / 1e6
            found.append({"vocabulary": vocabulary, "rows": args.rows, "form": form, "ms": ms, "mib": mib,
                          "gb_per_s": rate})
            print(f"{vocabulary:6} | {form:10} | {ms['kernels']:12.3f} ({rate:4.0f}) {ms['compiled']:10.3f} "
                  f"{ms['eager']:8.3f} | {mib['kernels']:12.0f} {mib['compiled']:8.0f} {mib['eager']:8.0f} | "
                  f"{ms['compiled'] / ms['kernels']:.2f}", flush=True)
    Path(args.out).write_text(json.dumps({"device": name, "rows": found}, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
