"""The exact laws of self-distillation on tables of probabilities, each computed in two ways.

Left the closed form; right what descent on the package's own objectives finds. Statements that fail are here too, as
controls which must be seen to fail. Nothing is read or downloaded; about half a minute on one core.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from selftaught.errors import UserError, nearest
from selftaught.records import Say
from selftaught.report.page import write_page, write_pngs
from selftaught.studies.laws import bumps, demonstrations, demopsd, dopd, floors, pooling, rlsd
from selftaught.studies.laws.law import Law

SMOKE_UPDATES = 20  # of the toy's sampled training, the one thing here that takes long

LAWS: Mapping[str, Callable[[torch.Generator], Law]] = {
    "optimum": demonstrations.optimum,
    "ratios": demonstrations.ratios,
    "copying": demonstrations.copying,
    "pooling": pooling.pooling,
    "toy": bumps.toy,
    "target": demopsd.target,
    "exploration": demopsd.exploration,
    "minority": demopsd.minority,
    "increments": rlsd.increments,
    "routing": dopd.routing,
    "floors": floors.floors,
}


def compute(names: Sequence[str] = (), *, seed: int = 0, smoke: bool = False) -> Iterator[Law]:
    """Those laws, or all, one after another. Random tables are drawn for each law from the seed and its name.

    Raises:
        UserError: an unknown law, with the nearest.
    """
    for name in names:
        if name not in LAWS:
            raise UserError(f"study laws: there is no law {name!r}; {nearest(name, LAWS)}")
    functions = dict(LAWS)
    if smoke:
        functions["toy"] = partial(bumps.toy, updates=SMOKE_UPDATES)
    for name in names or LAWS:
        # One number of 32 bits: torch's generator on the CPU looks at no more.
        yield functions[name](torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode())))


def run(out: Path, say: Say, *, only: Sequence[str] = (), seeds: Sequence[int] = (0,), smoke: bool = False) -> str:
    """Compute the laws, say their numbers, and write report.html, results.json and a PNG per picture into `out`.

    `seeds` is one seed, of the random tables. `smoke` cuts the toy's sampled training short. Returns the last words.

    Raises:
        UserError: an unknown law, several seeds, or a folder that cannot be written.
    """
    if len(seeds) != 1:
        raise UserError(f"study laws: --seeds {','.join(map(str, seeds))} must be one seed; give several --out folders "
                        "a run each")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); choose another place") from error
    laws = []
    for law in compute(only, seed=seeds[0], smoke=smoke):
        laws.append(law)
        for line in law.lines():
            say(line)
    pictures = write_pngs([figure for law in laws for figure in law.figures], out)
    drawn = (f"{len(pictures)} pictures beside it as PNG files" if pictures else
             "its pictures are drawn in it; as PNG files they need the extra: pip install 'selftaught[plots]'")
    (out / "results.json").write_text(json.dumps({law.name: law.as_json() for law in laws}, indent=1) + "\n",
                                      encoding="utf-8")
    write_page(out / "report.html", "The exact laws of self-distillation", [
        summary(laws), "Each law is computed in two ways: from its closed form, and by descent on the package's own "
        "objectives (natural-gradient steps on the logits, in float64). Controls are statements that are false here, "
        "and must be seen to be.",
        *([f"Smoke: the toy's sampled training was cut to {SMOKE_UPDATES} updates."] if smoke else []),
        drawn[0].upper() + drawn[1:] + ".",
    ], [law.part() for law in laws])
    return f"\n{summary(laws)}\nreport: {out / 'report.html'}; {drawn}"


def summary(laws: Sequence[Law]) -> str:
    """How many of the checks hold, and by name those that do not."""
    checks = [(law.name, check) for law in laws for check in law.checks]
    failed = [f"{name}: {check.what}" for name, check in checks if not check.holds]
    controls = sum(check.control for _, check in checks)
    text = (f"{len(checks) - len(failed)} of {len(checks)} checks hold, {controls} of them controls that must differ; "
            f"{sum(len(check.known) for _, check in checks)} numbers known beforehand.")
    return text + (f" NOT: {'; '.join(failed)}." if failed else "")
