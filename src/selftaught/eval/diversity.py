"""How different the answers to a problem are: what extra samples buy, distinct answers, spread of meaning and wording.

Every measure is one number per problem, among all its samples and among the right ones alone (a model that guesses is
diverse in a way nobody wants), and its mean over problems has a bootstrap interval over problems. Measures that are
chances of two samples (`*_differ`, `distance`) do not depend on how many samples there are; counts, Vendi scores,
distinct-n and self-BLEU do, so compare them at equal numbers of samples only.
Token entropy stands beside them because it is often taken for diversity. It is not: it is the uncertainty of single
tokens, high also where all answers agree (arXiv 2606.26091, section 5).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selftaught.errors import UserError
from selftaught.eval.measures import is_right, pass_at_k
from selftaught.eval.rows import count_of, refuse_several, some_of
from selftaught.eval.summary import too_few
from selftaught.eval.tables import Table, means
from selftaught.records import Say

Row = Mapping[str, Any]
Array = NDArray[np.float64]
Embed = Callable[[Sequence[str]], Array]  # texts to (n, D); rows need not be normalised

WORD = re.compile(r"\w+|[^\w\s]")
ORDERS = 4  # of self-BLEU's n-grams
SMOOTHING = 0.1  # stands for a count of 0: method 1 of Chen and Cherry (2014), as in NLTK
NOT_DIVERSITY = "token entropy is not diversity: it can be highest where all answers agree; it stands here beside it"


# ------------------------------------------------------------------------------------------ what extra samples buy


def ladder(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to n, and n itself."""
    powers = tuple(2**i for i in range(n.bit_length()) if 2**i <= n)
    return powers if powers[-1] == n else (*powers, n)


def slope(values: Sequence[float], ks: Sequence[int]) -> float:
    """Least-squares slope of `values` over log2 k: what one doubling of the samples adds. NaN for fewer than two k."""
    if len(ks) < 2:
        return math.nan
    x = np.log2(np.asarray(ks, dtype=np.float64))
    x -= x.mean()
    return float(x @ np.asarray(values, dtype=np.float64) / (x @ x))


def functional(right: Sequence[bool], ks: Sequence[int]) -> dict[str, float]:
    """What more samples than one buy on one problem, by the unbiased pass@k (arXiv 2107.03374, eq. 1).

    extra: pass@K - pass@1 for the largest K. slope: of pass@k over log2 k, over all `ks`. only_by_extra: 1 where some
    sample is right but fewer than half are, so that one sample alone would more likely miss; else 0.
    A ceiling flattens every curve: read them beside pass@1. extra and slope are NaN for fewer than K samples.
    """
    n, c = len(right), sum(right)
    curve = [pass_at_k(n, c, k) if n >= ks[-1] else math.nan for k in ks]
    return {"pass@1": c / n, "extra": curve[-1] - c / n, "slope": slope(curve, ks),
            "only_by_extra": float(0 < c < n / 2)}


def usual_samples(rows: Iterable[Row]) -> int:
    """The number of samples that most problems have; of two that are as common, the larger."""
    problems = Counter(Counter(row["problem"] for row in rows).values())
    return max(problems, key=lambda n: (problems[n], n))


def rungs(sides: Sequence[Sequence[Row]], ks: Iterable[int] = (), warn: Say = lambda line: None) -> tuple[int, ...]:
    """The k, from 1 to the same K, that all sides are measured at: `ks`, or 1, 2, 4, ... up to the number of samples
    that most problems have, on the side where that is less.

    A k above every problem's number of samples, and the problems with fewer than K, are named through `warn`. Raises
    UserError where nothing is left, or no problem has two samples.
    """
    most = min(max(Counter(row["problem"] for row in rows).values()) for rows in sides)
    if most < 2:
        raise UserError("diversity: one sample for each problem cannot differ from another; draw more, for example "
                        "eval.samples=8")
    asked = tuple(sorted(set(ks))) or ladder(max(2, min(map(usual_samples, sides))))
    kept = [k for k in asked if k <= most]
    if asked[0] < 1 or not kept:
        raise UserError(f"diversity: k = {asked[0]}: choose k from 1 to {most}, the most samples that a problem has, "
                        "or draw more")
    for k in asked[len(kept) :]:
        warn(f"k = {k}: no problem has more than {most} samples; left out, and the rest counted")
    for rows in sides:
        for k, short in too_few(rows, kept[-1:]).items():
            named = [f"{problem} ({n})" for problem, n in short]
            warn(f"K = {k}: {count_of(named, 'problem')} with fewer samples left out of extra and slope: "
                 f"{some_of(named)}")
    return tuple(dict.fromkeys((1, *kept)))


# ------------------------------------------------------------------------------------------------- distinct things


