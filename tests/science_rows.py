"""Made questions in the columns of the published data sets: SciKnowEval's JSON lines and GPQA's CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GPQA_COLUMNS = ("Pre-Revision Question", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
                "Incorrect Answer 3", "Explanation", "Subdomain", "High-level domain", "Record ID")  # fmt: skip


def sciknoweval_row(number: int, *, domain: str = "Physics", level: str = "L3", kind: str = "mcq-4-choices",
                    **changed: Any) -> dict[str, Any]:
    """A question on a sum, whose right option is `number` + 1 at the place `number` % (how many options)."""
    count = {"mcq-4-choices": 4, "mcq-2-choices": 2}.get(kind, 0)
    right = number % count if count else 0
    texts = [f"{number + 1 + (place - right) * 10} joules" for place in range(count)]
    row: dict[str, Any] = {
        "prompt": {"default": "Given a question and four options, please select the right answer."},
        "question": f"A body has {number} joules and gets one more. What has it?",
        "answer": "" if count else str(number + 1), "type": kind, "domain": domain,
        "details": {"level": level, "task": "sums", "subtask": "plus one", "source": "made"},
        "answerKey": "ABCD"[right] if count else "",
        "choices": {"text": texts, "label": list("ABCD"[:count])},
    }  # fmt: skip
    return {**row, **changed}


def right_text(number: int) -> str:
    return f"{number + 1} joules"


def gpqa_row(number: int, domain: str = "Physics") -> dict[str, str]:
    wrong = [f"{number + 1 + step} joules" for step in (10, 20, 30)]
    values = ("", f"A hard body has {number} joules and gets one more. What has it?", right_text(number), *wrong,
              f"{number} and one is {number + 1}.", f"{domain} (general)", domain, f"rec{number}")  # fmt: skip
    return dict(zip(GPQA_COLUMNS, values, strict=True))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
