"""The end of a run: results from the saved completions, the final model with its card, the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from selftaught.errors import UserError
from selftaught.evaluate import results
from selftaught.report import model_card, result_sentence, result_table, write_curves, write_report
from selftaught.score.client import quiet
from selftaught.score.hub import lasting_name
from selftaught.session import Session


def finish(session: Session) -> dict[str, Any]:
    """Write results.json, final/ and report.html; returns the results ({} where nothing was held out or is left)."""
    ground, folder = session.parts.ground, session.folder
    found: dict[str, Any] = {}
    if ground.dataset.heldout:
        with outliving(session, "results.json"):
            found = results(ground, folder, session.done, session.seconds)
    if found:
        if session.best is not None:
            found["best"] = {"step": session.best[0], "measure": ground.run.eval.best, "value": session.best[1]}
        folder.write_results(found)
        for line in ("", *result_table(found), "", result_sentence(found)):
            session.progress.say(line)
    if ground.run.report.html:
        session.trackers.close()
        with outliving(session, "report.html"), folder.surviving("report.html"):
            write_report([folder.path], folder.path / "report.html")
            write_curves([folder.path], folder.path / "curves.png")
            session.progress.say(f"report: {folder.path / 'report.html'}")
    save_model(session, found)
    session.progress.say(f"model:  {folder.final}")
    if session.best is not None and session.best[0] != session.done:
        step, value = session.best
        session.progress.say(f"best:   {ground.run.eval.best} {value:.3f} after step {step}, kept in "
                             f"{folder.checkpoints / f'step-{step}'}")
    return found


@contextmanager
def outliving(session: Session, name: str) -> Iterator[None]:
    """Around what is made of the log: where a full disk has left holes in it, say so and go on to the model."""
    try:
        yield
    except (ValueError, OSError) as error:
        session.progress.warn(f"{name} cannot be made: {error}; the run ends without it")


def save_model(session: Session, found: dict[str, Any]) -> None:
    """final/: a plain folder that `from_pretrained` loads (an adapter's, peft), with a model card; whole, or as it was.

    Raises UserError where it cannot be written.
    """
    ground, folder = session.parts.ground, session.folder
    work = folder.path / ".final.tmp"
    card = model_card(ground.run.resolved(), found, arxiv=getattr(ground.method, "arxiv", None))
    try:
        shutil.rmtree(work, ignore_errors=True)
        with quiet():
            session.parts.backbone.save(work, lasting_name(ground.run.model))
            ground.tokenizer.save_pretrained(work)
        (work / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder.final, ignore_errors=True)
        work.rename(folder.final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        kept = "its checkpoint is whole" if session.saved == session.done else "its last checkpoint failed too"
        remedy = "give the same command with --resume" if session.checkpoints.steps() else "begin anew with another out"
        raise UserError(f"{folder.final} cannot be written ({error}); the training is done and {kept}: free some space "
                        f"and {remedy}") from error
