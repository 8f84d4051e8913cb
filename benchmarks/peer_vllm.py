"""One side of `rollouts.py`: vLLM, in an environment of its own. Nothing of ours is imported.

Turns are asked for on standard input (`shared.serve`). The engine is as it comes, but in this process, so that its
memory is counted here, and with room for the rows of one turn in its cache.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from shared import serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads as OMP_NUM_THREADS says, as on every side
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def prepare(args: argparse.Namespace) -> Callable[[Any], dict[str, Any]]:
    """The engine, ready: a function of a turn's prompts."""
    import vllm

    engine = vllm.LLM(args.model, dtype=args.dtype, max_model_len=args.length, seed=0, enforce_eager=args.eager,
                      max_num_seqs=max(args.rows, 2), disable_log_stats=True)  # fmt: skip
    # 0: of every token the log-prob of the one sampled, which is what a trainer needs
    setting = vllm.SamplingParams(n=args.group, temperature=1.0, top_p=1.0, top_k=0, max_tokens=args.tokens,
                                  min_tokens=args.tokens, ignore_eos=True, logprobs=0, detokenize=False)  # fmt: skip

    def work(prompts: list[list[int]]) -> dict[str, Any]:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        out = engine.generate(given, setting, use_tqdm=False)
        lengths = [len(row.token_ids) for request in out for row in request.outputs]
        assert all(len(row.logprobs) == len(row.token_ids) for request in out for row in request.outputs)
        return {"lengths": lengths, "version": vllm.__version__}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder (safetensors and tokenizer)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="of prompt and response together")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    serve(lambda: prepare(args))


if __name__ == "__main__":
    main()
