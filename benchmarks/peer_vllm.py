"""One side of `rollouts.py`: vLLM, in an environment of its own. Nothing of selftaught is imported.

Turns are asked for on standard input (`shared.serve`). The engine is as it comes, but in this process, so that its
memory is counted here, and with a cache that the rows of one turn fit into.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from shared import serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads as OMP_NUM_THREADS says, as on every side
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def cache_gb(args: argparse.Namespace) -> int:
    """Whole GB that hold keys and values of all rows, with a fifth for blocks that are not full."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model)
    heads = config.num_key_value_heads * (getattr(config, "head_dim", None) or
                                          config.hidden_size // config.num_attention_heads)  # fmt: skip
    token = 2 * config.num_hidden_layers * heads * (4 if args.dtype == "float32" else 2)
    return math.ceil(1.2 * args.rows * args.length * token / 2**30)


def prepare(args: argparse.Namespace) -> Callable[[Any], dict[str, Any]]:
    """The engine, ready: a function of a turn's prompts."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gb(args)))  # read when the engine is made
    import vllm

    engine = vllm.LLM(args.model, dtype=args.dtype, max_model_len=args.length, seed=0,
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
    args = parser.parse_args()
    serve(lambda: prepare(args))


if __name__ == "__main__":
    main()