def chance_to_differ(values: Sequence[Any]) -> float:
    """The chance that two of the samples, drawn without return, differ: 1 - sum m (m - 1) / (n (n - 1)); NaN for one.

    Unbiased for two fresh samples (Simpson, 1949), whatever n is.
    """
    n = len(values)
    if n < 2:
        return math.nan
    return 1 - sum(m * (m - 1) for m in Counter(values).values()) / (n * (n - 1))


def distinct(values: Sequence[Any], name: str) -> dict[str, float]:
    """`distinct_NAMEs`, a count, and `NAMEs_differ`, a chance; NaN where no sample has a value."""
    return {f"distinct_{name}": float(len(set(values))) if values else math.nan,
            f"{name}_differ": chance_to_differ(values)}


# ------------------------------------------------------------------------------------------------ spread of meaning


def vendi_score(kernel_nn: Array) -> float:
    """exp of the entropy of the eigenvalues of K / n (Friedman and Dieng, arXiv 2210.02410): an effective number.

    K is a similarity with ones on its diagonal: n where all samples are orthogonal, 1 where all are the same.
    """
    eigenvalues = np.linalg.eigvalsh(kernel_nn / kernel_nn.shape[0])
    mass = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(mass * np.log(mass)).sum()))


def semantic_spread(vectors_nD: Array) -> dict[str, float]:
    """distance: mean of 1 - cosine over all pairs; vendi: the Vendi score of the cosines. NaN for fewer than two."""
    n = vectors_nD.shape[0]
    if n < 2:
        return {"distance": math.nan, "vendi": math.nan}
    norms = np.linalg.norm(vectors_nD, axis=1, keepdims=True)
    unit = vectors_nD / np.where(norms > 0, norms, 1.0)
    kernel = unit @ unit.T
    blank = norms[:, 0] == 0
    kernel[np.outer(blank, blank)] = 1.0  # texts without any feature are all alike, and like nothing else
    np.fill_diagonal(kernel, 1.0)
    return {"distance": float((n * n - kernel.sum()) / (n * (n - 1))), "vendi": vendi_score(kernel)}


# ----------------------------------------------------------------------------------------------- spread of wording


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams as a share of all (Li et al., arXiv 1510.03055), over all texts; NaN where there is none."""
    total: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        total.update(ngrams(words(text), n))
    return len(total) / total.total() if total else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against the others (Zhu et al., arXiv 1802.01886): 1 where all are the same.

    BLEU with clipped n-gram precisions up to 4, or the text's length where it is shorter, brevity penalty against the
    reference of the nearest length, zero counts smoothed by 0.1. NaN for fewer than two texts that have words.
    """
    parts = [tokens for text in texts if (tokens := words(text))]
    if len(parts) < 2:
        return math.nan
    lengths = [len(tokens) for tokens in parts]
    log_precision = np.zeros(len(parts))
    for n in range(1, ORDERS + 1):
        counts = [ngrams(tokens, n) for tokens in parts]
        best = _two_largest(counts)
        for i, own in enumerate(counts):
            if not own:
                continue
            clipped = 0
            for gram, count in own.items():
                (first, holder), second = best[gram]
                clipped += min(count, second if holder == i else first)
            log_precision[i] += math.log((clipped or SMOOTHING) / own.total()) / min(ORDERS, lengths[i])
    scores = [math.exp(value + min(0.0, 1 - _nearest(lengths, i) / lengths[i]))
              for i, value in enumerate(log_precision.tolist())]
    return float(np.mean(scores))


def _two_largest(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[tuple[int, int], int]]:
    """For each n-gram its largest count and whose it is, and the largest count of anybody else."""
    best: dict[tuple[str, ...], tuple[tuple[int, int], int]] = {}
    for i, own in enumerate(counts):
        for gram, count in own.items():
            (first, holder), second = best.get(gram, ((0, -1), 0))
            best[gram] = ((count, i), first) if count > first else ((first, holder), max(second, count))
    return best


def _nearest(lengths: Sequence[int], i: int) -> int:
    """The length nearest to that of text i among the others; of two as near, the shorter."""
    return min((length for j, length in enumerate(lengths) if j != i), key=lambda r: (abs(r - lengths[i]), r))


# ---------------------------------------------------------------------------------------------------- token entropy


def entropy_by_position(entropies: Sequence[Sequence[float]], edges: Sequence[int] | None = None
                        ) -> list[dict[str, float]]:
    """Mean token entropy in nats by position in the response: {start, end, value, tokens}, end not included.

    `edges` cut the positions; by default 0, 1, 2, 4, 8, ... so that the first tokens, where answers part, stand alone.
    """
    longest = max(map(len, entropies), default=0)
    cuts = list(edges) if edges is not None else [0, *(2**i for i in range(max(1, longest).bit_length() + 1))]
    found = []
    for start, end in pairwise(cuts):
        inside = [value for one in entropies for value in one[start:end]]
        if inside:
            found.append({"start": start, "end": min(end, longest), "value": float(np.mean(inside)),
                          "tokens": len(inside)})
    return found


