"""Where models come from: a folder, the Hub, or the small model that ships in a package. Weights are safetensors only.

`resolve` turns a recipe's `model` into a place, `check_model` refuses what cannot work before any weight is read, and
`load_config`, `load_tokenizer` and `load_model` load it. A folder may hold an adapter; its base is found by the name in
it. No code that comes with a model is ever run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from selftaught.errors import UserError, nearest
from selftaught.score.adapter import base_of, load_adapter, require_peft
from selftaught.score.client import only_local, quiet, told_plainly
from selftaught.score.quickstart import quickstart_folder

SHIPPED = ("quickstart",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SAVE_AGAIN = "save the model there again with save_pretrained"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve(name: str) -> Path | str:
    """The place of model `name`: the folder of a shipped name, an existing folder, or else a name on the Hub.

    Raises UserError where the name looks like a path that is not there, or is not a folder.
    """
    if name == "quickstart":
        return quickstart_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model: {name!r} is a file; give the folder that holds config.json, or a name on the Hub")
    close = nearest(name, SHIPPED)
    if "/" not in name and close.startswith("did you mean"):
        raise UserError(f"model: {name!r} is neither a folder nor a shipped model; {close}")
    if not HUB_NAME.fullmatch(name):
        remedy = "give an existing folder, a name on the Hub or 'quickstart'"
        raise UserError(f"model: the folder {name!r} does not exist; {remedy}")
    return name


def base_name(name: str) -> str:
    """The model that an adapter's folder names as its base; any other model's own name."""
    place = resolve(name)
    return (base_of(place) if isinstance(place, Path) else None) or name


def lasting_name(name: str) -> str:
    """A name of the model that means the same from any folder of this machine: a folder's is made absolute."""
    return name if name in SHIPPED or not isinstance(resolve(name), Path) else str(Path(name).expanduser().resolve())


def check_model(name: str) -> None:
    """Refuse, before any weight is read, a model that cannot be trained here; the message holds the remedy (UserError).

    A folder must have a config of a causal language model, a tokenizer, and whole safetensors. Of a name on the Hub
    the config and the tokenizer are fetched.
    """
    place = resolve(name)
    if (base := base_name(name)) != name:
        require_peft(f"model: the adapter in {name}")
        try:
            check_model(base)
        except UserError as error:
            raise UserError(f"{error} (it is the base of the adapter in {name}, by its adapter_config.json)") from error
    elif isinstance(place, Path):
        _check_architecture(str(place), _folder_config(place))
        _check_tokenizer_files(place)
        _check_weight_files(place)
    else:
        _check_architecture(place, _hub_config(place))
        load_tokenizer(place)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of model `name`; the padding token is the end-of-sequence token where there is none."""
    from transformers import AutoTokenizer

    place = resolve(name)
    if isinstance(place, Path) and not _has_tokenizer(place):
        place = resolve(base_name(name))
    with told_plainly(name), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            str(place), trust_remote_code=False, local_files_only=only_local(place)
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str) -> Any:
    """The configuration of model `name`; no weight is read."""
    from transformers import AutoConfig

    place = resolve(base_name(name))
    with told_plainly(name), quiet():
        return AutoConfig.from_pretrained(str(place), trust_remote_code=False, local_files_only=only_local(place))


def load_skeleton(name: str) -> Any:
    """The model `name` without its weights: modules, names and shapes alone."""
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_model(name: str, dtype: torch.dtype, device: torch.device | str, attn: str = "sdpa") -> Any:
    """The causal language model `name`, in evaluation mode, on `device`.

    Refuses (UserError) weights that are not safetensors, and weights that leave some of the model at random values.
    """
    from transformers import AutoModelForCausalLM

    base = base_name(name)
    place = resolve(base)
    wanted: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False,
                              "output_loading_info": True, "local_files_only": only_local(place)}
    with told_plainly(base), quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(str(place), attn_implementation=attn, **wanted)
        except ValueError as error:
            if attn == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
            # A family without it: recurrent layers, soft-capped scores. It is then scored in the plain layout.
            model, info = AutoModelForCausalLM.from_pretrained(str(place), attn_implementation="eager", **wanted)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model: the weights of {base!r} lack {len(missing)} tensors of {type(model).__name__}, the first of them "
            f"{missing[0]!r}; save the whole model with save_pretrained"
        )
    model = model.to(device).eval()
    if base != name:
        with told_plainly(name), quiet():
            load_adapter(model, Path(name).expanduser())
    return model


def stop_token_ids(tokenizer: Any, model: Any) -> set[int]:
    """Every token id that ends a response: those of the generation config and the tokenizer's end of sequence."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    ids = listed if isinstance(listed, (list, tuple)) else [listed]
    return {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model: {folder} has no config.json; give the folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model: {path} is not valid JSON ({error}); {SAVE_AGAIN}") from error
    if not isinstance(config, dict):
        raise UserError(f"model: {path} holds no JSON object; {SAVE_AGAIN}")
    return config


def _hub_config(name: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    with told_plainly(name), quiet():
        config, _ = PretrainedConfig.get_config_dict(name, local_files_only=only_local(name))
    return config


def _check_architecture(name: str, config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind = config.get("model_type")
    if kind not in CAUSAL:
        why = "needs code of its own, which is not run" if "auto_map" in config else "is not one that is known here"
        remedy = "choose a causal language model of transformers"
        raise UserError(f"model: {name!r} has model_type {kind!r}, which {why}; {remedy}")
    stated = config.get("architectures") or []
    known = {c for entry in CAUSAL.values() for c in ((entry,) if isinstance(entry, str) else entry)}
    if stated and not known.intersection(stated):
        remedy = "choose one whose config.json names a ...ForCausalLM"
        raise UserError(f"model: {name!r} is a {stated[0]}, not a causal language model; {remedy}")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / f).is_file() for f in TOKENIZER_FILES)


def _check_tokenizer_files(folder: Path) -> None:
    if not _has_tokenizer(folder):
        raise UserError(
            f"model: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); save it there with "
            "tokenizer.save_pretrained(folder)"
        )


def _check_weight_files(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model: {index} cannot be read ({error!r}); {SAVE_AGAIN}") from error
        lost = sorted(s for s in shards if not (folder / s).is_file())
        if lost:
            count = f"{len(lost)} of {len(shards)} weight files, the first {lost[0]!r}"
            raise UserError(f"model: {folder} lacks {count}; fetch them again")
    elif not (folder / "model.safetensors").is_file():
        others = sorted(p.name for suffix in ("bin", "pt", "pth", "gguf") for p in folder.glob(f"*.{suffix}"))
        if others:
            raise UserError(
                f"model: {folder} has no safetensors, only {others[0]!r}; no pickle is loaded: convert it once, "
                "with model.save_pretrained(folder) of a current transformers, where you trust the file"
            )
        raise UserError(f"model: {folder} has no weights (model.safetensors); {SAVE_AGAIN}")
