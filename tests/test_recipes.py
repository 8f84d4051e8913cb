"""The recipes that ship: each resolves, each number has a source, and each takes a real step on a tiny model.

FACTS is typed from the papers and their code, not read from the YAML: what a recipe sets must be what they say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import families
import selftaught
from own import cli, lines
from selftaught.recipe import RECIPES, recipe_names
from selftaught.run import Run, load_run
from tiny import save_tiny, tiny_tokenizer

PAPERS = [name for name in recipe_names() if name.startswith("papers/")]
DOMAINS = ("biology", "chemistry", "material", "physics")
SDPG = ("sdpg-4b", "sdpg-1.7b")
DEMOPSD = tuple(f"demopsd-{domain}" for domain in DOMAINS)
SDPO = ("sdpo", "sdpo-feedback")


class Fact(NamedTuple):
    recipes: tuple[str, ...]
    field: str
    value: Any
    source: str


def _facts() -> Iterator[Fact]:
    def say(recipes: str | tuple[str, ...], source: str, **values: Any) -> Iterator[Fact]:
        names = (recipes,) if isinstance(recipes, str) else recipes
        for field, value in values.items():
            yield Fact(names, field.replace("__", "."), value, source)

    # RLSD, arXiv 2604.03128: section 5 and appendix; code iie-ycx/RLSD 93e46f7; the text run in SDPG's repository.
    yield from say("rlsd", "paper: G, lengths, batch, temperature", rollout__num_generations=8,
                   rollout__prompts_per_step=256, rollout__max_completion_length=4096, data__max_prompt_length=4096,
                   rollout__temperature=1.0)
    yield from say("rlsd", "paper: eps_w, lambda over 50 steps, clip", method__eps_w=0.2, method__lam=0.5,
                   method__lam_decay=50, method__eps_low=0.2, method__eps_high=0.28)
    yield from say("rlsd", "paper: the snapshot is refreshed every 10 steps (code: 20)", method__teacher__every=10,
                   method__teacher__weights="snapshot")
    yield from say("rlsd", "code: core_algos", method__dual_clip=3.0, loss__reduction="token_mean")
    yield from say("rlsd", "paper and code: the optimiser", optim__learning_rate=1e-6, optim__weight_decay=0.01,
                   optim__warmup_steps=0, optim__max_grad_norm=1.0, optim__schedule="constant")
    yield from say("rlsd", "code: one optimiser step per rollout batch, ppo_epochs 1, top-p 1", optim__minibatches=1,
                   optim__updates_per_batch=1, rollout__top_p=1.0)
    yield from say("rlsd", "SDPG's paper: its text run", model="Qwen/Qwen3-4B", optim__steps=400, eval__samples=32,
                   eval__temperature=1.0)
    yield from say("rlsd", "paper: RLSD needs the final answer alone", privilege__kind="answer")

    # SDPG, arXiv 2606.04036, section 3 and appendices; code lauyikfung/SDPG f71329e.
    yield from say(SDPG, "paper: Qwen3, DAPO-Math-17k, 400 steps", optim__steps=400, method__steps=400,
                   rollout__num_generations=8, data__max_prompt_length=2048, rollout__temperature=1.0,
                   data__thinking=True)
    yield from say("sdpg-4b", "paper", model="Qwen/Qwen3-4B", rollout__prompts_per_step=128,
                   rollout__max_completion_length=4096)
    yield from say("sdpg-1.7b", "code: the 1.7B script", model="Qwen/Qwen3-1.7B", rollout__prompts_per_step=256,
                   rollout__max_completion_length=2048)
    yield from say(SDPG, "paper: alpha, beta_base, T_warm, T_decay, gate (code: gate and schedule off)",
                   method__alpha=1e-3, method__beta=1e-3, method__beta_warmup=50, method__beta_decay=350,
                   method__gate="positive", method__reference_kl="urkl")
    yield from say(SDPG, "paper: REINFORCE, no ratio, one update", method__eps_low=None, method__eps_high=None,
                   optim__minibatches=1)
    yield from say(SDPG, "code: top-p 1", rollout__top_p=1.0)
    yield from say(SDPG, "paper: AdamW", optim__learning_rate=1e-6, optim__weight_decay=0.1, optim__betas=[0.9, 0.999],
                   optim__max_grad_norm=1.0, optim__warmup_steps=10)
    yield from say(SDPG, "paper: mean@32 at T = 1; code: every 10", eval__samples=32, eval__temperature=1.0,
                   eval__every=10)
    yield from say(SDPG, "code: the teacher's prompt is cut at max_prompt_length", privilege__max_prompt_length=2048)

    # DemoPSD, arXiv 2607.02502, appendix A and B; SDPO's code where the paper builds on it.
    yield from say(DEMOPSD, "paper: hyper-parameters", rollout__num_generations=8, data__max_prompt_length=2048,
                   rollout__max_completion_length=16384, rollout__temperature=1.0, optim__learning_rate=1e-6,
                   optim__warmup_steps=10, method__alpha_max=0.15, method__top_k=100, method__floor=1e-8,
                   method__is_cap=2.0, method__teacher__rate=0.05, method__reference__rate=0.05,
                   privilege__max_prompt_length=10240, privilege__choose="random", eval__temperature=0.7,
                   eval__samples=16, eval__k=[1, 16])
    yield from say(DEMOPSD, "the curves' steps mean batches of 32 (stated: 64)", rollout__prompts_per_step=32)
    yield from say(DEMOPSD, "code (SDPO)", privilege__threshold=0.5, loss__sampler_cap=2.0, data__thinking=False,
                   optim__weight_decay=0.01)
    for domain, beta, train, test, steps in (("biology", 70, 450, 50, 42), ("chemistry", 25, 1890, 210, 177),
                                             ("material", 50, 841, 94, 78), ("physics", 100, 720, 80, 66)):
        yield from say(f"demopsd-{domain}", "paper: beta per domain, steps of the figure; SDPO's split",
                       method__beta=beta, data__train=train, data__heldout=test, optim__steps=steps)

    # DOPD, arXiv 2606.30626, setup.
    yield from say("dopd", "paper: setup", model="Qwen/Qwen3-1.7B", teacher__model="Qwen/Qwen3-8B",
                   rollout__prompts_per_step=128, rollout__num_generations=4, optim__learning_rate=5e-6,
                   optim__schedule="cosine", optim__steps=200, method__beta_light=0.6, method__beta_weak=0.3,
                   method__top_k=128, method__trim=0.05, data__thinking=False)
    yield from say("dopd", "paper: token mean in a rollout, then rollouts", loss__reduction="sequence_mean")
    for index, weight in enumerate((20, 17, 14)):
        yield from say("dopd", "paper: RaR-Science-20K, DAPO-Math-17K, Skywork-OR1-Coding-14K",
                       **{f"data__source__{index}__weight": weight})

    # SDPO, arXiv 2601.20802; code lasgroup/SDPO 0e6d5106, the two experiments' scripts over the YAML.
    yield from say(SDPO, "code", model="Qwen/Qwen3-8B", rollout__prompts_per_step=32, rollout__num_generations=8,
                   data__max_prompt_length=2048, rollout__max_completion_length=8192, rollout__temperature=1.0,
                   privilege__max_prompt_length=10240, method__is_cap=2.0, loss__sampler_cap=2.0, data__thinking=False,
                   optim__weight_decay=0.01, eval__temperature=0.6, eval__top_p=0.95)
    yield from say("sdpo", "code: without feedback", method__divergence="js", method__top_k=100,
                   optim__learning_rate=1e-5, optim__warmup_steps=10, method__teacher__rate=0.05,
                   privilege__threshold=0.5, data__train=1890, data__heldout=210, eval__samples=16,
                   optim__minibatches=1)
    yield from say("sdpo-feedback", "code: with rich feedback", method__divergence="kl_student_teacher",
                   method__top_k=20, optim__learning_rate=1e-6, optim__warmup_steps=0, method__teacher__rate=0.01,
                   optim__minibatches=32, eval__samples=4, privilege__parts__0__threshold=0.5)

    # OPSD, arXiv 2601.18734 v3, and the code of 18 March 2026.
    yield from say("opsd", "paper v3", rollout__prompts_per_step=32, rollout__num_generations=1,
                   rollout__max_completion_length=1024, rollout__temperature=1.1, rollout__top_p=0.95,
                   rollout__top_k=20, optim__learning_rate=5e-6, optim__max_grad_norm=0.1, optim__steps=100,
                   optim__lora__rank=64, optim__lora__alpha=128, optim__lora__target_modules="all-linear",
                   method__clip=0.05, eval__samples=12, data__thinking=False, privilege__thinking=True)
    yield from say("opsd", "code", method__temperature=1.1, method__teacher__weights="initial",
                   privilege__max_prompt_length=20000 - 1024)

    # SDFT, arXiv 2601.19897; main.py of the official repository, as forks have it.
    yield from say("sdft", "code: main.py", model="Qwen/Qwen2.5-7B-Instruct", rollout__prompts_per_step=32,
                   rollout__num_generations=1, data__max_prompt_length=1024, rollout__max_completion_length=1024,
                   rollout__temperature=1.0, method__temperature=1.0, method__skip=3, method__teacher__rate=0.01,
                   optim__learning_rate=2e-5, optim__schedule="cosine", optim__max_grad_norm=1.0)
    yield from say("sdft", "code: a warm-up of 0.1 of one epoch", optim__warmup_steps=round(0.1 * (4046 // 32)))
    yield from say("sdft", "per rollout, then mean", loss__reduction="sequence_mean")

    # On-policy distillation, tinker-cookbook 9dfcc3a2.
    yield from say("opd", "code: the script's defaults", rollout__num_generations=4, rollout__temperature=1.0,
                   rollout__max_completion_length=4096, method__coef=1.0, eval__every=20, optim__learning_rate=1e-4,
                   optim__lora__rank=128)
    yield from say("opd", "code: 1 substep", optim__minibatches=1)
    yield from say("opd", "the first README, whose run is Qwen3-8B-Base", model="Qwen/Qwen3-8B-Base",
                   rollout__prompts_per_step=512, optim__steps=100)

    # DAPO, arXiv 2503.14476, section 4.1; verl's recipe/dapo.
    yield from say("dapo", "paper 4.1", model="Qwen/Qwen2.5-32B", rollout__prompts_per_step=512,
                   rollout__num_generations=16, rollout__max_completion_length=20480, method__eps_low=0.2,
                   method__eps_high=0.28, optim__learning_rate=1e-6, optim__warmup_steps=20, optim__minibatches=16,
                   eval__samples=32, eval__temperature=1.0, eval__top_p=0.7)
    yield from say("dapo", "paper equations 7 and 13", reward__parts__0__weight=2.0, reward__parts__1__max_length=20480,
                   reward__parts__1__buffer=4096, reward__parts__1__weight=1.0)
    yield from say("dapo", "code: verl", data__max_prompt_length=2048, rollout__temperature=1.0,
                   rollout__filter_groups="right", rollout__max_resample=10 * 3 - 1, optim__weight_decay=0.1,
                   optim__max_grad_norm=1.0, eval__every=5, loss__reduction="token_mean")


FACTS = list(_facts())

# What optim, loss, rollout and method have from the trainer's defaults: neither the recipe's paper nor its code, as far
# as they could be read, states it. What a recipe writes down and calls "ours" is in its own comments.
ADAM = {"optim.betas", "optim.eps"}
ONE_UPDATE = {"optim.updates_per_batch", "optim.minibatches"}
WHOLE = {"rollout.top_p"}
UNDECAYED = {"optim.warmup_steps", "optim.weight_decay"}
NORM, FLOOR = {"optim.max_grad_norm"}, {"optim.min_lr_ratio"}
OURS: dict[str, set[str]] = {
    "rlsd": ADAM,
    **{name: {"optim.eps", "optim.updates_per_batch"} for name in SDPG},
    **{name: ADAM | NORM | ONE_UPDATE | WHOLE for name in DEMOPSD},
    "dopd": ADAM | NORM | ONE_UPDATE | WHOLE | UNDECAYED | FLOOR,
    **{name: ADAM | NORM | WHOLE | {"optim.updates_per_batch"} for name in SDPO},
    "opsd": ADAM | ONE_UPDATE | UNDECAYED,
    "sdft": ADAM | ONE_UPDATE | WHOLE | {"optim.weight_decay"} | FLOOR,
    "opd": ADAM | NORM | WHOLE | UNDECAYED | {"optim.updates_per_batch"},
    "dapo": ADAM | WHOLE | {"optim.updates_per_batch"},
}
# Of no consequence for what is learnt: how the work is cut, when a faulty run stops, the one value that there is.
IDLE = {"rollout.max_rows", "rollout.max_logp_gap", "optim.token_budget", "optim.lora.dropout"}


def resolved(name: str) -> dict[str, Any]:
    """The run as plain data, with the method's own defaults and its views beside what the recipe sets."""
    run = load_run(f"papers/{name}")
    tree = run.resolved()
    method = run.method.build()
    fields = {field: getattr(method, field) for field in type(method).__dataclass_fields__ if field != "views"}
    views = {view: {"weights": v.weights, "every": v.every, "rate": v.rate} for view, v in method.views.items()}
    return {**tree, "method": {**fields, **views}}