# --------------------------------------------------------------------------------------------------------- summary


def countable(rows: Sequence[Row], warn: Say = lambda line: None) -> list[Row]:
    """The rows of one evaluation that have a text, on problems of which some sample has a score.

    Rows without a response are named through `warn`; the problems that nobody judged, `read_rows` names. Raises
    UserError for rows of several evaluations, and where none is left.
    """
    refuse_several(rows)
    lacking = [f"problem {row['problem']} sample {row['sample']}" for row in rows if row.get("response") is None]
    if lacking:
        warn(f"diversity: {count_of(lacking, 'row')} without a response left out: {some_of(lacking)}")
    told = [row for row in rows if row.get("response") is not None]
    judged = {row["problem"] for row in told if row["score"] is not None}
    if not judged:
        raise UserError("diversity: no completions to measure, with a response and a score; sample some first, or "
                        "score them with a verifier")
    return [row for row in told if row["problem"] in judged]


def diversity_table(rows: Sequence[Row], *, embed: Embed | None = None, ks: Iterable[int] = (), threshold: float = 1.0,
                    warn: Say = lambda line: None) -> Table:
    """Problems, names of the measures, and their (P, M) values, NaN where a problem has none.

    Names end in `/all` or `/right`, but for those of `functional`, which are of right and wrong together. What is left
    out, and what `warn` and a UserError say of it: see `countable` and `rungs`.
    """
    groups: dict[Any, list[Row]] = {}
    rows = countable(rows, warn)
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    ks = rungs([rows], ks, warn)
    tables = []
    for mine in groups.values():
        mine = sorted(mine, key=lambda row: (str(row.get("seed")), row["sample"]))
        right = [is_right(row, threshold) for row in mine]
        vectors = None if embed is None else np.asarray(embed([str(row["response"]) for row in mine]), np.float64)
        values = functional(right, ks)
        for scope, keep in (("all", [True] * len(mine)), ("right", right)):
            chosen = [i for i, kept in enumerate(keep) if kept]
            found = _of_samples([mine[i] for i in chosen], None if vectors is None else vectors[chosen])
            values |= {f"{name}/{scope}": value for name, value in found.items()}
        tables.append(values)
    names = list(tables[0])
    return list(groups), names, np.array([[table[name] for name in names] for table in tables], dtype=np.float64)


def _of_samples(rows: Sequence[Row], vectors_nD: Array | None) -> dict[str, float]:
    texts = [str(row["response"]) for row in rows]
    found: dict[str, float] = {}
    for name in ("answer", "strategy"):
        found |= distinct([str(row[name]).strip() for row in rows if row.get(name) is not None], name)
    found["text_differ"] = chance_to_differ([" ".join(text.split()) for text in texts])
    found |= {f"distinct_{n}": distinct_n(texts, n) if len(texts) > 1 else math.nan for n in (1, 2)}
    found["self_bleu"] = self_bleu(texts)
    if vectors_nD is not None:
        found |= semantic_spread(vectors_nD)
    return found


def summarise_diversity(rows: Sequence[Row], *, embed: Embed | None = None, ks: Iterable[int] = (),
                        entropies: Sequence[Sequence[float]] | None = None, seed: int = 0, threshold: float = 1.0,
                        warn: Say = lambda line: None) -> dict[str, Any]:
    """Every measure as {value, low, high, problems}: the mean over the problems that have it, its 95 % interval.

    `k` are those of `extra` and `slope`. `entropies`, one sequence of nats for each response, adds `token_entropy`
    (mean over tokens), `token_entropy_by_position` and `token_entropy_responses`, on how many it rests. Without it the
    first two are None: texts alone do not say. `note` says what entropy is not.
    """
    rows = countable(rows, warn)
    ks = rungs([rows], ks, warn)
    table = diversity_table(rows, embed=embed, ks=ks, threshold=threshold)
    found: dict[str, Any] = dict(means(table, seed))
    found["problems"], found["samples"], found["k"] = len(table[0]), len(rows), list(ks)
    tokens = [value for one in entropies or () for value in one]
    found["token_entropy"] = float(np.mean(tokens)) if tokens else None
    found["token_entropy_by_position"] = entropy_by_position(entropies) if entropies and tokens else None
    found["token_entropy_responses"] = len(entropies or ())
    found["note"] = NOT_DIVERSITY
    return found
