"""From a Run to the live parts of a training: everything a user can get wrong is refused before the model loads."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from selftaught import data, privilege, reward
from selftaught.data import Cursor, Dataset, Renderer
from selftaught.engines import Client, connect, freed_on_error, make_engine
from selftaught.errors import UserError
from selftaught.heap import fix_heap
from selftaught.methods import Method, Several, checked
from selftaught.optim import Optimizer, Teachers
from selftaught.records import (
    Batch,
    Privilege,
    Problem,
    Request,
    Rollout,
    Sampling,
    Say,
    TokenBatch,
    Verdict,
    privileged_views,
)
from selftaught.report import check_trackers
from selftaught.reward import Rewarder
from selftaught.rollout import Engine
from selftaught.run import Run
from selftaught.score import Backbone, Scorer
from selftaught.score.adapter import add_adapter, require_peft, targets
from selftaught.score.backbone import probe
from selftaught.score.external import about_teacher, digest, id_bytes, shared_rows
from selftaught.score.hub import (
    SHIPPED,
    base_name,
    check_model,
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
)

PROBE = 2  # problems on which the layouts are compared before the first step


@dataclass(frozen=True)
class Ground:
    """What stands before a model is loaded: the problems, how they become prompts, and how answers are scored."""

    run: Run
    method: Method
    tokenizer: Any
    dataset: Dataset
    renderer: Renderer
    rewarder: Rewarder | None
    rows: int | None = None  # of the vocabulary that student and external teacher share; None: all of the student's
    room: int | None = None  # tokens that a privileged prompt may have at most; None: no limit

    @property
    def privileged(self) -> bool:
        """Does any view of the method see a privilege?"""
        return bool(privileged_views(self.method.views))


@dataclass(frozen=True)
class External:
    """The teacher that is another model: frozen, in evaluation mode, never saved; `digest` of its weights is."""

    name: str
    backbone: Backbone
    engine: Engine  # for its own answers, which an evaluation's controls ask
    digest: str

    def refuse_change(self, digest: str | None) -> None:
        """Raise UserError where a run began with other weights under this name."""
        if digest != self.digest:
            raise UserError(f"teacher.model = {self.name!r}: its weights are not those that this run began with; put "
                            "them back, or begin anew with another out")


@dataclass(frozen=True)
class Parts:
    """The live parts of a run; `base` is the digest of the weights under an adapter, None where none is trained."""

    ground: Ground
    backbone: Backbone
    engine: Engine
    teachers: Teachers
    optimizer: Optimizer
    scorer: Scorer
    cursor: Cursor
    external: External | None = None
    base: str | None = None

    def refuse_change(self, base: str | None) -> None:
        """Raise UserError where a run's adapter began over other weights."""
        if base != self.base:
            raise UserError(f"model = {self.ground.run.model!r}: its weights are not those that this run's adapter "
                            "began with; put them back, or begin anew with another out")

    @property
    def sampling(self) -> Sampling:
        return self.ground.run.rollout.sampling()


def lay_ground(run: Run, say: Say, functions: Mapping[str, Callable[..., Any]] | None = None, *,
               trains: bool = True) -> Ground:
    """Check and load everything but the weights. Raises UserError with the remedy for whatever cannot work.

    An adapter's folder can be evaluated (`trains` False), but not trained on. Held-out problems that cannot be
    judged are left out of an evaluation; a training refuses them.
    """
    method = run.method.build()
    if trains:
        check_trackers(run.report)
    device_of(run)
    if run.model in SHIPPED:  # to look at it may be to fetch and convert it, for half a minute
        data.check(run.data)
    check_model(run.model)
    if trains and (base := base_name(run.model)) != run.model:
        raise UserError(f"model: {run.model!r} is an adapter, which can be evaluated but not trained on; train a new "
                        f"one on its base (model: {base}, with optim.lora), or merge it into its base and train that")
    check_vocabulary(run, method)
    if run.optim.lora is not None:
        require_peft("optim.lora")
        targets(load_skeleton(run.model), run.optim.lora.target_modules)
    tokenizer = load_tokenizer(run.model)
    rows = check_teacher(run, tokenizer, say)
    dataset = data.load(run.data, seed=run.seed, say=say)
    renderer = Renderer(tokenizer, run.data, dataset.shots)
    dataset = data.fit(dataset, renderer, say=say)
    if run.reward is not None and not trains:
        dataset = replace(dataset, heldout=reward.judgeable(run.reward, dataset.heldout, say))
    problems = [*dataset.train, *dataset.heldout]
    if run.rollout.prompts_per_step > len(dataset.train):
        raise UserError(f"rollout.prompts_per_step = {run.rollout.prompts_per_step}, but there are only "
                        f"{len(dataset.train)} training problems; lower it or raise data.train")
    if run.privilege is not None:
        privilege.check(run.privilege, problems)
        if run.privilege.thinking is not None and not renderer.has_thinking_switch(problems[0]):
            raise UserError(f"privilege.thinking = {str(run.privilege.thinking).lower()}: the prompt has no such "
                            "switch, because its template is a completion or knows no enable_thinking; remove it, or "
                            "use a model that has one")
    privileged = bool(privileged_views(method.views))
    if privileged and run.privilege is not None and run.privilege.teachers > 1:
        assert run.privilege.combine != "together"
        several = Several(method, run.privilege.teachers, run.privilege.combine)
        method = cast(Method, several)  # a method by all that is asked of one, but its name is not its class's
    check_context(run, tokenizer, renderer, dataset, privileged)
    rewarder = None
    if run.reward is not None:
        reward.check(run.reward, problems if trains else dataset.heldout, functions)
        rewarder = Rewarder(run.reward, functions)
    return Ground(run, checked(method), tokenizer, dataset, renderer, rewarder, rows, room_of(run))