def resolved_numbers(tree: Any, path: str) -> Iterator[str]:
    """Dotted fields of every number in plain data; a list of numbers is one."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from resolved_numbers(value, f"{path}.{key}")
    elif isinstance(tree, bool) or not isinstance(tree, int | float | list | tuple):
        return
    elif isinstance(tree, int | float) or (tree and all(isinstance(item, int | float) for item in tree)):
        yield path
    else:
        for index, value in enumerate(tree):
            yield from resolved_numbers(value, f"{path}.{index}")


def inherited(tree: dict[str, Any]) -> set[str]:
    """Numbers that change how a resolved recipe trains, without those that its other fields leave idle."""
    idle = {*IDLE, *({"rollout.max_resample"} if not tree["rollout"]["filter_groups"] else set()),
            *({"optim.min_lr_ratio"} if tree["optim"]["schedule"] == "constant" else set())}
    return {field for section in ("optim", "loss", "rollout", "method")
            for field in resolved_numbers(tree[section], section)} - idle


def at(tree: Any, field: str) -> Any:
    for key in field.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return list(tree) if isinstance(tree, tuple) else tree


def text_of(name: str) -> str:
    return (Path(str(RECIPES)) / f"{name}.yaml").read_text(encoding="utf-8")


def numbers(text: str) -> Iterator[tuple[str, str]]:
    """(dotted field, comment of its line) of every number that a recipe sets; a list of numbers is one."""

    def walk(node: yaml.Node, path: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, f"{path}.{key.value}" if path else key.value)
        elif isinstance(node, yaml.SequenceNode):
            if node.value and all(is_number(item) for item in node.value):
                yield path, node.end_mark.line
            else:
                for index, item in enumerate(node.value):
                    yield from walk(item, f"{path}.{index}")
        elif is_number(node):
            yield path, node.start_mark.line

    rows = text.split("\n")
    for path, line in walk(yaml.compose(text, Loader=yaml.SafeLoader), ""):
        yield path, rows[line].partition("#")[2].strip()


def is_number(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def unsourced(text: str, known: set[str]) -> list[str]:
    """Numbers whose line names no source, and those called the papers' or the code's that `known` does not hold."""
    found = []
    for field, comment in numbers(text):
        ours = re.match(r"ours: \S", comment)
        theirs = re.match(r"(?:paper|code)\b", comment)
        if not ours and not (theirs and field in known):
            found.append(field)
    return found


# What ships.


def test_the_published_runs_ship() -> None:
    names = {"rlsd", *SDPG, *DEMOPSD, "dopd", *SDPO, "opsd", "sdft", "opd", "dapo"}
    assert {f"papers/{name}" for name in names} == set(PAPERS)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_its_resolved_run_is_the_same_recipe_again(name: str) -> None:
    run = load_run(name)
    assert isinstance(run, Run) and load_run(run.resolved()) == run


@pytest.mark.parametrize("name", PAPERS)
def test_a_dry_run_without_the_hub_prints_the_run_and_says_what_it_did_not_look_at(name: str) -> None:
    said = cli("train", name, "--dry-run")
    assert said.code == 0, said.err
    tree = yaml.safe_load(said.out)
    assert load_run(tree) == load_run(name)
    assert f"# not looked at: model: {tree['model']!r}" in said.out and "are not checked" in said.out


def test_a_dry_run_says_the_same_of_data_that_the_hub_has(tmp_path: Path) -> None:
    said = cli("train", "papers/sdpg-4b", "--dry-run", f"model={save_tiny(tmp_path)}")
    assert said.code == 0 and "# not looked at: data.source: 'open-r1/DAPO-Math-17k-Processed:en'" in said.out
    gone = cli("train", "papers/sdpg-4b", "--dry-run", f"model={tmp_path}", "data.source=gone.jsonl")
    assert gone.code == 2 and "no file 'gone.jsonl'" in gone.err  # what is no matter of the network is still refused


@pytest.mark.parametrize("fact", [(name, fact) for fact in FACTS for name in fact.recipes],
                         ids=lambda pair: f"{pair[0]}-{pair[1].field}")
def test_a_resolved_recipe_holds_what_paper_and_code_say(fact: tuple[str, Fact], runs: dict[str, Any]) -> None:
    name, (_, field, value, source) = fact
    if name not in runs:
        runs[name] = resolved(name)
    assert at(runs[name], field) == value, source


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("name", PAPERS)
def test_every_number_has_a_source_and_every_published_one_is_in_the_table(name: str) -> None:
    short = name.removeprefix("papers/")
    known = {fact.field for fact in FACTS if short in fact.recipes}
    assert unsourced(text_of(name), known) == []


@pytest.mark.parametrize("name", PAPERS)
def test_a_default_that_changes_training_is_published_or_known_to_be_ours(name: str, runs: dict[str, Any]) -> None:
    short = name.removeprefix("papers/")
    if short not in runs:
        runs[short] = resolved(short)
    known = {fact.field for fact in FACTS if short in fact.recipes}
    written = {field for field, _ in numbers(text_of(name))}
    assert inherited(runs[short]) - known - written == OURS[short]


def test_a_number_without_a_source_is_found() -> None:
    text = ("a: 1\nb: 2  # ours\nc: 3  # paper\nd: 4  # paper, table 1\ne: {f: 0.5, g: [1, 2]}  # code\n"
            "h: 1.0e-6  # ours: x\n")  # fmt: skip
    assert unsourced(text, {"d", "e.f"}) == ["a", "b", "c", "e.g"]
    assert [field for field, _ in numbers("a: '1'\nb: true\nc: [x, 2]\n")] == ["c.1"]


# One real step.


QUESTION = "What is one and one, and how do you know?"
REWARD = '''\
from selftaught import Verdict

def run_tests(completions, **columns):
    return [Verdict(float("pass" in text), "right" if "pass" in text else "wrong", f"the tests saw {len(text)} signs")
            for text in completions]
'''


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{number}. {QUESTION}"}]


def verl_row(number: int, truth: str) -> dict[str, Any]:
    """The columns that verl's, DAPO's and SDPO's files have."""
    return {"data_source": "made", "prompt": chat(number), "ability": "x", "extra_info": {"index": str(number)},
            "reward_model": {"style": "x", "ground_truth": truth}}


