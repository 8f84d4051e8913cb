"""How far a training in bfloat16 drifts from the same training in float32, and what that saves.

    python benchmarks/drift.py --out drift.json
    python benchmarks/drift.py --method opsd --device cuda --model FOLDER --prompts FILE.jsonl

Every arm trains on the same optimiser batches: rollouts are sampled along the float32 arm's own trajectory and replayed
by the others, so they are on-policy for it and the same tokens for all. All start from the weights rounded to bfloat16.

    float32      the reference
    recut        float32 with half the token budget: another order of sums, the floor against which drift is read
    master       bfloat16 with float32 master copies, as `optim.dtype: bfloat16` trains
    stochastic   bfloat16 weights alone, updates rounded at random, as `optim.master: stochastic` trains
    naive        bfloat16 weights, gradients and moments, by AdamW alone: what is lost without master copies

Every --every steps: |log-prob - float32's| of the step's own tokens (before its update) and of those of a probe batch
that is never trained on, in nats, mean and largest; KL(float32||arm) over the vocabulary on the probe; the length of
the weights' movement as a share of float32's; ||w - w_float32|| / ||w_float32 - w_0||, of the weights that the model
computes with and of the master copies. Then seconds of a step without its sampling, and peak memory of one (float32's
with its sampling, which the others replay): of the resident set on a CPU, of what was allocated on a GPU. Each arm has
a process of its own. The reward is a plain function of the text: the answer, and a hash besides, so that no group is
dead. Needs (2 + steps / every) times the size of the float32 weights in the temporary folder (TMPDIR).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared import forget_peak, peak_since

ARMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "recut": {"dtype": "float32", "cut": 2},
    "master": {"dtype": "bfloat16"},
    "stochastic": {"dtype": "bfloat16", "master": "stochastic"},
    "naive": {"dtype": "bfloat16", "naive": True},
}
METHODS = ("grpo", "opsd", "rlsd", "sdpg", "sdpo")
PROBE_PROBLEMS, PROBE_TOKENS = 8, 512  # of the probe at most
ROWS = 64  # tokens of the probe at a time
STOP = "\n"


# The machinery, with three parts put in: a reward without a process, a sampler that remembers, a forgetful optimiser.


class Judge:
    """In the place of the verifiers' processes: verdicts by a plain function."""

    def __init__(self, rollouts: Sequence[Any] = ()) -> None:
        self.rollouts = rollouts

    def submit(self, rollouts: Sequence[Any]) -> Judge:
        return Judge(rollouts)

    def result(self) -> list[Any]:
        from selftaught.records import Verdict

        found = []
        for rollout in self.rollouts:
            right = rollout.text.split("\n")[0].strip() == rollout.problem.answer
            score = float(right) + zlib.crc32(repr(rollout.token_ids).encode()) % 7 / 14
            found.append(Verdict(score, "right" if right else "wrong"))
        return found

    def close(self) -> None:
        pass


class Tape:
    """An engine that writes down what `engine` samples, or plays what was written down; one file per step."""

    def __init__(self, engine: Any, folder: Path, plays: bool) -> None:
        self.engine, self.folder, self.plays = engine, folder, plays
        self._asked: list[Any] = []

    def submit(self, requests: Sequence[Any], n: int, sampling: Any) -> None:
        self._asked = list(requests)
        if not self.plays:
            self.engine.submit(requests, n, sampling)
        self._sampling = sampling

    def poll(self) -> list[Any]:
        """All rollouts of a step at once: the sampler's batches are no business of the arms."""
        from selftaught.records import Rollout

        if not self._asked:
            return []
        path, asked = self.folder / f"rollouts-{self._asked[0].step}.json", self._asked
        self._asked = []
        if self.plays:
            prompts = {request.problem.id: request for request in asked}
            return [Rollout(
                problem=prompts[row["problem"]].problem, sample=row["sample"], prompt=prompts[row["problem"]].prompt,
                token_ids=tuple(row["token_ids"]), logp_sampler=tuple(row["logp"]), text=row["text"],
                finish=row["finish"], sampling=self._sampling, version=row["step"], step=row["step"],
            ) for row in json.loads(path.read_text())]
        rollouts: list[Any] = []
        while batch := self.engine.poll():
            rollouts += batch
        path.write_text(json.dumps([
            {"problem": r.problem.id, "sample": r.sample, "token_ids": r.token_ids, "logp": r.logp_sampler,
             "text": r.text, "finish": r.finish, "step": r.step} for r in rollouts]))
        return rollouts

    def sample(self, requests: Sequence[Any], n: int, sampling: Any) -> list[Any]:
        self.submit(requests, n, sampling)
        return self.poll()

    def sync(self, weights: Any, version: int) -> None:
        self.engine.sync(weights, version)

    def close(self) -> None:
        self.engine.close()