def check_vocabulary(run: Run, method: Method) -> None:
    """Refuse a method's `top_k` of more tokens than the model's vocabulary has."""
    top_k, size = getattr(method, "top_k", None), load_config(run.model).get_text_config().vocab_size
    if top_k is not None and top_k > size:
        raise UserError(f"method.top_k = {top_k}: the model's vocabulary has {size} tokens; lower it, or set "
                        "method.top_k=null for the whole vocabulary")


def check_teacher(run: Run, tokenizer: Any, say: Say) -> int | None:
    """The vocabulary rows that the student shares with the recipe's teacher, if there is one.

    Raises UserError for a teacher that cannot be loaded, or whose token ids do not mean what the student's mean.
    """
    if run.teacher is None:
        return None
    with about_teacher():
        check_model(run.teacher.model)
        theirs, teacher_config = load_tokenizer(run.teacher.model), load_config(run.teacher.model).get_text_config()
    own = load_config(run.model).get_text_config().vocab_size
    try:
        rows = shared_rows(id_bytes(tokenizer), id_bytes(theirs), own, teacher_config.vocab_size)
    except UserError as error:
        raise UserError(f"teacher.model = {run.teacher.model!r}: {error}") from error
    for whose, size in (("student", own), ("teacher", teacher_config.vocab_size)):
        if size > rows:
            say(f"vocabulary rows {rows} to {size - 1} of the {whose} are no tokens to both: left out")
    return rows


def check_context(run: Run, tokenizer: Any, renderer: Renderer, dataset: Dataset, privileged: bool) -> None:
    """Refuse a context or a token budget that is too short for the longest prompt and one response.

    The longest privileged prompt counts too, where the method's teacher reads one or an evaluation asks it; evidence
    that rollouts will make counts at its longest.
    """
    problems = [*dataset.train, *dataset.heldout]
    limit = context_of(run.model)
    written = run.rollout.max_completion_length
    longest = {"prompt": max(len(renderer.prompt(problem).token_ids) for problem in problems)}
    shorten = {"prompt": "set data.max_prompt_length with data.on_overflow=drop",
               "privileged prompt": "set privilege.max_prompt_length or privilege.max_tokens"}
    asked = dict(longest)
    if run.privilege is not None and run.eval.controls and dataset.heldout:
        asked["privileged prompt"] = privilege.longest(run.privilege, dataset.heldout, dataset.train, renderer,
                                                       seed=run.seed, written=None)
    if run.privilege is not None and privileged:
        longest["privileged prompt"] = privilege.longest(run.privilege, problems, dataset.train, renderer,
                                                         seed=run.seed, written=written)
    for what, size in longest.items():
        need = size + written
        if limit is not None and need > limit:
            raise UserError(f"rollout.max_completion_length = {written}: with the longest {what} of {size} tokens that "
                            f"is {need}, and the model's context has {limit}; lower it, or {shorten[what]}")
        if need > run.optim.token_budget:
            raise UserError(f"optim.token_budget = {run.optim.token_budget}: the longest {what} ({size} tokens) and "
                            f"one response ({written}) need {need}; raise it to at least that")
    evaluated = run.eval.max_completion_length or written
    for what, size in asked.items():
        if limit is not None and size + evaluated > limit:
            raise UserError(f"eval.max_completion_length = {evaluated}: with the longest {what} of {size} tokens it is "
                            f"over the model's context of {limit}; lower it to {limit - size}, or {shorten[what]}")
    if run.teacher is not None:
        views = run.method.build().views.values()
        if all(view.context == "plain" for view in views if view.weights == "external"):
            longest.pop("privileged prompt", None)
        limit = context_of(run.teacher.model)
        written = max(written, evaluated) if run.eval.controls and dataset.heldout else written
        what, size = max(longest.items(), key=lambda each: each[1])
        if limit is not None and size + written > limit:
            raise UserError(f"teacher.model = {run.teacher.model!r}: its context has {limit} tokens, and the longest "
                            f"{what} ({size}) with one response ({written}) needs {size + written}; shorten the "
                            f"response, or {shorten[what]}")