def dapo_row(number: int) -> dict[str, Any]:
    return {"prompt": f"{number}. {QUESTION}", "solution": "2", "data_source": "made", "ability": "math",
            "source_prompt": chat(number), "reward_model": {"style": "x", "ground_truth": "2"}}


class Made(NamedTuple):
    """What stands in for a recipe's model and data: architecture, a row, what its tiny model says, and what to see."""

    model: str
    row: Callable[[int], dict[str, Any]]
    says: tuple[str, ...]
    moved: tuple[str, ...]  # metrics that are not zero where the method did its own work
    more: tuple[str, ...] = ()  # further sizes


def choice_row(number: int) -> dict[str, Any]:
    return verl_row(number, "A")


BOXED = (r"\boxed{2}", r"\boxed{3}")
CHOICE = ("Answer: A\n", "Answer: B\n")
LIMITS = ("privilege.max_prompt_length=400",)
MADE = {
    "rlsd": Made("qwen3", dapo_row, BOXED, ("method/advantage_std", "method/weight_std", "teacher/gap_abs")),
    **{name: Made("qwen3", dapo_row, BOXED, ("method/advantage_std", "method/gate", "method/kl"), LIMITS)
       for name in SDPG},
    **{name: Made("qwen3", choice_row, CHOICE, ("method/alpha", "method/disagreement"), (*LIMITS, "data.train=6"))
       for name in DEMOPSD},
    "dopd": Made("qwen3", lambda n: {"question": f"{n}. {QUESTION}", "hint": f"Count, then add {n}."}, BOXED,
                 ("teacher/gap_abs",), ("privilege.max_tokens=64",)),
    "sdpo": Made("qwen3", choice_row, CHOICE, ("loss", "teacher/gap_abs"), (*LIMITS, "data.train=6")),
    "sdpo-feedback": Made("qwen3", lambda n: verl_row(n, "tests"), ("pass", "fail"), ("loss", "teacher/gap_abs"),
                          (*LIMITS, "optim.minibatches=2")),
    "opsd": Made("qwen3", lambda n: {"problem": f"{n}. {QUESTION}", "solution": "One and one is two.", "Answer": "2"},
                 BOXED, ("loss", "teacher/gap_abs"), LIMITS),
    "sdft": Made("qwen2", lambda n: {"prompt": f"{n}. {QUESTION}", "golden_response": ["Action: add", "Input: {}"],
                                     "name": "adder"}, BOXED, ("loss", "teacher/gap_abs")),
    "opd": Made("qwen3", lambda n: {"question": f"{n}. {QUESTION}", "final_answer": "2", "r1_solution_1": "two"},
                BOXED, ("method/gap",)),
    "dapo": Made("qwen2", lambda n: verl_row(n, "2"), ("Answer: 2\n", "Answer: 3\n"),
                 ("method/advantage_std", "rewards/length/mean"),
                 ('reward.parts=[{name: math, extract: "after:Answer:", weight: 2.0}, '
                  "{name: length, max_length: 6, buffer: 5}]", "optim.minibatches=2", "rollout.max_resample=3")),
}


