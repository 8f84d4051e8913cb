"""The end of a run: results from the saved completions, the final model with its card, the report."""

from __future__ import annotations

from typing import Any

from selftaught.errors import UserError
from selftaught.evaluate import results
from selftaught.report import model_card, result_sentence, write_curves, write_report
from selftaught.session import Session


def finish(session: Session) -> dict[str, Any]:
    """Write results.json, final/ and report.html; returns the results ({} where nothing was held out)."""
    ground, folder = session.parts.ground, session.folder
    found: dict[str, Any] = {}
    if ground.dataset.heldout:
        found = results(ground, folder, session.done, session.seconds)
        folder.write_results(found)
        session.progress.say(result_sentence(found))
    with folder.surviving("final"):
        save_model(session, found)
    if ground.run.report.html:
        session.trackers.close()
        with folder.surviving("report.html"):
            write_report([folder.path], folder.path / "report.html")
            write_curves([folder.path], folder.path / "curves.png")
        session.progress.say(f"report: {folder.path / 'report.html'}")
    session.progress.say(f"model:  {folder.final}")
    return found


def save_model(session: Session, found: dict[str, Any]) -> None:
    """final/: a plain folder that `from_pretrained` loads, with a model card."""
    ground, folder = session.parts.ground, session.folder
    try:
        session.parts.backbone.model.save_pretrained(folder.final)
    except Exception as error:
        if "No space left" not in str(error):
            raise
        raise UserError(f"{folder.final}: no space left on the disk; nothing is lost: free some and --resume") from error
    ground.tokenizer.save_pretrained(folder.final)
    card = model_card(ground.run.resolved(), found, arxiv=getattr(ground.method, "arxiv", None))
    (folder.final / "README.md").write_text(card, encoding="utf-8")