def naive() -> Any:
    """The optimiser without master copies: gradients summed, moments kept and weights updated in bfloat16."""
    from selftaught.optim import Optimizer

    class Naive(Optimizer):
        def _master(self, parameter: Any) -> Any:
            return parameter

    return Naive


def run_of(given: Mapping[str, Any], arm: str, work: Path) -> Any:
    """The quickstart's recipe with this arm's precision and cut."""
    from selftaught.run import load_run

    fields = ARMS[arm]
    sections: dict[str, Any] = {
        "model": str(work / "model"), "method": given["method"], "reward": "exact", "privilege": {"kind": "answer"},
        "device": given["device"], "seed": 0, "out": str(work / f"run-{arm}"), "report": {"to": []},
        "rollout": {"num_generations": given["generations"], "prompts_per_step": given["problems"],
                    "max_completion_length": given["tokens"], "stop": [STOP], "max_logp_gap": 1e9},
        "optim": {"steps": given["steps"], "learning_rate": given["learning_rate"], "warmup_steps": 2,
                  "dtype": fields["dtype"], "master": fields.get("master", "float32"),
                  "token_budget": given["token_budget"] // fields.get("cut", 1)},
    }
    overrides = ["data.heldout=0"]
    if given["prompts"]:
        sections["data"] = {"source": given["prompts"], "heldout": 0, "shots": 4, "template": "completion"}
    else:
        overrides.append("data.train=512")
    return load_run("quickstart", overrides, sections)


def session_of(given: Mapping[str, Any], arm: str, work: Path) -> Any:
    """A run as `selftaught.train` begins it, without evaluations and checkpoints."""
    from rich.console import Console

    from selftaught import assemble
    from selftaught.optim import Checkpoints
    from selftaught.report import Health, Progress, RunFolder, Trackers
    from selftaught.session import Session

    run = run_of(given, arm, work)
    if ARMS[arm].get("naive"):
        assemble.Optimizer = naive()
    ground = replace(assemble.lay_ground(run, say=lambda _: None), rewarder=Judge())
    parts = assemble.assemble(ground)
    parts = replace(parts, engine=Tape(parts.engine, work, plays=arm != "float32"))
    folder = RunFolder(run.out)
    return Session(
        parts, folder, Checkpoints(folder.checkpoints, 1), Trackers(run.report, folder.path, arm, run={}),
        Progress(run.optim.steps, Console(quiet=True)), Health(None, ground.method.needs, ground.privileged))


# One arm.


def measure(arm: str, work: str, **given: Any) -> dict[str, Any]:
    """Train one arm; a row for step 0 and every `every` steps. The float32 arm leaves its weights and distributions."""
    import torch

    from selftaught.assemble import make_batch, requests
    from selftaught.train import step

    folder, device = Path(work), given["device"]
    session = session_of(given, arm, folder)
    ground, parts = session.parts.ground, session.parts
    asked = requests(ground, ground.dataset.train[:PROBE_PROBLEMS], given["steps"])  # a step that no training has
    sampled = parts.engine.sample(asked, given["generations"], parts.sampling)
    ends = itertools.accumulate(len(rollout.token_ids) for rollout in sampled)
    sampled = [rollout for rollout, end in zip(sampled, ends, strict=True) if end <= PROBE_TOKENS] or sampled[:1]
    probe = make_batch(sampled, Judge(sampled).result(), [None] * len(sampled), 0, parts.backbone.device)
    rows, seconds, peak = [row_of(arm, folder, session, probe, {})], [], 0.0
    for number in range(1, given["steps"] + 1):
        forget_peak(device)
        began = time.monotonic()
        metrics = step(session)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began - metrics["time/sample"])
        peak = max(peak, peak_since(device))
        session.done = number
        if number % given["every"] == 0 or number == given["steps"]:
            rows.append(row_of(arm, folder, session, probe, metrics))
            print(f"  {arm}: step {number} of {given['steps']}", file=sys.stderr, flush=True)
    return {"rows": rows, "median_s": round(statistics.median(seconds[1:] or seconds), 3), "peak_gb": round(peak, 3),
            "skipped": parts.optimizer.skipped, "probe_tokens": probe.tokens.tokens.numel()}


