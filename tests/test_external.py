"""A teacher that is another model: its width, its head, its vocabulary; checked first, never touched, never saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import selftaught
from own import cli, lines, make_home, recipe_of, without_clocks, write_recipe
from selftaught import assemble
from selftaught.assemble import lay_ground, make_batch
from selftaught.errors import UserError
from selftaught.forecast import forecast
from selftaught.loss import chunked_loss
from selftaught.methods import batch_credit, build, objective
from selftaught.recipe import recipe_names
from selftaught.records import Batch, Privilege, Problem, Prompt, Rollout, Sampling, Verdict, View
from selftaught.run import load_run
from selftaught.score import Backbone, Scorer
from selftaught.score.external import digest, id_bytes, shared_rows
from selftaught.session import Session
from selftaught.train import Finished
from tiny import tiny_llama, tiny_tokenizer

METHODS = ("opd", "gkd", "dopd")
FIELDS: dict[str, dict[str, Any]] = {"opd": {}, "gkd": {}, "dopd": {"top_k": 20}}
REDUCTION = {"opd": "token_mean", "gkd": "token_mean", "dopd": "sequence_mean"}
WORDS = len(tiny_tokenizer())
LARGER = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1,
          "intermediate_size": 96, "initializer_range": 0.3}  # fmt: skip


def student_of(rows: int = WORDS) -> Any:
    return tiny_llama(rows, initializer_range=0.3).double()


def teacher_of(rows: int = WORDS + 24) -> Any:
    model = tiny_llama(rows, seed=7, **LARGER).double()
    return model.requires_grad_(False)


def batch_of(sampled_by: Any, rows: int) -> Batch:
    """Two groups of three rollouts, one of them without a privilege, and a sampler that was not quite the student."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, WORDS, (count,), generator=generator).tolist())

    prompts = [p for p in (ids(7), ids(4)) for _ in range(3)]
    responses = [ids(n) for n in (5, 1, 3, 6, 2, 4)]
    rollouts = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logp = logits_of(sampled_by, prompt, response, rows).log_softmax(-1)
        logp = logp.gather(-1, torch.tensor(response)[:, None])[:, 0] - 0.3 * (i % 3 - 1)
        rollouts.append(Rollout(Problem(str(i // 3), "q"), i % 3, Prompt(prompt), response, tuple(logp.tolist()), "",
                                "stop", Sampling(), 0, 0))
    privileges = [None if i == 1 else Privilege("hint", "", Prompt((*prompt, 9, 10 + i % 2, 11)))
                  for i, prompt in enumerate(prompts)]
    return make_batch(rollouts, [Verdict(None)] * 6, privileges, 0)


def logits_of(model: Any, prompt: tuple[int, ...], response: tuple[int, ...], rows: int) -> Tensor:
    """(n, rows) by the model's own forward on one row: no packing, no layouts, no chunks."""
    inputs = torch.tensor([prompt + response[:-1]])
    return model(input_ids=inputs, use_cache=False).logits[0, len(prompt) - 1 :, :rows]


def dense(model: Any, context: str, batch: Batch, rows: int) -> Tensor:
    pairs = zip(batch.contexts[context], batch.responses, strict=True)
    return torch.cat([logits_of(model, prompt, response, rows) for prompt, response in pairs])


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trainers(name: str, scorer: Scorer, batch: Batch) -> float:
    """What a step of the trainer does with a batch; the gradients stay in the student."""
    method = build(name, **FIELDS[name])
    logp = scorer.sampled(method.scores | {"student"}, batch)
    credit, weight, correction = batch_credit(method, batch.tokens, logp, reduction=REDUCTION[name], length=None,
                                              sampler_cap=2.0, dtype=torch.float64)
    loss = 0.0
    for micro in scorer.split(batch):
        rows = micro.tokens
        part = chunked_loss(
            method.loss, scorer.hidden(batch, micro), scorer.heads(), batch.tokens.tokens[rows],
            {key: value[rows] for key, value in credit.items()}, weight[rows] * correction[rows], chunk=4)
        part.loss.backward()
        loss += part.loss.item()
    return loss


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(value.abs().max() > 1e-4 for value in one.values())
    for key, value in one.items():
        # The models' own norms are float32, whatever their weights: hence no more than seven digits.
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6)


# The gradient, against the definition.


@pytest.mark.parametrize("sizes", [(WORDS, WORDS + 24), (WORDS + 24, WORDS)], ids=["padded teacher", "padded student"])
@pytest.mark.parametrize(("layout", "budget"), [("shared", 10_000), ("shared", 20), ("plain", 40)])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_has_the_gradient_of_the_dense_objective_on_the_common_rows(
    name: str, layout: str, budget: int, sizes: tuple[int, int]
) -> None:
    student, teacher, views = student_of(sizes[0]), teacher_of(sizes[1]), build(name).views
    batch = batch_of(student, WORDS)
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    scorer = Scorer(Backbone(student, layout, WORDS), views, lambda view: None, budget,
                    external=Backbone(teacher, layout, WORDS))
    assert (len(list(scorer.split(batch))) > 1) == (budget < 100)
    loss = trainers(name, scorer, batch)
    found = gradients(student)

    logits = {"student": dense(student, "plain", batch, WORDS)}
    for view, spec in views.items():
        logits[view] = dense(teacher if spec.weights == "external" else student, spec.context, batch, WORDS)
    whole = objective(name, batch.tokens, logits, reduction=REDUCTION[name], **FIELDS[name])
    whole.loss.backward()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
    close(found, gradients(student))
    if sizes[0] > WORDS:
        assert found["lm_head.weight"][WORDS:].eq(0).all() and found["lm_head.weight"].shape[0] == sizes[0]
    assert all(value.equal(kept[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_an_external_teacher_with_the_initial_weights_gives_the_gradient_of_the_initial_one(name: str) -> None:
    student, other = student_of(), tiny_llama(WORDS, seed=3, initializer_range=0.3).double().requires_grad_(False)
    batch, views = batch_of(student, WORDS), build(name).views
    external = Scorer(Backbone(student), views, lambda view: None, 30, external=Backbone(other))
    losses = [trainers(name, external, batch)]
    one = gradients(student)
    own = {view: View("initial", spec.context) if spec.weights == "external" else spec for view, spec in views.items()}
    given = dict(other.named_parameters())
    losses.append(trainers(name, Scorer(Backbone(student), own, lambda view: given if view == "teacher" else None, 30),
                           batch))
    two = gradients(student)
    assert losses[0] == losses[1] != 0 and all(value.equal(two[key]) for key, value in one.items())


def test_equal_external_views_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, runs, right = student_of(), [], Scorer._run
    views = {"teacher": View("external"), "reference": View("external"), "shown": View("external", "privileged")}
    scorer = Scorer(Backbone(student), views, lambda view: None, 10_000, external=Backbone(teacher_of()))
    monkeypatch.setattr(Scorer, "_run", lambda self, *a: runs.append(a[2]) or right(self, *a))
    batch = batch_of(student, WORDS)
    hidden = scorer.hidden(batch, next(scorer.split(batch)))
    assert runs == []  # until somebody asks
    assert hidden["reference"] is hidden["teacher"] and {*hidden} == {"student", *views} and len(runs) == 1
    dict(hidden)
    assert sorted(runs) == ["shown", "student", "teacher"]
    assert hidden["teacher"].shape[1] == 48 and hidden["student"].shape[1] == 32


# Token ids and vocabularies.


def test_id_tables_hold_the_bytes_of_every_id() -> None:
    tokenizer = tiny_tokenizer()
    table = id_bytes(tokenizer)
    assert sorted(table) == list(range(WORDS)) and table[3] == b"<|im_end|>"
    assert {bytes([byte]) for byte in range(256)} <= set(table.values())
    for text in ("Question: 3 + 8\nAnswer: 11\n\n", "na\u00efve \u20ac \U0001f600\t"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[i] for i in ids) == text.encode()


def test_a_sentencepiece_table_holds_spaces_and_single_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0, "<0x0A>": 1, "\u2581the": 2, "\u00e9": 3}
    inner = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert id_bytes(tokenizer) == {0: b"<unk>", 1: b"\n", 2: b" the", 3: "\u00e9".encode()}


SMALL = {0: b"a", 1: b"b", 2: b"<end>"}


@pytest.mark.parametrize(
    ("teacher", "rows", "teacher_rows", "common"),
    [
        (SMALL, 3, 3, 3),
        (SMALL, 3, 8, 3),  # a padded teacher
        (SMALL, 8, 3, 3),  # a padded student
        (SMALL, 8, 6, 6),  # both
        ({**SMALL, 3: b"<think>"}, 8, 8, 3),  # a row of padding to one, a token to the other
        ({**SMALL, 3: b"<think>"}, 3, 8, 3),
        ({**SMALL, 2: b"other"}, 2, 8, 2),  # beyond the student's rows it has no tokens
    ],
)
def test_the_common_rows_are_those_that_mean_the_same_to_both(
    teacher: dict[int, bytes], rows: int, teacher_rows: int, common: int
) -> None:
    assert shared_rows(SMALL, teacher, rows, teacher_rows) == common


@pytest.mark.parametrize(
    ("student", "teacher", "rows", "teacher_rows", "said"),
    [
        (SMALL, {**SMALL, 1: b"c", 2: b"d"}, 3, 3, r"token id 1 is 'b' to the student and 'c' to the teacher.*2 of 3"),
        (SMALL, {0: b"a", 1: b"b"}, 3, 3, r"token id 2 is '<end>' to the student and no token to the teacher"),
        ({0: b"a", 2: b"c"}, SMALL | {2: b"c"}, 3, 3, r"token id 1 is 'b' to the teacher and no token to the student"),
        (SMALL, SMALL, 3, 2, r"its vocabulary has 2 rows, none for token id 2, which is '<end>'"),
    ],
)
def test_token_ids_that_mean_something_else_are_refused_by_name(
    student: dict[int, bytes], teacher: dict[int, bytes], rows: int, teacher_rows: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        shared_rows(student, teacher, rows, teacher_rows)


# A user's run.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_home(tmp_path_factory.mktemp("external"), initializer_range=0.1)
    save_teacher(folder / "teacher", WORDS + 24)
    return folder


def save_teacher(folder: Path, rows: int, **sizes: Any) -> Path:
    tiny_llama(rows, seed=7, **{**LARGER, **sizes}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(home: Path, name: str, of: str = "dopd", **sections: Any) -> dict[str, Any]:
    sections = {"teacher": str(home / "teacher"), "method": {"name": of, **FIELDS[of]}, **sections}
    if of != "dopd":
        sections.setdefault("privilege", None)
    return recipe_of(home, out=str(home / "runs" / name), loss={"reduction": REDUCTION[of]}, **sections)


def trained(home: Path, name: str, of: str = "dopd", *, resume: bool = False, **sections: Any) -> Finished:
    return selftaught.train(recipe(home, name, of, **sections), resume=resume, console=Console(quiet=True))


def final(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_trains_with_a_larger_teacher_and_asks_it_for_its_own_accuracy(
    home: Path, method: str
) -> None:
    sections = recipe(home, f"cli-{method}", method)
    path = write_recipe(home, f"{method}.yaml", **sections)
    dry = cli("train", path, "--dry-run")
    assert dry.code == 0 and f"teacher:\n  model: {home / 'teacher'}" in dry.out
    assert f"; teacher {home / 'teacher'}, 0 M" in dry.out
    said = cli("train", path)
    assert said.code == 0, said.err
    told = f"vocabulary rows {WORDS} to {WORDS + 23} of the teacher are no tokens to both"
    assert told in said.out.replace("\n", " ")
    folder = home / "runs" / f"cli-{method}"
    rows = lines(folder / "metrics.jsonl")[1:]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 and row["teacher/gap_abs"] > 0.1 for row in rows)
    asked = {row["arm"]: row["model"] for row in lines(folder / "completions.jsonl")}
    shown = ("teacher/right", "teacher/wrong", "teacher/empty") if method == "dopd" else ("teacher/plain",)
    assert {arm: model for arm, model in asked.items() if arm.startswith("teacher/")} == dict.fromkeys(
        shown, str(home / "teacher"))
    assert asked["student"] == asked["other_prompt"] == str(home / "model")
    assert set(shown) <= json.loads((folder / "results.json").read_text())["controls"].keys()
    checkpoint = folder / "checkpoints" / "step-3"
    assert not (checkpoint / "teachers.safetensors").exists()  # of 3 times the student's size, and never changed
    measured = cli("eval", folder, "data.heldout=4")
    assert measured.code == 0, measured.err


def test_the_teacher_is_asked_with_its_own_weights(home: Path) -> None:
    """The arm's responses are those of the teacher's model on the student's prompts, not the student's."""
    rows = lines(trained(home, "arms", "opd").folder / "completions.jsonl")
    by_arm = {arm: {(r["problem"], r["sample"]): r["response"] for r in rows if r["arm"] == arm and r["step"] == 0}
              for arm in ("student", "teacher/plain")}
    twin = shutil.copytree(home / "teacher", home / "twin")
    other = lines(trained(home, "twin", "opd", model=str(twin), teacher=str(home / "model")).folder
                  / "completions.jsonl")
    assert by_arm["teacher/plain"] != by_arm["student"]
    assert by_arm["teacher/plain"] == {
        (r["problem"], r["sample"]): r["response"] for r in other if r["arm"] == "student" and r["step"] == 0}


def test_a_run_leaves_the_teacher_as_it_was_and_lets_it_move_the_student(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    right = assemble.load_external
    monkeypatch.setattr(assemble, "load_external", lambda ground: loaded.append(right(ground)) or loaded[-1])
    one = trained(home, "moved")
    model = loaded[0].backbone.model
    saved = load_file(home / "teacher" / "model.safetensors")
    assert all(value.equal(saved[name]) for name, value in model.named_parameters())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    save_teacher(home / "quiet", WORDS, initializer_range=0.01)
    two = trained(home, "moved-otherwise", teacher=str(home / "quiet"))
    assert any(not value.equal(final(two.folder)[name]) for name, value in final(one.folder).items())


def test_the_students_own_folder_as_teacher_is_its_initial_self(home: Path) -> None:
    external = trained(home, "own-folder", teacher=str(home / "model"))
    method = {"name": "dopd", "teacher": {"weights": "initial"}, **FIELDS["dopd"]}
    initial = trained(home, "initial", teacher=None, method=method)
    for name, value in final(external.folder).items():  # a product of few rows may depend on where its factors lie
        torch.testing.assert_close(value, final(initial.folder)[name], atol=1e-6, rtol=0)
    start = load_file(home / "model" / "model.safetensors")
    assert any(not value.equal(start[name]) for name, value in final(external.folder).items())


def test_the_rows_of_a_padded_student_are_neither_sampled_nor_trained(home: Path) -> None:
    """The teacher is narrower: the student's rows beyond it would be sampled, and could not be scored."""
    padded = save_teacher(home / "padded", WORDS + 200, initializer_range=0.1)
    save_teacher(home / "narrow", WORDS)
    run = trained(home, "padded-student", "gkd", model=str(padded), teacher=str(home / "narrow"),
                  rollout={"stop": []})
    before, after = load_file(padded / "model.safetensors"), final(run.folder)
    assert after["lm_head.weight"].shape[0] == WORDS + 200
    assert after["lm_head.weight"][WORDS:].equal(before["lm_head.weight"][WORDS:])
    assert not after["lm_head.weight"][:WORDS].equal(before["lm_head.weight"][:WORDS])
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in lines(run.folder / "metrics.jsonl")[1:])
    decayed = trained(home, "padded-decayed", "gkd", model=str(padded), teacher=str(home / "narrow"),
                      rollout={"stop": []}, optim={"steps": 1, "warmup_steps": 0, "weight_decay": 0.1})  # fmt: skip
    cut = final(decayed.folder)["lm_head.weight"][WORDS:]
    torch.testing.assert_close(cut, before["lm_head.weight"][WORDS:] * (1 - 1e-3 * 0.1))
    # 200 of 500 rows cut: the entropy of the sampler cannot reach that of all.
    assert all(row["entropy"] < torch.tensor(float(WORDS)).log() for row in lines(run.folder / "metrics.jsonl")[1:])


def test_a_teacher_of_another_type_is_loaded_in_it(home: Path) -> None:
    def ground_of(tree: dict[str, Any]) -> assemble.Ground:
        ground = lay_ground(load_run(tree), lambda text: None)
        assert ground.rewarder is not None
        ground.rewarder.close()
        return ground

    ground = ground_of(recipe(home, "narrow-type", teacher={"model": str(home / "teacher"), "dtype": "bfloat16"}))
    external = assemble.load_external(ground)
    assert external is not None and next(external.backbone.model.parameters()).dtype == torch.bfloat16
    narrow, wide, alone = map(forecast, (ground, ground_of(recipe(home, "wide-type")), ground_of(recipe_of(home))))
    size = sum(p.numel() for p in external.backbone.model.parameters())
    assert (narrow.bytes["teachers"], wide.bytes["teachers"], alone.bytes["teachers"]) == (2 * size, 4 * size, 0)


def test_doctor_takes_a_recipe_with_a_teacher(home: Path) -> None:
    said = cli("doctor", write_recipe(home, "doctor.yaml", **recipe(home, "doctor")))
    assert f"M parameters; teacher {home / 'teacher'}, 0 M" in said.out, said.err
    assert "null teacher: an empty privilege moves" in said.out and "CHANGE  sampler" not in said.out
    assert "error" not in said.err


# Killed and resumed.


def test_killed_and_resumed_a_run_with_a_teacher_ends_with_the_same_bits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = trained(home, "whole", optim={"steps": 4}, checkpoint={"every": 1})
    killed(home, "resumed", monkeypatch)
    run = trained(home, "resumed", resume=True, optim={"steps": 4}, checkpoint={"every": 1})
    assert all(value.equal(final(run.folder)[name]) for name, value in final(reference.folder).items())
    one, two = (lines(folder / "metrics.jsonl") for folder in (reference.folder, run.folder))
    assert [without_clocks(row) for row in one] == [without_clocks(row) for row in two]


def killed(home: Path, name: str, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
    """A run that ends without notice after its second step."""
    def save(self: Session) -> None:
        right(self)
        if self.done == 2:
            raise KeyboardInterrupt

    right = Session.save
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", save)
        with pytest.raises(KeyboardInterrupt):
            trained(home, name, optim={"steps": 4}, checkpoint={"every": 1}, **sections)


def test_a_teacher_that_changed_meanwhile_is_refused_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(home / "teacher", home / "changing")
    more: dict[str, Any] = {"optim": {"steps": 4}, "checkpoint": {"every": 1}}
    killed(home, "changed", monkeypatch, teacher=str(folder))
    with pytest.raises(UserError, match="teacher"):  # another name for the same weights is another recipe
        trained(home, "changed", resume=True, teacher=str(home / "teacher"), **more)
    weights = load_file(folder / "model.safetensors")
    kept = weights["model.norm.weight"].clone()
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"teacher.model = '{folder}': its weights are not those that this run began"):
        trained(home, "changed", resume=True, teacher=str(folder), **more)
    weights["model.norm.weight"] = kept
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert trained(home, "changed", resume=True, teacher=str(folder), **more).results


def test_digests_tell_names_types_and_values_apart() -> None:
    def made() -> Any:
        return torch.nn.Linear(2, 2, bias=False)

    one, same, other = made(), made(), made()
    same.load_state_dict(one.state_dict())
    assert digest(one) == digest(same) != digest(other)
    assert digest(one) != digest(one.bfloat16())


# Refused before anything is loaded.


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(assemble, "load_model", refuse)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_needs_a_teacher_is_refused_without_one(home: Path, method: str) -> None:
    path = write_recipe(home, "none.yaml", **recipe(home, "none", method, teacher=None))
    said = cli("train", path)
    assert said.code == 2 and f"method '{method}': its view 'teacher' is another model" in said.err
    assert "`teacher` names none; add for example `teacher: runs/quickstart/final`" in said.err
    assert "method.teacher.weights=initial" in said.err


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("method", ["grpo", "opsd"])
def test_a_teacher_that_nobody_reads_is_refused(home: Path, method: str) -> None:
    said = cli("train", write_recipe(home, "unread.yaml", method=method), f"teacher={home / 'teacher'}")
    assert said.code == 2 and f"teacher.model = '{home / 'teacher'}': no view of method '{method}'" in said.err
    assert "remove `teacher`" in said.err and ("method.teacher.weights=external" in said.err) == (method == "opsd")
    taken = load_run(recipe(home, "opsd", method={"name": "opsd", "teacher": {"weights": "external"}}))
    assert taken.teacher is not None


@pytest.mark.usefixtures("_no_model")
def test_a_teachers_folder_that_is_not_there_or_broken_is_refused_under_its_own_field(home: Path) -> None:
    path = write_recipe(home, "gone.yaml", **recipe(home, "gone"))
    said = cli("train", path, f"teacher={home / 'nowhere'}")
    assert said.code == 2 and f"error: teacher.model: the folder '{home / 'nowhere'}' does not exist" in said.err
    empty = home / "empty"
    empty.mkdir()
    said = cli("train", path, f"teacher.model={empty}")
    assert said.code == 2 and f"error: teacher.model: {empty} has no config.json" in said.err
    said = cli("train", path, "teacher.dtype=float8")
    assert said.code == 2 and "teacher.dtype" in said.err
    said = cli("train", path, "teacher.modell=x")
    assert said.code == 2 and "unknown key 'teacher.modell'" in said.err and "model" in said.err


@pytest.mark.usefixtures("_no_model")
def test_another_tokenizer_is_refused_with_the_first_id_and_what_it_is_to_each(home: Path) -> None:
    folder = shutil.copytree(home / "teacher", home / "foreign")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    (one, first), (two, second) = sorted(vocabulary.items(), key=lambda each: each[1])[20:22]
    vocabulary[one], vocabulary[two] = second, first
    path.write_text(json.dumps(data), encoding="utf-8")
    table = id_bytes(tiny_tokenizer())
    said = cli("train", write_recipe(home, "foreign.yaml", **recipe(home, "foreign", teacher=str(folder))))
    assert said.code == 2 and f"teacher.model = '{folder}': its tokenizer is not the student's" in said.err
    assert (f"token id {first} is {table[first].decode()!r} to the student and {table[second].decode()!r} to the "
            f"teacher, and so for 2 of {WORDS} ids") in said.err


@pytest.mark.usefixtures("_no_model")
def test_another_special_token_and_too_few_rows_are_refused(home: Path) -> None:
    folder = shutil.copytree(home / "teacher", home / "special")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|im_end|>", "<|done|>"), encoding="utf-8")
    said = cli("train", write_recipe(home, "special.yaml", **recipe(home, "special", teacher=str(folder))))
    assert said.code == 2 and "token id 3 is '<|im_end|>' to the student and '<|done|>' to the teacher" in said.err
    short = save_teacher(home / "short", WORDS - 5)
    said = cli("train", write_recipe(home, "short.yaml", **recipe(home, "short", teacher=str(short))))
    assert said.code == 2 and f"its vocabulary has {WORDS - 5} rows, none for token id {WORDS - 5}" in said.err


@pytest.mark.usefixtures("_no_model")
def test_a_teacher_whose_context_is_too_short_is_refused(home: Path) -> None:
    folder = save_teacher(home / "brief", WORDS, max_position_embeddings=16)
    said = cli("train", write_recipe(home, "brief.yaml", **recipe(home, "brief", teacher=str(folder))))
    assert said.code == 2 and f"teacher.model = '{folder}': its context has 16 tokens" in said.err


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("context", ["plain", "privileged"])
def test_a_teachers_context_need_not_hold_a_privilege_that_it_never_sees(home: Path, context: str) -> None:
    folder = save_teacher(home / "enough", WORDS, max_position_embeddings=128)
    said = cli("train", "--dry-run", write_recipe(home, "enough.yaml", **recipe(
        home, "enough", teacher=str(folder), method={"name": "dopd", "teacher": {"weights": "external",
                                                                                 "context": context}},
        privilege={"kind": "answer", "template": "The answer, a whole number, is {privilege}. " + "Look! " * 40})))
    assert ("its context has 128 tokens" in said.err) == (said.code == 2) == (context == "privileged"), said.err


def test_a_teacher_may_be_given_by_its_name_alone_or_by_its_fields(home: Path) -> None:
    short = load_run(recipe(home, "short"))
    assert short == load_run(recipe(home, "short", teacher={"model": str(home / "teacher")}))
    assert short.teacher is not None and (short.teacher.dtype, short.teacher.layout) == (None, "auto")
    changed = load_run(recipe(home, "short"), ["teacher.dtype=bfloat16"])
    assert changed.teacher is not None and (changed.teacher.model, changed.teacher.dtype) == (
        str(home / "teacher"), "bfloat16")


@pytest.mark.parametrize("method", METHODS)
def test_a_small_recipe_ships_with_the_quickstarts_task_and_its_final_model_as_teacher(method: str) -> None:
    assert f"small/{method}" in recipe_names()
    run, quickstart = load_run(f"small/{method}"), load_run("quickstart")
    assert run.teacher is not None and run.teacher.model == f"{quickstart.out}/final"
    for section in ("model", "data", "rollout", "reward", "eval", "seed"):
        assert getattr(run, section) == getattr(quickstart, section)
    assert run.method.name == method and run.optim.steps == 30
    assert run.loss.reduction == REDUCTION[method]
