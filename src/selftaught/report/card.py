"""The model card of final/: what was trained, how it went, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from selftaught.report.words import best_constant, control_rows, headline, measure_rows, named, number, result_sentence

LOAD = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'folder = "final"  # this folder',
    "model = AutoModelForCausalLM.from_pretrained(folder)",
)


def model_card(
    run: Mapping[str, Any], results: Mapping[str, Any], *, arxiv: str | None = None, base_model: str | None = None
) -> str:
    """README.md with YAML front matter, for the resolved recipe and results.json of a run.

    `arxiv` is the id of the method's paper ("2604.03128"); `base_model` the Hub name of what was trained, by
    default the recipe's `model` where that is a Hub name.
    """
    method = named(run.get("method")) or "unknown"
    model = named(run.get("model"))
    base = base_model or (model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None)
    optim = run.get("optim")
    lora = isinstance(optim, Mapping) and optim.get("lora") is not None
    front: dict[str, Any] = {
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["selftaught", method],
    }
    if base:
        front["base_model"] = base
    steps = optim.get("steps") if isinstance(optim, Mapping) else None
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {model.rstrip('/').rpartition('/')[2] or 'A model'}, trained with {method}",
        "",
        f"{base or model or 'The base model'} trained on its own rollouts with the method `{method}`"
        + (f" for {steps} steps" if steps else "")
        + (f" on `{named(run.get('data'))}`" if named(run.get("data")) else "")
        + ". It can be used for what its base model can be used for, under the same licence and limits.",
        "",
        "## Results",
        "",
        result_sentence(results),
        "",
        *_table(results),
        "## Use",
        "",
        "```python",
        *(_load_adapter(model) if lora else LOAD),
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
        "## Training",
        "",
        "```yaml",
        yaml.safe_dump(_json_like(run), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]
    if arxiv:
        lines += ["## Citation", "", f"The method's paper: [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv}).", ""]
    return "\n".join(lines)


def _load_adapter(model: str) -> tuple[str, ...]:
    """How to load an adapter: peft finds the base by the name in its folder, but for the embedded model's."""
    if model != "quickstart":
        return ("from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", "",
                'folder = "final"  # this folder: an adapter, which names its base model',
                "model = AutoPeftModelForCausalLM.from_pretrained(folder)")  # fmt: skip
    return ("from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            "from selftaught.score.hub import resolve", "", 'folder = "final"  # this folder: an adapter',
            'base = AutoModelForCausalLM.from_pretrained(str(resolve("quickstart")))',
            "model = PeftModel.from_pretrained(base, folder)")  # fmt: skip


def _table(results: Mapping[str, Any]) -> list[str]:
    rows = measure_rows(results)
    if not rows:
        return []
    lines = ["| held-out | before | after | paired difference |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.label} | {row.before} | {row.after} | {row.difference} |" for row in rows]
    name, constant = headline(results), best_constant(results).get("value")
    if constant is not None:
        lines.append(f"| best constant answer ({name}) | {number(constant)} | {number(constant)} | |")
    lines += [f"| {label} ({name}) | | {value} | |" for label, value in control_rows(results)]
    return [*lines, "", "Means over problems; in brackets 95 % bootstrap intervals over problems.", ""]


def _json_like(value: Any) -> Any:
    """Plain mappings, lists and scalars, so that YAML needs no tags."""
    if isinstance(value, Mapping):
        return {str(k): _json_like(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_like(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