def context_of(model: str) -> int | None:
    """The tokens that a model's context holds, where its config says so."""
    return getattr(load_config(model).get_text_config(), "max_position_embeddings", None)


def room_of(run: Run) -> int:
    """The tokens that a privileged prompt may have beside the longest response, in every model that reads it.

    Before a run the longest prompt is checked; but what a verifier will say, nobody knows.
    """
    readers = {view.weights == "external" for view in run.method.build().views.values() if view.context == "privileged"}
    names = [run.teacher.model if external and run.teacher else run.model for external in readers]
    limits = [limit for name in names if (limit := context_of(name)) is not None]
    return min([run.optim.token_budget, *limits]) - run.rollout.max_completion_length


def device_of(run: Run) -> str:
    """The device that the run names; auto is a GPU where there is one. Raises UserError where it is not there."""
    if run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=run.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {run.device!r}: this machine or this build of torch has no such device ({reason}); "
                        "use auto or cpu") from error
    return run.device


def load_engine(ground: Ground) -> tuple[Backbone, Engine]:
    """Load the weights, with a new adapter if the run trains one, compare the layouts, and make the sampler."""
    run, lora = ground.run, ground.run.optim.lora
    if device_of(run) == "cpu":
        fix_heap()
    vllm = connect(run, device_of(run), ground.dataset, ground.renderer)
    with freed_on_error(vllm):
        model = load_model(run.model, getattr(torch, run.optim.dtype), device_of(run))
        if lora is not None:
            add_adapter(model, lora.rank, lora.alpha, lora.target_modules, run.seed)
        return _probed(ground, model, run.score.layout, vllm)


def load_external(ground: Ground) -> External | None:
    """The recipe's teacher, if it names one, loaded and probed as the student is; nothing of it will be trained."""
    run, config = ground.run, ground.run.teacher
    if config is None:
        return None
    with about_teacher():
        model = load_model(config.model, getattr(torch, config.dtype or run.optim.dtype), device_of(run))
        model.requires_grad_(False)
        backbone, engine = _probed(ground, model, config.layout)
    return External(config.model, backbone, engine, digest(model))


def _probed(ground: Ground, model: Any, layout: str, vllm: Client | None = None) -> tuple[Backbone, Engine]:
    """A loaded model with its layout compared on a probe batch, and its sampler."""
    run = ground.run
    backbone = Backbone(model, layout, ground.rows)
    prompts = [ground.renderer.prompt(problem).token_ids for problem in ground.dataset.train[:PROBE]]
    backbone.verify(*probe(prompts, run.rollout.max_completion_length))
    return backbone, make_engine(run, vllm, backbone, ground.tokenizer)


def assemble(ground: Ground) -> Parts:
    """Load the weights and put the parts together."""
    backbone, engine = load_engine(ground)
    with freed_on_error(engine):
        return _parts(ground, backbone, engine)


def _parts(ground: Ground, backbone: Backbone, engine: Engine) -> Parts:
    run, method, model = ground.run, ground.method, backbone.model
    if run.optim.lora is None:
        model.requires_grad_(True)
    if run.optim.activation_checkpointing:
        backbone.checkpoint_activations()
    optimizer = Optimizer(model.named_parameters(), run.optim, run.seed)
    teachers = Teachers(method.views, model)
    external = load_external(ground)
    scorer = Scorer(backbone, method.views, teachers.weights, run.optim.token_budget, run.rollout.temperature,
                    external.backbone if external else None)
    cursor = Cursor(ground.dataset.train, seed=run.seed)
    base = None if run.optim.lora is None else digest(model, trained=False)
    return Parts(ground, backbone, engine, teachers, optimizer, scorer, cursor, external, base)