def row_of(arm: str, folder: Path, session: Any, probe: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What stands in the table for the step that is done."""
    import torch
    from safetensors.torch import load_file, save_file

    parts, number = session.parts, session.done
    weights = {n: p.detach() for n, p in parts.backbone.model.named_parameters() if p.requires_grad}
    path, logp_path = folder / f"weights-{number}.safetensors", folder / f"probe-{number}.safetensors"
    row: dict[str, Any] = {"step": number}
    gap = "sampling/sampling_logp_difference"
    for name, key in (("batch_mean", f"{gap}/mean"), ("batch_max", f"{gap}/max"), ("loss", "loss"),
                      ("grad_norm", "grad_norm"), ("reward", "reward")):
        row[name] = metrics.get(key)
    with torch.no_grad(), parts.backbone.frozen():
        logp_NV = torch.cat([*log_probs(parts, probe)])
    if arm == "float32":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
        save_file({"logp": logp_NV.cpu()}, logp_path)
    reference_NV = load_file(logp_path)["logp"]
    tokens, gaps, kls = probe.tokens.tokens, [], []
    for start in range(0, len(tokens), ROWS):
        part = slice(start, start + ROWS)
        ours, theirs = logp_NV[part], reference_NV[part].to(logp_NV.device)
        gaps.append((ours - theirs).gather(1, tokens[part, None]).abs().flatten())
        kls.append((theirs.double().exp() * (theirs.double() - ours.double())).sum(-1))
    row |= {"probe_mean": torch.cat(gaps).mean().item(), "probe_max": torch.cat(gaps).max().item(),
            "probe_kl": torch.cat(kls).mean().item()}
    if number:
        masters = {name.removeprefix("master/"): value for name, value in parts.optimizer.state_tensors().items()
                   if name.startswith("master/")}
        row |= movement(folder, number, weights)
        row["apart_master"] = movement(folder, number, masters)["apart"] if masters else None
    return row


def log_probs(parts: Any, probe: Any) -> Iterator[Any]:
    """Log-probs (n, V) of the student after every token of the probe, in float32, some rows at a time."""
    from selftaught.tensors import pack

    packed = pack(probe.contexts["plain"], probe.responses, str(parts.backbone.device))
    for hidden_nH in parts.backbone.hidden(packed).split(ROWS):
        yield parts.backbone.logits(hidden_nH).log_softmax(-1)


def movement(folder: Path, number: int, weights: Mapping[str, Any]) -> dict[str, float]:
    """moved: ||w - w_0|| / ||w_float32 - w_0||; apart: ||w - w_float32|| / the same."""
    from safetensors import safe_open

    squares = {"reference": 0.0, "moved": 0.0, "apart": 0.0}
    first, there = (safe_open(folder / f"weights-{step}.safetensors", "pt") for step in (0, number))
    for name, value in weights.items():
        start, end, now = (t.to(value.device).float() for t in (first.get_tensor(name), there.get_tensor(name), value))
        for key, gap in (("reference", end - start), ("moved", now - start), ("apart", now - end)):
            squares[key] += gap.double().square().sum().item()
    return {key: (squares[key] / squares["reference"]) ** 0.5 for key in ("moved", "apart")}


# All arms.


def write_model(name: str, folder: Path) -> None:
    """Model `name` rounded to bfloat16: every arm's first weights."""
    import torch

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_model, load_tokenizer

    with quiet():
        load_model(name, torch.bfloat16, "cpu").save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)


