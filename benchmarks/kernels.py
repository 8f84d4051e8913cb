"""Time of the GPU's kernels beside torch.compile and torch's operators: each divergence, forward and backward.

    python benchmarks/kernels.py --out kernels.json
    python benchmarks/kernels.py --rows 512 --vocabulary 32000 128256 262144

From float32 logits (rows, V) of student and teacher to the loss of each row and the gradient of the student's
logits. The three take turns; the times are medians, by CUDA events, of the device alone: it sleeps while the work is
queued, as it is queued in training behind a chunk's matrix products; what asks for a number on its way, as some of
torch's operators' forms do, pays for what it queues after that. MiB is the peak of memory beyond the logits, the
gradient included. GB/s counts what the kernels must move: both logits read once or twice forward and once backward, and
the gradient written. A kernel stays where it is faster than compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMS = ("kl(T, S)", "kl(S, T)", "js", "clipped", "top-k", "sampled")
READS = {"kl(T, S)": 4, "kl(S, T)": 4, "js": 6, "clipped": 6, "top-k": 3, "sampled": 2}  # of logits (rows, V)
SLEEP = 40_000_000  # cycles, some 20 ms: longer than any of the work takes to be queued


def forms(tokens: Any, kind: str) -> dict[str, Callable[[Any, Any], Any]]:
    """{name: function of the logits of student and teacher}, by `kernels`, `eager` or `compiled`."""
    import torch

    from selftaught import kernels
    from selftaught.loss import clipped_kl, divergence, js, kl, with_tail
    from selftaught.vocabulary import TokenDist

    made = {
        "kl(T, S)": lambda s, t: kl(t, s),
        "kl(S, T)": lambda s, t: kl(s, t),
        "js": lambda s, t: js(t, s, 0.5),
        "clipped": lambda s, t: clipped_kl(t, s, 0.05),
        "top-k": lambda s, t: divergence("js", *reversed(with_tail(100, s, t))),
        "sampled": lambda s, t: s.at_sampled,
    }

    def sampled(s: Any, t: Any) -> Any:
        """With the entropy beside it, which the other two find on their way; + 0 x, so that it is computed."""
        logp = s.log_softmax(-1)
        return logp.gather(-1, tokens[:, None])[:, 0] + 0.0 * (logp.exp() * logp).sum(-1).detach()

    def with_(form: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        if kind == "kernels":
            return lambda s, t: form(TokenDist(s, tokens), TokenDist(t, tokens))
        if kind == "compiled":
            return torch.compile(plain(form), dynamic=False)

        def eager(s: Any, t: Any) -> Any:
            with kernels.off():
                return form(TokenDist(s, tokens), TokenDist(t, tokens))

        return eager

    def plain(form: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The same formula of log-probs, so that the compiler sees the whole of it."""
        if form is made["sampled"]:
            return sampled
        if form is made["top-k"]:
            def top(s: Any, t: Any) -> Any:
                both = [x.log_softmax(-1) for x in (s, t)]
                index = both[0].detach().topk(100, dim=-1).indices
                out = [torch.cat([x.gather(-1, index), x.exp().scatter(-1, index, 0.0).sum(-1, True).log()], -1)
                       for x in both]
                return js(out[1], out[0], 0.5)
            return top
        return lambda s, t: form(s.log_softmax(-1), t.log_softmax(-1))

    return {name: with_(form) for name, form in made.items()}


def measured(form: Callable[[Any, Any], Any], s: Any, t: Any) -> tuple[float, float]:
    """Milliseconds that the device works, forward and backward, and MiB of memory beyond what was taken before."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP)
    begin.record()
    torch.autograd.grad(form(s, t).sum(), s)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--runs", type=int, default=7, help="turns that count, after two for warm-up")
    parser.add_argument("--out", default="kernels.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("the kernels need an NVIDIA GPU, and torch sees none")
    found: list[dict[str, Any]] = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.rows} rows")
    print(f"{'V':>6} | {'form':8} | {'ms: kernels (GB/s)':>19} {'compiled':>10} {'eager':>8} | {'MiB: kernels':>12} "
          f"{'compiled':>8} {'eager':>8} | compiled / kernels (of ms)")
    for vocabulary in args.vocabulary:
        generator = torch.Generator("cuda").manual_seed(0)
        s = 3 * torch.randn(args.rows, vocabulary, device="cuda", generator=generator)
        t = (s + torch.randn(args.rows, vocabulary, device="cuda", generator=generator)).detach()
        s.requires_grad_()
        tokens = torch.randint(vocabulary, (args.rows,), device="cuda", generator=generator)
        sides = {kind: forms(tokens, kind) for kind in ("kernels", "compiled", "eager")}
        for form in args.forms:
            runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in sides}
            for turn in range(args.runs + 2):
                for kind, made in sides.items():
                    run = measured(made[form], s, t)
                    if turn >= 2:
                        runs[kind].append(run)
            ms, mib = ({kind: statistics.median(run[i] for run in of) for kind, of in runs.items()} for i in (0, 1))
            rate = (READS[form] + 1) * args.rows * vocabulary * 4 / ms["kernels"] / 1e6
            found.append({"vocabulary": vocabulary, "rows": args.rows, "form": form, "ms": ms, "mib": mib,
                          "gb_per_s": rate})
            print(f"{vocabulary:6} | {form:8} | {ms['kernels']:12.3f} ({rate:4.0f}) {ms['compiled']:10.3f} "
                  f"{ms['eager']:8.3f} | {mib['kernels']:12.0f} {mib['compiled']:8.0f} {mib['eager']:8.0f} | "
                  f"{ms['compiled'] / ms['kernels']:.2f}", flush=True)
    Path(args.out).write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": found}, indent=1) + "\n")
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
