"""Experiments: each a command that resumes where it was stopped."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.errors import UserError, nearest

if TYPE_CHECKING:  # the command line reads STUDIES for its help, and must not wait for records
    from selftaught.records import Say

# One line for each: a module of this package with `run(out, say, *, ...) -> str`, its last words. The keyword-only
# arguments of `run` are those options of the command line (only, seeds, jobs, smoke, overrides) that the study has.
STUDIES = {
    "graphs": "self-distillation and diversity on concept graphs, four arms or those of --only",
    "laws": "the exact laws on tables of probabilities, each computed in two ways",
    "leakage": "students with planted contamination, ranked by the leakage score (grpo=RUN,RUN adds students of GRPO)",
    "methods": "every method on one task, the self-taught ones also with an empty and a wrong privilege",
    "science": "GRPO and self-distillation from one and three demonstrations on SciKnowEval and GPQA",
}


def start(name: str, out: Path | None, say: Say, **options: Any) -> str:
    """Run a study into `out` (runs/NAME if None); an option that is None, False or empty was not given.

    Raises:
        UserError: an unknown study, or an option that it does not have.
    """
    if name not in STUDIES:
        raise UserError(f"study {name!r}: {nearest(name, STUDIES)}")
    run = import_module(f"selftaught.studies.{name}").run
    has = [p.name for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
    given = {option: value for option, value in options.items() if value not in (None, False, (), [])}
    for option in given:
        if option not in has:
            flag = "key=value" if option == "overrides" else f"--{option}"
            raise UserError(f"study {name}: it has no {flag}; it has "
                            f"{', '.join('key=value' if o == 'overrides' else f'--{o}' for o in has) or 'no options'}")
    folder = out or Path(f"runs/{name}{'-smoke' if given.get('smoke') else ''}")
    words: str = run(folder, say, **given)
    return words