def child(case: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """One arm in its own process; its last line is its result."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(case)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"error": f"exit {done.returncode}: see above"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Drift by step and arm, then time and memory by arm."""
    lines = [
        "         |            |  tokens of the step  | tokens of the probe  |   probe   |  share of float32's way  |",
        "    step | arm        | |dlogp|  mean    max | |dlogp|  mean    max | KL(32||.) |  moved |  apart |  masters |"
        "       loss",
    ]
    steps = [row["step"] for row in results["float32"].get("rows", [])]
    for index, number in enumerate(steps):
        for arm, result in results.items():
            if "rows" in result:
                row = result["rows"][index]
                cells = [_cell(row.get(key), width, kind) for key, width, kind in (
                    ("batch_mean", 12, ".2e"), ("batch_max", 7, ".1e"), ("probe_mean", 12, ".2e"),
                    ("probe_max", 7, ".1e"), ("probe_kl", 9, ".1e"), ("moved", 6, ".3f"), ("apart", 6, ".3f"),
                    ("apart_master", 8, ".3f"), ("loss", 10, ".3e"))]
                lines.append(f"{number:8} | {arm:10} | {cells[0]} {cells[1]} | {cells[2]} {cells[3]} | "
                             + " | ".join(cells[4:]))
    lines.append("\narm        | s per step | of float32 | peak GB | of float32")
    whole = results["float32"]
    for arm, result in results.items():
        if "error" in result or "error" in whole:
            lines.append(f"{arm:10} | {result.get('error') or result['median_s']}")
            continue
        ratios = [f"{result[key] / whole[key]:10.2f}" for key in ("median_s", "peak_gb")]
        lines.append(f"{arm:10} | {result['median_s']:10.3f} | {ratios[0]} | {result['peak_gb']:7.3f} | {ratios[1]}")
    floor = results.get("recut", {}).get("rows")
    if floor and not floor[-1]["apart"]:
        lines.append("recut has float32's very bits: one micro-batch in both; lower --token-budget for a floor.")
    return "\n".join(lines)


def _cell(value: float | None, width: int, kind: str) -> str:
    return f"{'-' if value is None else format(value, kind):>{width}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="a folder, a Hub name or a shipped name")
    parser.add_argument("--prompts", help="JSONL with prompt and answer; without it the quickstart's own problems")
    parser.add_argument("--method", default="grpo", choices=METHODS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="float32 always runs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between two rows")
    parser.add_argument("--problems", type=int, default=4, help="of a step")
    parser.add_argument("--generations", type=int, default=4, help="rollouts of each problem")
    parser.add_argument("--tokens", type=int, default=24, help="of a rollout at most")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--token-budget", type=int, default=512, help="of a micro-batch; recut has half")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default="drift.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one arm in this process, as JSON arguments
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one))))
        return
    keys = ("method", "device", "steps", "every", "problems", "generations", "tokens", "learning_rate", "token_budget")
    given = {key: getattr(args, key) for key in keys}
    given["prompts"] = str(Path(args.prompts).resolve()) if args.prompts else None
    results: dict[str, dict[str, Any]] = {}
    setting = {**given, "model": args.model, "threads": args.threads, "machine": platform.processor(), **about(args)}
    with tempfile.TemporaryDirectory(prefix="selftaught-bench-") as work:
        write_model(args.model, Path(work) / "model")
        for arm in ["float32", *(arm for arm in args.arms if arm != "float32")]:
            print(f"{arm} ...", file=sys.stderr, flush=True)
            results[arm] = child({**given, "arm": arm, "work": work}, args.threads)
            Path(args.out).write_text(json.dumps({"setting": setting, "arms": results}, indent=1) + "\n")
            if "error" in results["float32"]:
                break
    print(table(results))
    print(f"Written to {args.out}.")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, the GPU, and whether float32 products are whole there."""
    import torch
    import transformers

    cuda = args.device == "cuda"
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "float32_products": torch.get_float32_matmul_precision() if cuda else "highest"}


if __name__ == "__main__":
    main()