def test_every_paper_recipe_takes_a_real_step() -> None:
    assert {f"papers/{name}" for name in MADE} == set(PAPERS)


def save_model(folder: Path, made: Made, seed: int = 0) -> Path:
    """A random model of the recipe's architecture that says little but `made.says`, so that rewards differ.

    One direction of the residual stream is held apart as a bias: no layer writes to it, and the head reads it.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(made.says))
    model = getattr(families, made.model)(seed, vocab_size=len(tokenizer), max_position_embeddings=1024)
    said = [*tokenizer.convert_tokens_to_ids(list(made.says)), tokenizer.eos_token_id]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 4.0
        model.model.norm.weight[0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = -4.0
        model.lm_head.weight[said, 0] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, made: Made, start: int) -> Path:
    path.write_text("".join(json.dumps(made.row(number)) + "\n" for number in range(start, start + 8)))
    return path


def sizes(name: str, made: Made, home: Path) -> list[str]:
    """Overrides of sizes and places alone; every other field is the recipe's."""
    tree = yaml.safe_load(text_of(f"papers/{name}"))
    source = str(write_rows(home / "made.jsonl", made, 0))
    if isinstance(tree["data"]["source"], list):
        parts = [{**part, "source": str(write_rows(home / f"made-{index}.jsonl", made, 8 * index))}
                 for index, part in enumerate(tree["data"]["source"])]  # fmt: skip
        source = json.dumps(parts)
    workers = ["reward.workers=1"] if "reward" in tree else []
    group = [] if tree["rollout"]["num_generations"] == 1 else ["rollout.num_generations=4"]
    teacher = [f"teacher.model={save_model(home / 'teacher', made, seed=1)}"] if "teacher" in tree else []
    return [
        f"model={save_model(home / 'model', made)}", *teacher, f"data.source={source}",
        "data.heldout=0", "data.max_prompt_length=400", "rollout.prompts_per_step=4", *group,
        "rollout.max_completion_length=6", "optim.steps=1", "optim.warmup_steps=0", "optim.token_budget=2000",
        *workers, *made.more, f"out={home / 'run'}", "report.to=[]", "report.html=false", "device=cpu",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_every_recipe_takes_a_real_step_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MADE[name]
    monkeypatch.chdir(tmp_path)  # where the recipe looks for a reward of the user's own
    (tmp_path / "lcb.py").write_text(REWARD)
    run = selftaught.train(f"papers/{name}", overrides=sizes(name, made, tmp_path), console=Console(quiet=True))
    (step,) = (row for row in lines(run.folder / "metrics.jsonl") if row["step"] == 1)
    assert step["grad_norm"] > 0 and not step["skipped"]
    for metric in made.moved:
        assert step[metric] != 0, (metric, step)
    assert moved(run.folder / "checkpoints" / "step-1", tmp_path / "model")


def moved(checkpoint: Path, model: Path) -> bool:
    """Did the float32 weights leave where they began? Adapters have no others, and their second matrices begin at 0."""
    trained = load_file(checkpoint / "model.safetensors")
    if adapters := [value for key, value in trained.items() if "lora_B" in key]:
        return all(value.abs().max().item() > 0 for value in adapters)
    start, saved = load_file(model / "model.safetensors"), load_file(checkpoint / "optimizer.safetensors")
    return all((value - start[key.removeprefix("master/")].bfloat16().float()).abs().max().item() > 0
               for key, value in saved.items() if key.startswith("master/"))
