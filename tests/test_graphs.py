"""Concept graphs: the generator read back from its prompts, the verifier and the measures by brute force."""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import sys
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from selftaught import data
from selftaught.data import DataConfig, graphs
from selftaught.data.graphs import Layout, draw, prompt
from selftaught.data.instances import INSTANCES, SHAPES
from selftaught.errors import UserError
from selftaught.run import load_run
from selftaught.studies.graphs import base, claims, measures, pcmi, verify
from selftaught.studies.graphs.arms import ARMS, CORE, PAPER, SMALL, arms, sources_of_sets

PAPERS = Layout()
SMALLS = Layout(chains=1, short=4, long=6, nodes=8, concepts=6, names=6, mark="concept", style="tokens")
LAYOUTS = [PAPERS, SMALLS, Layout(sectors=5, chains=2, short=5, long=7, nodes=9)]


class Read:
    """A graph read back from its prompt in words."""

    def __init__(self, text: str) -> None:
        nodes = re.findall(r"^(\d+): (\w+) \[(\w+)(?:=(\w+))?\]$", text, re.M)
        self.name = {int(i): name for i, name, _, _ in nodes}
        self.concept = {int(i): concept or tag for i, _, tag, concept in nodes}
        self.near: dict[int, set[int]] = {i: set() for i in self.name}
        for u, first, v, second in re.findall(r"^(\d+)\((\w+)\)--(\d+)\((\w+)\)$", text, re.M):
            assert (self.name[int(u)], self.name[int(v)]) == (first, second)
            self.near[int(u)].add(int(v))
            self.near[int(v)].add(int(u))
        self.target = re.search(r"to a node named (\w+)\.", text)[1]  # type: ignore[index]

    def distances(self) -> dict[int, int]:
        """Nodes on the shortest path from the hub to each node that can be reached, both counted."""
        found, queue = {0: 1}, deque([0])
        while queue:
            here = queue.popleft()
            for there in self.near[here] - found.keys():
                found[there] = found[here] + 1
                queue.append(there)
        return found

    def ends(self) -> list[int]:
        return [i for i, tag in self.concept.items() if tag == "shape"]

    def sector(self, end: int) -> str:
        """The concept of the instances that touch an end node."""
        (one,) = {self.concept[i] for i in self.near[end]}
        return one


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", graphs.KINDS)
def test_a_graph_is_what_its_kind_and_layout_say(kind: str, layout: Layout) -> None:
    for seed in range(30):
        graph = draw(kind, layout, random.Random(seed))
        read = Read(prompt(graph, "chat"))
        assert read.concept[0] == "hub" and read.name[0] == "start"
        ends, reached = read.ends(), read.distances()
        right = [i for i in ends if read.name[i] == read.target]
        assert len(ends) == layout.sectors and len(right) == 2
        assert len({read.name[i] for i in ends}) == 2  # the distractors share a name
        slots = [graph.slot(0).concept, graph.slot(1).concept]
        if layout.mark == "order":
            assert [read.sector(i) for i in right] == slots  # in the order of listing
        else:
            half = [*INSTANCES][: layout.concepts // 2]
            assert [concept in half for concept in slots] == [True, False]
            right.sort(key=lambda i: slots.index(read.sector(i)))
            assert [read.sector(i) for i in right] == slots
        cut = {"harder": [0]}.get(kind, [])
        if kind == "harder-random":
            cut = [slot for slot in (0, 1) if right[slot] not in reached]
            assert len(cut) == 1
        assert [right[slot] in reached for slot in (0, 1)] == [slot not in cut for slot in (0, 1)]
        for end in ends:
            mine = [i for i, concept in read.concept.items() if concept == read.sector(end)]
            slot = right.index(end) if end in right else None
            lost = slot is not None and slot in cut
            wanted = {"larger": layout.nodes, "train": None, "varied": None}.get(kind, layout.short)
            if kind == "train" and slot is not None:
                wanted = (layout.short, layout.long)[slot]
            lengths = {len(chain) + 2 for sector in graph.sectors for chain in sector.chains
                       if sector.concept == read.sector(end)}
            assert len(lengths) == 1 and (wanted is None or lengths == {wanted})
            assert layout.short <= min(lengths) <= max(layout.nodes, layout.long)
            assert len(mine) == layout.chains * (min(lengths) - 2)
            assert lost or reached[end] == min(lengths)
            assert len(read.near[end]) == layout.chains  # a cut is never at the end, nor at the hub
            degrees = sorted(len(read.near[i]) for i in mine)
            assert degrees == [1] * (2 * layout.chains * lost) + [2] * (len(mine) - 2 * layout.chains * lost)
            for i in mine:
                assert read.name[i] in INSTANCES[read.concept[i]][: layout.names]
        assert len(read.near[0]) == layout.sectors * layout.chains
        for sector in graph.sectors:
            assert all(len(set(chain)) == len(chain) for chain in sector.chains)


@pytest.mark.parametrize("kind", graphs.KINDS)
def test_the_walks_of_the_short_style_are_the_edges_of_the_long_one(kind: str) -> None:
    for seed in range(20):
        graph = draw(kind, SMALLS, random.Random(seed))
        read = Read(prompt(graph, "chat"))
        edges = {frozenset((read.name[u], read.name[v])) for u, near in read.near.items() for v in near}
        to, target, *rest = prompt(graph, "tokens").split()
        walks = [walk.split() for walk in " ".join(rest).split(";")[1:]]
        listed = [frozenset(pair) for walk in walks for pair in itertools.pairwise(walk)]
        assert (to, target) == ("to", read.target) and set(listed) == edges and len(listed) == sum(
            map(len, read.near.values())) // 2
        assert [walk[0] for walk in walks if walk[0] in SHAPES] == [read.name[i] for i in read.ends()]


def test_names_repeat_among_the_chains_of_a_sector() -> None:
    graph = draw("train", PAPERS, random.Random(0))
    assert any(len(set(itertools.chain(*sector.chains))) < sum(map(len, sector.chains)) for sector in graph.sectors)


def test_no_name_is_of_two_concepts_and_none_of_two_words() -> None:
    names = [name for concept in INSTANCES.values() for name in concept] + [*SHAPES, "start", *base.WORDS[1:]]
    assert len(set(names)) == len(names) and all(name.isalpha() for name in names)
    assert not {*graphs.EXAMPLE[1:3]} & {*names}


def test_the_random_cut_takes_either_slot_half_the_time_and_the_fixed_one_never_the_second() -> None:
    rng = random.Random(0)
    opened = [draw("harder-random", SMALLS, rng).open_slots() for _ in range(600)]
    assert all(len(slots) == 1 for slots in opened)
    assert abs(sum(slots == [1] for slots in opened) / 600 - 0.5) < 4 * 0.5 / math.sqrt(600)
    assert all(draw("harder", SMALLS, rng).open_slots() == [1] for _ in range(50))


@pytest.mark.parametrize(("layout", "marked"), [(PAPERS, True), (SMALLS, False)])
def test_sectors_stand_in_any_order_but_for_slots_that_it_marks(layout: Layout, marked: bool) -> None:
    drawn = [draw("train", layout, random.Random(seed)) for seed in range(300)]
    orders = {tuple(sector.slot for sector in graph.sectors) for graph in drawn}
    every = {*itertools.permutations((0, 1, None, None))}
    assert orders == {order for order in every if not marked or order.index(0) < order.index(1)}


@pytest.mark.parametrize("recipe", [SMALL, PAPER])
def test_train_heldout_and_all_test_sets_are_disjoint_and_the_same_for_a_seed(recipe: str) -> None:
    run = load_run(recipe)

    def ids(source: str, seed: int) -> tuple[set[str], set[str]]:
        config = DataConfig(source=source, train=60, heldout=20)
        found = data.load(config, seed=seed, say=lambda line: None)
        return {p.id for p in found.train}, {p.id for p in found.heldout}

    source = str(run.data.source)
    train, heldout = ids(source, 0)
    assert ids(source, 0) == (train, heldout) and ids(source, 1)[0] != train
    assert len(train) == 60 and len(heldout) == 20
    sets = [train, heldout, *(ids(of, 0)[1] for of in sources_of_sets(source, (7, 8)).values())]
    assert len(set().union(*sets)) == sum(map(len, sets)) == 60 + 20 * 5


def test_the_same_graph_in_another_order_is_the_same_problem() -> None:
    graph = draw("train", SMALLS, random.Random(3))
    turned = graphs.Graph(graph.sectors[::-1], graph.target)
    one, two = (graphs.problem(g, "tokens", random.Random(0)) for g in (graph, turned))
    assert one.id == two.id and one.prompt != two.prompt
    assert one.id != graphs.problem(draw("train", SMALLS, random.Random(4)), "tokens", random.Random(0)).id


@pytest.mark.parametrize("kind", graphs.KINDS)
@pytest.mark.parametrize("layout", [PAPERS, SMALLS])
def test_a_problems_solution_is_right_and_both_slots_are_drawn(kind: str, layout: Layout) -> None:
    rng, used = random.Random(1), set()
    for _ in range(20):
        problem = graphs.problem(draw(kind, layout, rng), layout.style, rng)
        verdict = verify.judge(problem.solution or "", problem.columns)
        assert verdict.status == "right" and verdict.score == 1.0
        used.add(problem.columns["slots"].index(verdict.strategy))
    assert used == ({1} if kind == "harder" else {0, 1})


def test_a_path_through_a_cut_chain_is_wrong_and_one_to_another_shape_too() -> None:
    rng = random.Random(2)
    graph = draw("harder", PAPERS, rng)
    columns = graphs.problem(graph, "chat", rng).columns
    cut = verify.judge(graphs.shown(graph.path(0), "chat"), columns)
    assert cut.status == "wrong" and cut.strategy == graph.slot(0).concept and "No edge" in (cut.feedback or "")
    other = next(sector for sector in graph.sectors if sector.slot is None)
    astray = verify.judge(graphs.shown(("start", *other.chains[0], other.shape), "chat"), columns)
    assert astray.status == "wrong" and "It ends at" in (astray.feedback or "")
    assert verify.judge("no box", columns).status == "unparsed"
    assert verify.judge("\\boxed{}", columns).status == "wrong"


def test_bad_sources_are_refused_by_name() -> None:
    for source, words in {
        "graphs:tain": "did you mean 'train'", "graphs:train?chain=2": "did you mean 'chains'",
        "graphs:train?short=x": "whole number", "graphs:train?short=16": "at most long",
        "graphs:train?sectors=2": "above 2",
        "graphs:train?long=40": "names + 2", "graphs:train?style=token": "did you mean 'tokens'",
        "graphs:train?mark=ordr": "did you mean 'order'",
        "graphs:train?style=tokens": "chains", "graphs:larger?nodes=2": "from 3",
        "graphs:train?concepts=90": "the list", "graphs:train?names=0": "every concept",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=re.escape(words)):
            graphs.parse(source)
    few = "graphs:train?style=tokens&sectors=3&chains=1&short=3&long=3&concepts=3&names=1"
    with pytest.raises(UserError, match=r"distinct graphs, and 999 are needed"):
        graphs.generate(few, 999, seed=0, taken=(), say=lambda line: None)
    for layout in LAYOUTS:
        assert graphs.parse(graphs.source("larger", layout)) == ("larger", layout)


# The verifier.


def test_the_verifier_agrees_with_every_walk_of_random_graphs_whose_names_repeat() -> None:
    longest, alphabet, right = 5, "sabct", 0
    for seed in range(25):
        rng = random.Random(seed)
        size = rng.randint(4, 8)
        names = ["s", *rng.choices("abct", k=size - 1)]
        edges = [e for e in itertools.combinations(range(size), 2) if rng.random() < 0.4]
        walks, named = [(0,)], set()
        for _ in range(longest):
            named |= {tuple(names[i] for i in walk) for walk in walks if names[walk[-1]] == "t"}
            walks = [(*walk, v) for walk in walks for v in range(size) if tuple(sorted((walk[-1], v))) in edges]
        for length in range(1, longest + 1):
            for listed in itertools.product(alphabet, repeat=length):
                assert (verify.follow(listed, names, edges, "t") is None) == (listed in named), (seed, listed)
        right += len(named)
    assert right > 100
    assert verify.follow([], ["s"], [], "t") is not None


def test_a_worker_that_imports_the_verifier_does_not_wait_for_torch() -> None:
    code = "import sys, selftaught.studies.graphs.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_repeated_name_is_followed_through_whichever_node_leads_on() -> None:
    names = ["start", "owl", "owl", "crow", "star"]
    edges = [(0, 1), (0, 2), (2, 3), (3, 4)]  # only the second owl leads on
    assert verify.follow(["start", "owl", "crow", "star"], names, edges, "star") is None
    assert verify.follow(["start", "owl", "star"], names, edges, "star") is not None


def test_the_diversity_reward_is_the_share_of_disjoint_siblings() -> None:
    rng = random.Random(5)
    asked, written, columns = [], [], []
    for number in range(4):
        graph = draw("train", SMALLS, rng)
        problem = graphs.problem(graph, "tokens", rng)
        other = next(sector for sector in graph.sectors if sector.slot is None)
        ways = [graph.path(0), graph.path(1), ("start", *other.chains[0], other.shape), ("start",),
                (*graph.path(0)[:-2], *graph.path(1)[2:])]  # fmt: skip
        ways = [way[::-1] for way in ways]
        chosen = rng.choices(ways, k=5) if number < 3 else [ways[0]]
        asked += [problem.prompt] * len(chosen)
        written += [" ".join(way) for way in chosen]
        columns += [problem.columns] * len(chosen)
    keys = ("names", "concepts", "edges", "target", "style")
    scores = verify.diversity(asked, written, *([one[key] for one in columns] for key in keys))
    of = {name: concept for concept, names in INSTANCES.items() for name in names}
    for i, score in enumerate(scores):
        mine = {of[name] for name in written[i].split() if name in of}
        others = [{of[name] for name in written[j].split() if name in of}
                  for j in range(len(asked)) if j != i and asked[j] == asked[i]]
        right = verify.judge(written[i], columns[i]).status == "right"
        wanted = sum(mine.isdisjoint(other) for other in others) / len(others) if right and others else 0.0
        assert score == wanted
    assert scores[-1] == 0.0 and len(set(scores)) > 2


# Measures.


def made_rows(seed: int, problems: int = 6, samples: int = 8) -> list[dict[str, object]]:
    rng = random.Random(seed)
    return [{"problem": p, "sample": s, "score": 1.0, "slots": ["birds", "fish"],
             "status": rng.choice(["right", "wrong", "right"]) if p else "wrong",
             "strategy": rng.choice(["birds", "fish", "birds + fish", None])}
            for p in range(problems) for s in range(samples)]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_measures_agree_with_brute_force(seed: int) -> None:
    rows = made_rows(seed)
    for row in rows:  # a right one has a strategy
        row["strategy"] = row["strategy"] or ("birds" if row["status"] == "right" else None)
    found, groups = measures.measure(rows), [rows[i : i + 8] for i in range(0, 48, 8)]
    for k in (1, 2, 4, 8):
        chosen = [any(row["status"] == "right" for row in pick) for group in groups
                  for pick in itertools.combinations(group, k)]
        assert found[f"pass@{k}"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)
    used, entropies, first, every = [], [], [], []
    for group in groups:
        every.append(len(set(" + ".join(str(row["strategy"]) for row in group if row["strategy"]).split(" + ")) - {""}))
        right = [str(row["strategy"]) for row in group if row["status"] == "right"]
        if right:
            used.append(len(set(" + ".join(right).split(" + "))))
            _, counts = np.unique(right, return_counts=True)
            entropies.append(np.exp(-(counts / counts.sum() * np.log(counts / counts.sum())).sum()))
            first += [one == "birds" for one in right]
    assert found["concepts"] == pytest.approx(np.mean(used)) and found["effective"] == pytest.approx(np.mean(entropies))
    assert found["slot0"] == pytest.approx(np.mean(first)) and found["concepts_all"] == pytest.approx(np.mean(every))
    assert found["solved"] == len(used) / 6 < 1
    wanted = np.polyfit([0, 1, 2, 3], [found[f"pass@{k}"] for k in (1, 2, 4, 8)], 1)[0]
    assert found["slope"] == pytest.approx(wanted)


def test_a_set_without_a_right_sample_has_no_concepts_of_right_ones() -> None:
    found = measures.measure([row for row in made_rows(0) if row["problem"] == 0])
    assert found["pass@8"] == 0 and "concepts" not in found and "slot0" not in found


def test_over_seeds_gives_mean_and_range() -> None:
    assert measures.over_seeds([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {
        "a": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 2}, "b": {"mean": 5.0, "low": 5.0, "high": 5.0, "n": 1}}


def one_table(p: float, rise: float, concepts: float, solved: float, problems: int = 40, first: int = 0) -> Any:
    """A table whose every problem has these values, give or take a little."""
    noise = np.random.default_rng(0).normal(0, 1e-3, size=(problems, 6))
    values = np.array([p, rise, concepts, solved, concepts, concepts])
    return list(range(first, first + problems)), list(claims.NAMES), noise + values


def test_every_claim_names_arms_that_exist_and_can_hold_and_be_reversed() -> None:
    low, high = one_table(0.2, 0.1, 1.0, 0.1), one_table(0.9, 0.4, 2.0, 0.9)
    every = [*claims.CLAIMS, *claims.fixes()]
    assert {claim.more.arm for claim in every} | {claim.less.arm for claim in every} == {*ARMS}
    for claim in every:
        for more, less, wanted in ((high, low, "| 1 | 0 | 0 |"), (low, high, "| 0 | 1 | 0 |")):
            tables: dict[str, Any] = {}
            for side, one in ((claim.more, more), (claim.less, less)):
                test = "larger-8" if side.test == claims.LONGEST else side.test
                tables.setdefault(side.arm, {}).setdefault("0", {})[test] = one
            (line,) = list(claims.lines([claim], tables, "larger-8"))[2:]
            assert line.endswith(wanted), claim.text


def test_a_claim_is_not_decided_by_noise_and_one_without_its_sets_is_left_out() -> None:
    a, b = claims.Side("a", "pass@1"), claims.Side("b", "pass@1")
    claim = claims.Claim("more", a, b)
    rng = np.random.default_rng(1)
    noise = [(list(range(60)), list(claims.NAMES), rng.normal(0.5, 0.2, size=(60, 6))) for _ in range(2)]
    tables = {"a": {"0": {"in": noise[0]}, "1": {}}, "b": {"0": {"in": noise[1]}, "1": {"in": noise[1]}}}
    for either in (claim, claims.Claim("less", b, a)):
        assert list(claims.lines([either], tables, "larger-8"))[2].endswith("| 0 | 0 | 1 |")
    assert len(list(claims.lines([claim], {"a": tables["a"]}, "larger-8"))) == 2
    near = claims.Claim("near", a, b, margin=0.3)
    assert list(claims.lines([near], tables, "larger-8"))[2].endswith("| 1 | 0 | 0 |")


def test_differences_are_paired_on_one_set_and_of_two_sets_have_the_width_of_both() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0.5, 0.2, size=(400, 6))
    one = (list(range(400)), list(claims.NAMES), values + 0.1)
    same, other = ((list(range(start, start + 400)), list(claims.NAMES), values) for start in (0, 400))
    paired, apart = claims.difference(one, same, "solved"), claims.difference(one, other, "solved")
    assert paired is not None and apart is not None
    assert (paired["value"], apart["value"]) == pytest.approx((0.1, 0.1)) and paired["high"] - paired["low"] < 1e-9
    wanted = 2 * 1.96 * 2**0.5 * values[:, 3].std() / 20
    assert apart["high"] - apart["low"] == pytest.approx(wanted, rel=0.1)


def test_the_table_of_a_set_is_its_problems_measures() -> None:
    rows = made_rows(0)
    for row in rows:
        row["strategy"] = row["strategy"] or ("birds" if row["status"] == "right" else None)
    problems, names, values = claims.table(rows)
    whole = measures.measure(rows)
    assert problems == list(range(6)) and names == list(claims.NAMES)
    p, rise, effective, solved, unique, unique_all = values.T
    assert p.mean() == pytest.approx(whole["pass@1"]) and (p + rise).mean() == pytest.approx(whole["pass@8"])
    assert np.isnan(effective[0]) and np.nanmean(effective) == pytest.approx(whole["effective"])
    assert solved.mean() == whole["solved"]
    assert np.nanmean(unique) == pytest.approx(whole["concepts"]) and unique_all.mean() == whole["concepts_all"]


# The base stage and what the theory says of it.


@pytest.mark.parametrize(("k", "tilted"), [(1.5, 2.381), (3.0, 9.216), (9.0, 53.15)])
def test_the_prediction_for_a_copying_teacher_is_the_papers_optimum(k: float, tilted: float) -> None:
    # Two right walks of ratio k and a wrong outcome as likely as the second; T(.|c) = 0.9 [c] + 0.1 base.
    plain = torch.tensor([k, 1.0, 1.0], dtype=torch.float64) / (k + 2)
    shown = [0.9 * torch.eye(3, dtype=torch.float64)[c] + 0.1 * plain for c in (0, 1)]
    found = pcmi.predict(torch.stack([plain, *shown])[:, :2].log())
    assert math.exp(found["tilted"]) == pytest.approx(tilted, rel=1e-3)
    assert math.exp(found["mixed"]) == pytest.approx(k) and math.exp(found["base"]) == pytest.approx(k)
    # The same optimum by gradient descent on E_c KL(pi||T_c).
    logits = plain.log().clone().requires_grad_()
    share = plain[:2] / plain[:2].sum()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        loss = sum(share[c] * (logp.exp() * (logp - shown[c].log())).sum() for c in (0, 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (logits[0] - logits[1]).item() == pytest.approx(found["tilted"], abs=1e-5)


TINY = base.BaseConfig(width=32, layers=1, heads=2)


def test_log_probs_of_walks_are_those_of_one_token_at_a_time() -> None:
    tokenizer, model = base.make_tokenizer(TINY.layout), base.make_model(TINY).eval()
    pairs = pcmi.walks([draw("train", SMALLS, random.Random(i)) for i in range(2)])
    assert len(pairs) == 12 and pairs[0][0] != pairs[2][0] and pairs[0][1] == pairs[2][1] in pairs[2][0]
    found = pcmi.logps(model, tokenizer, pairs)
    for (text, walk), total in list(zip(pairs, found.tolist(), strict=True))[::5]:
        ids, summed = tokenizer(text)["input_ids"], 0.0
        for token in [*tokenizer(walk)["input_ids"], tokenizer.eos_token_id]:
            with torch.no_grad():
                summed += model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids = [*ids, token]
        assert total == pytest.approx(summed, abs=1e-3)


def test_every_word_has_its_token_and_comes_back() -> None:
    tokenizer = base.make_tokenizer(TINY.layout)
    for seed in range(20):
        text, responses = base.example(TINY, random.Random(seed))
        assert len(responses) == TINY.walks
        for one in (text, *responses):
            ids = tokenizer(one)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids).split() == one.split()


def test_the_loss_counts_every_response_and_its_end_and_nothing_else() -> None:
    tokenizer = base.make_tokenizer(TINY.layout)
    pairs = [base.example(TINY, random.Random(seed)) for seed in range(3)]
    ids, labels = base.collate(pairs, tokenizer)
    for (text, responses), row, label in zip(pairs, ids.tolist(), labels.tolist(), strict=True):
        kept = [token for token in label if token != -100]
        assert tokenizer.decode(kept).split() == [w for one in responses for w in (*one.split(), "<end>")]
        assert all(token in (-100, here) for here, token in zip(row, label, strict=True))
        written = tokenizer.decode(row).replace("<pad>", "").split()
        first, *further = responses
        assert written == [*text.split(), *first.split(), "<end>",
                           *(w for one in further for w in ("path", *one.split(), "<end>"))]


def test_the_base_stage_draws_what_its_config_says() -> None:
    rng, plain, followed = random.Random(0), [], []
    for _ in range(3000):
        text, responses = base.example(TINY, rng)
        response = responses[rng.randrange(TINY.walks)]  # each is drawn as if it were alone
        names = response.split()
        target, walks = text.split()[1], [walk.split() for walk in text.split("\n")[0].split(";")[1:]]
        assert names in walks
        right = names[0] == target
        half = [*INSTANCES][: TINY.layout.concepts // 2]
        slot = int(not any(names[1] in INSTANCES[concept] for concept in half)) if right else None
        if "shown" in text:
            followed.append(response == text.split("shown ")[1].split("\n")[0])
        else:
            plain.append((right, slot))
    def near(share: float, wanted: float, count: int) -> bool:
        return abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / count)

    slots = [slot for right, slot in plain if right]
    assert near(len(plain) / 3000, 0.5, 3000) and near(len(slots) / len(plain), TINY.right, len(plain))
    assert near(slots.count(0) / len(slots), TINY.first, len(slots))
    by_chance = TINY.right * (TINY.first**2 + (1 - TINY.first) ** 2)
    assert near(sum(followed) / len(followed), TINY.follow + (1 - TINY.follow) * by_chance, len(followed))


# Recipes and arms.


@pytest.mark.parametrize("recipe", [SMALL, PAPER])
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_run_of_either_recipe(recipe: str, name: str) -> None:
    run = load_run(recipe, ARMS[name].overrides)
    assert (run.privilege is None) == (name in ("grpo", "grpo-diversity"))
    assert run.reward is not None and len(run.reward.parts) == 1 + (name == "grpo-diversity")
    if name.startswith("sdsd"):
        fields = run.method.fields
        assert fields["divergence"] == ("kl_teacher_student" if name == "sdsd-forward" else "kl_student_teacher")
        assert run.privilege is not None and run.privilege.kind == "demonstration" and run.privilege.exclude_self
        several = {"sdsd-mixture": (3, "mixture"), "sdsd-average": (3, "average"),
                   "sdsd-different": (3, "mixture")}.get(name, (1, "average"))
        assert (run.privilege.count, run.privilege.combine) == several
        assert run.privilege.distinct == (name not in ("sdsd-mixture", "sdsd-average", "sdsd-nearest"))


def test_the_papers_recipe_holds_the_papers_numbers() -> None:
    # arXiv 2606.26091, section 4 and appendix.
    run = load_run(PAPER)
    _, layout = graphs.parse(str(run.data.source))
    assert (layout.sectors, layout.chains, layout.short, layout.long) == (4, 3, 11, 15)
    assert (run.data.train, run.data.heldout, run.optim.steps) == (16000, 128, 1000)
    assert (run.rollout.prompts_per_step, run.rollout.num_generations) == (16, 4)
    assert run.rollout.max_completion_length == 8192 and run.model == "Qwen/Qwen3-1.7B"


def test_the_small_recipe_writes_prompts_as_the_base_stage_does() -> None:
    run = load_run(SMALL)
    assert (run.data.question, run.data.answer) == (base.QUESTION, base.ANSWER)
    assert run.privilege is not None and run.privilege.template == base.SHOWN
    _, layout = graphs.parse(str(run.data.source))
    drawn = base.BaseConfig().layout
    assert (layout.concepts, layout.names, layout.sectors, layout.chains) == (
        drawn.concepts, drawn.names, drawn.sectors, drawn.chains)
    assert (drawn.short, drawn.long) == (layout.short, 8)  # the base has walked the lengths of the larger sets


def test_arms_come_seed_by_seed_and_an_unknown_one_is_named() -> None:
    assert [arm.folder for arm in arms((), (0, 1))] == [f"{name}-{seed}" for seed in (0, 1) for name in CORE]
    with pytest.raises(UserError, match=r"no arm 'sdds'; did you mean 'sdsd'"):
        arms(("sdds",), (0,))