def requests(ground: Ground, problems: Sequence[Problem], step: int) -> list[Request]:
    """What the engine is asked: the student's prompt of each problem."""
    return [Request(problem, ground.renderer.prompt(problem), step, ground.run.seed) for problem in problems]


def sample_and_verify(ground: Ground, engine: Engine, asked: Sequence[Request], n: int,
                      sampling: Sampling) -> tuple[list[Rollout], list[Verdict]]:
    """n rollouts of each request and their verdicts; what has been sampled is verified while the rest is sampled."""
    rollouts: list[Rollout] = []
    pending = []
    engine.submit(asked, n, sampling)
    while batch := engine.poll():
        rollouts += batch
        if ground.rewarder is not None:
            pending.append(ground.rewarder.submit(batch))
    verdicts = [verdict for part in pending for verdict in part.result()]
    return rollouts, verdicts or [Verdict(None)] * len(rollouts)


def shuffled(verdicts: Sequence[Verdict], seed: int, step: int, draw: int = 0) -> list[Verdict]:
    """The control of `reward.shuffle`: the same scores, dealt out anew at random, keyed by (seed, step, draw).

    Each takes its status along: else a demonstration would still be chosen by the true one.
    """
    dealt = list(verdicts)
    random.Random(f"{seed}/{step}/{draw}" if draw else f"{seed}/{step}").shuffle(dealt)
    return [replace(verdict, score=other.score, status=other.status)
            for verdict, other in zip(verdicts, dealt, strict=True)]


def privileges_of(ground: Ground, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict],
                  step: int) -> list[Privilege | None]:
    """The privilege of each rollout, or None where the method's views see none."""
    run = ground.run
    if run.privilege is None or not ground.privileged:
        return [None] * len(rollouts)
    return privilege.build(run.privilege, rollouts, verdicts, ground.dataset.train, ground.renderer,
                           seed=run.seed, step=step, room=ground.room)


def make_batch(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], privileges: Sequence[Privilege | None],
               step: int, device: torch.device | str = "cpu", *, mask_truncated: bool = False) -> Batch:
    """One rollout batch, ragged: tokens of all rollouts in order, and the prompts of both contexts.

    With `mask_truncated` the tokens of rollouts cut at the length limit are masked; their scores stay.
    """
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
    groups = {rollout.problem.id: index for index, rollout in reversed(list(enumerate(rollouts)))}
    written = [(False,) * len(rollout.token_ids) if mask_truncated and rollout.finish == "length"
               else rollout.loss_mask or (True,) * len(rollout.token_ids) for rollout in rollouts]
    terminal = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    ends = lengths.cumsum(0) - 1
    terminal[ends] = torch.tensor([rollout.finish == "stop" for rollout in rollouts])
    scores = [float("nan") if verdict.score is None else verdict.score for verdict in verdicts]
    tokens = TokenBatch(
        tokens=torch.tensor([t for rollout in rollouts for t in rollout.token_ids]).to(device),
        sequence_ids=torch.arange(len(rollouts)).repeat_interleave(lengths).to(device),
        reward=torch.tensor(scores).to(device),
        group=torch.tensor([groups[rollout.problem.id] for rollout in rollouts]).to(device),
        privileged=torch.tensor([p is not None for p in privileges]).to(device),
        privileges=torch.tensor([0 if p is None else 1 + len(p.others) for p in privileges]).to(device),
        terminal=terminal.to(device),
        mask=torch.tensor([flag for row in written for flag in row]).to(device),
        logp_sampler=torch.tensor([p for rollout in rollouts for p in rollout.logp_sampler]).to(device),
        step=step,
    )
    plain = tuple(rollout.prompt.token_ids for rollout in rollouts)
    seen = tuple(prompt if p is None else p.prompt.token_ids for prompt, p in zip(plain, privileges, strict=True))
    contexts = {"plain": plain, "privileged": seen}
    for nth in range(max((len(p.others) for p in privileges if p is not None), default=0)):
        contexts[f"privileged.{nth + 1}"] = tuple(
            p.others[nth].prompt.token_ids if p is not None and nth < len(p.others) else () for p in privileges)
    return Batch(tokens, contexts, tuple(rollout.token_ids for rollout in rollouts))
