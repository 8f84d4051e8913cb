"""A small server that speaks what of vLLM's HTTP the engine uses, over a model of its own that it really samples from.

The same tests run against it and against vLLM itself, so that it cannot drift from what vLLM does; what can go wrong
with a server is then shown on it alone. As vLLM does, it draws with a generator per request, keeps its own copy of the
weights and takes others only when it is told to read a folder, and it keeps what it computed for a prompt until it is
told to forget.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Refuses(Exception):
    """What is answered with status 500."""


class Double:
    """Serves the model in `folder`; `faults` replaces the answer to a path: a value, or a function of the body."""

    def __init__(self, folder: Path, max_model_len: int = 256, logprobs_mode: str = "processed_logprobs") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.stamp = "default"
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}
        self.asked: list[tuple[str, Any]] = []
        self.faults: dict[str, Any] = {}
        self._config = {"model": str(folder), "dtype": "torch.float32", "max_model_len": max_model_len,
                        "logprobs_mode": logprobs_mode}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"double": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: Any) -> Any:
        """What the server says; raises Refuses."""
        self.asked.append((path, body))
        if path in self.faults:
            fault = self.faults[path]
            return fault(body) if callable(fault) else fault
        return self.usual(path, body)

    def usual(self, path: str, body: Any) -> Any:
        answers: dict[str, Callable[[Any], Any]] = {
            "/health": lambda _: None,
            "/version": lambda _: {"version": "0.32.0"},
            "/server_info": lambda _: {"vllm_config": {"model_config": self._config}},
            "/collective_rpc": self._rpc,
            "/update_weight_version": self._stamped,
            "/reset_prefix_cache": self._forget,
            "/inference/v1/generate": self._generate,
        }
        return answers[path](body)

    def _rpc(self, body: Any) -> Any:
        own = self.model.state_dict()
        with self._lock:
            if body["method"] == "get_model_inspection":
                size, width = own["model.embed_tokens.weight"].shape
                return {"results": [f"VocabParallelEmbedding(embedding_dim={width}, org_vocab_size={size})"]}
            if body["method"] == "drop_weights":
                for value in own.values():
                    value.zero_()
            if body["method"] == "take_weights":
                files = sorted(Path(body["kwargs"]["folder"]).glob("*.safetensors"))
                if not files:
                    raise Refuses("Worker failed with error 'no weights there'")
                for name, value in (item for file in files for item in load_file(file).items()):
                    own[name].copy_(value)
        return {"results": [None]}

    def _stamped(self, body: Any) -> Any:
        self.stamp = body["new_version"]
        return {"success": True}

    def _forget(self, _: Any) -> Any:
        self._kept.clear()
        return {"success": True}

    def _logits(self, prompt: list[int], written: list[int]) -> torch.Tensor:
        if written:
            return self.model(input_ids=torch.tensor([prompt + written])).logits[0, -1].float()
        if tuple(prompt) not in self._kept:
            self._kept[tuple(prompt)] = self.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
        return self._kept[tuple(prompt)].clone()

    @torch.no_grad()
    def _generate(self, body: Any) -> Any:
        ids, params = list(body["token_ids"]), body["sampling_params"]
        generator = torch.Generator().manual_seed(params.get("seed", 0))
        written: list[int] = []
        logps: list[float] = []
        finish, reason = "length", None
        with self._lock:
            while len(written) < params["max_tokens"]:
                logits = self._logits(ids, written)
                for token, bias in (params.get("logit_bias") or {}).items():
                    logits[int(token)] += bias
                chances = (logits / (params.get("temperature", 1.0) or 1.0)).log_softmax(-1)
                greedy = params.get("temperature", 1.0) == 0
                token = int(chances.argmax() if greedy else torch.multinomial(chances.exp(), 1, generator=generator))
                written.append(token)
                logps.append(chances[token].item())
                said = self.tokenizer.decode(written, skip_special_tokens=True) if params.get("stop") else ""
                reason = next((string for string in params.get("stop") or () if string in said), None)
                if token in params.get("stop_token_ids", ()):
                    reason = token
                if reason is not None:
                    finish = "stop"
                    break
        spans = [{"version": self.stamp, "start": 0, "end": len(written)}]
        content = [{"token_id": token, "logprob": logp} for token, logp in zip(written, logps, strict=True)]
        return {"choices": [{"token_ids": written, "logprobs": {"content": content}, "finish_reason": finish,
                             "stop_reason": reason, "weight_versions": spans}]}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 300  # as many connections as the engine opens at once

    def handle_error(self, *_: Any) -> None:
        """A client that broke off is no error."""


class _Handler(BaseHTTPRequestHandler):
    double: Double

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._reply(json.loads(raw) if raw else None)

    def _reply(self, body: Any) -> None:
        try:
            said, status = self.double.answer(self.path.partition("?")[0], body), 200
        except KeyError:
            said, status = {"detail": "Not Found"}, 404
        except Refuses as error:
            said, status = {"error": {"message": str(error)}}, 500
        except ConnectionError:  # it dies: nothing is answered
            self.close_connection = True
            return
        raw = b"" if said is None else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Silence."""
