"""What several benchmarks use: processes that take turns, memory, models that do not stop by themselves, prompts.

Only the standard library is imported here: peers run this file in environments of their own, without selftaught.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT = "The quick brown fox jumps over the lazy dog and then counts to ten slowly. "
PROBLEMS = 64  # in a file of prompts


# Processes.


def environment(threads: int) -> dict[str, str]:
    """Of a measured process: so many threads, no network, huge pages as the command line asks for; for every side."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "THP_MEM_ALLOC_ENABLE": "1"}  # fmt: skip


def child(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run `command` in a process of its own: its last line as JSON, or {"error": the last line of what went wrong}."""
    done = subprocess.run(command, env=environment(threads), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}: out of memory?"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class Side:
    """A process that does one turn of work whenever it is asked, by `serve` at its other end; what it says besides
    goes to a file. `error` holds why it has ended, once it has.
    """

    def __init__(self, command: Sequence[str], threads: int, log: Path) -> None:
        self.log, self.error = log, ""
        with log.open("w") as file:
            self._process = subprocess.Popen(command, env=environment(threads), stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, stderr=file, text=True)  # fmt: skip
        self._read()

    def turn(self, given: Any) -> dict[str, Any]:
        """One turn with `given`: what the work returned, with its seconds and the peak GB so far; {} after an error."""
        if self.error:
            return {}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(given) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the empty answer says so
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        said = self.log.read_text(errors="replace").strip().splitlines()
        self.error = (said or [f"exit {self._process.wait()}: out of memory?"])[-1]
        return {}

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve(prepare: Callable[[], Callable[[Any], dict[str, Any]]]) -> None:
    """The other end of a `Side`: prepare, then one turn for every line of standard input, timed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    work = prepare()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        began = time.monotonic()
        found = work(given)
        seconds = time.monotonic() - began
        print(json.dumps({"seconds": seconds, **found, "peak_gb": peak_gb()}), file=answers, flush=True)


def peak_gb() -> float:
    """The most that this process has held in memory, in GB.

    Not by getrusage: what that says of a process begins with the memory of the one that started it.
    """
    return round(resident("VmHWM"), 3)


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def forget_peak(device: str) -> float:
    """Forget the peak of memory so far, on a GPU of what was allocated there; returns what is held now, in GB."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated() / 1e9)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_since(device: str) -> float:
    """The peak since it was forgotten, in GB."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated() / 1e9)
    return resident("VmHWM")


# Turns within one process.


def turns(sides: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, dict[str, Any]]:
    """Seconds of each side, taking turns, after one turn for warm-up."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs + 1):
        for side, work in sides.items():
            began = time.monotonic()
            work()
            seconds[side].append(time.monotonic() - began)
    return {side: {"seconds": [round(s, 3) for s in each[1:]], "median_s": round(statistics.median(each[1:]), 3)}
            for side, each in seconds.items()}  # fmt: skip


# What sides are given.


def write_model(name: str, folder: Path) -> None:
    """A float32 copy of model `name` that never stops by itself: its end token is the one it is least ready to say."""
    import torch

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(name), load_model(name, torch.float32, "cpu")
    probe = tokenizer(TEXT * 60, return_tensors="pt")["input_ids"][:, :128]
    with torch.no_grad():
        highest_V = model(probe).logits[0, :, : len(tokenizer)].log_softmax(-1).amax(0)
    unlikely = int(highest_V.argmin())
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(unlikely)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = unlikely
    model.config.eos_token_id = model.config.pad_token_id = unlikely
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_random_model(name: str, vocabulary: int, folder: Path) -> None:
    """Model `name` with random weights and `vocabulary` words instead of its own tokens, none of which is an end."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from selftaught.score.client import quiet
    from selftaught.score.hub import load_config

    words = ["<unk>", *dict.fromkeys(TEXT.replace(".", " .").split()), ":", *map(str, range(PROBLEMS + 1))]
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = load_config(name)
    config.vocab_size = vocabulary
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def write_prompts(folder: Path, path: Path, tokens: int = 128) -> None:
    """64 distinct prompts of exactly `tokens` tokens to the model in `folder`, also when decoded and encoded again."""
    from selftaught.score.hub import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer(TEXT * (tokens // 8 + 2), add_special_tokens=False)["input_ids"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, PROBLEMS + 1):
            # The number makes each prompt a problem of its own: the text repeats itself.
            texts = (f"{number}: {tokenizer.decode(ids[:length]).strip()}" for length in range(tokens, 0, -1))
            text = next(t for t in texts if len(tokenizer(t, add_special_tokens=False)["input_ids"]) == tokens)
            file.write(json.dumps({"prompt": text, "answer": "42"}) + "\n")
