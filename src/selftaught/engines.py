"""What samples: the built-in engine on the training weights themselves, or vLLM with a copy of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from selftaught.data import Dataset, Renderer
from selftaught.errors import UserError
from selftaught.rollout import Engine, TransformersEngine, VllmConfig
from selftaught.rollout.vllm_engine import Client, VllmEngine, refuse_long
from selftaught.rollout.vllm_local import Local
from selftaught.rollout.vllm_server import Server, serve_command
from selftaught.run import Run
from selftaught.score import Backbone
from selftaught.score.hub import base_name, load_config, resolve, stop_token_ids

PLACE = ("rollout.vllm.url", "rollout.vllm.folder", "rollout.vllm.wait")  # a server may be another when a run goes on


def connect(run: Run, device: str, dataset: Dataset, renderer: Renderer) -> Client | None:
    """The vLLM that the recipe asks for, ready but for the weights; None: it asks for the built-in engine.

    Raises UserError, before the trainer reads any weight, where it is not there, cannot start, holds another model, or
    takes less than the longest prompt with its response.
    """
    if run.rollout.engine != "vllm":
        return None
    config = run.rollout.vllm or VllmConfig()
    client: Client = Server(config) if config.url else Local(config, str(resolve(base_name(run.model))),
                                                             run.optim.dtype, device)
    try:
        facts, ours = client.facts, load_config(run.model).get_text_config()
        for what, theirs, own in (("a vocabulary of", facts.vocabulary, ours.vocab_size),
                                  ("hidden states of", facts.width, ours.hidden_size)):
            if theirs not in (None, own):
                raise UserError(f"rollout.vllm.url = {config.url!r}: the server's model {facts.model} has {what} "
                                f"{theirs}, and model = {run.model!r} has {own}; start it with `selftaught vllm-serve "
                                f"{run.model}`")
        longest = max(len(renderer.prompt(problem).token_ids) for problem in (*dataset.train, *dataset.heldout))
        refuse_long(facts, longest, max(run.rollout.max_completion_length,
                                        (run.eval.max_completion_length or 0) if dataset.heldout else 0))
    except BaseException:
        client.close()
        raise
    return client


def make_engine(run: Run, client: Client | None, backbone: Backbone, tokenizer: Any) -> Engine:
    """The sampler of `backbone`'s weights, which it has taken over: by vLLM where there is a `client`."""
    stop_ids = frozenset(stop_token_ids(tokenizer, backbone.model))
    if client is None:
        return TransformersEngine(backbone, tokenizer, stop_ids, run.rollout.max_rows)
    shut = range(backbone.vocabulary, backbone.config.vocab_size)  # rows that the scorer does not count
    engine = VllmEngine(client, tokenizer, stop_ids, tuple(shut))
    engine.sync(backbone.exported(), 0)
    return engine


@contextmanager
def freed_on_error(held: Client | Engine | None) -> Iterator[None]:
    """What fails here closes `held`: a vLLM keeps its memory otherwise, and nobody could reach it any more."""
    try:
        yield
    except BaseException:
        if held is not None:
            held.close()
        raise


def serve(model: str, options: Sequence[str]) -> None:
    """Become a vLLM server for training on `model`; does not return. Raises UserError where it cannot begin."""
    command, environment = serve_command(str(resolve(base_name(model))), options)
    os.execve(command[0], command, environment)
