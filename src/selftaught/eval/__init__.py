"""Stage 9: measures as pure functions over saved completions."""

from selftaught.eval.config import EvalConfig
from selftaught.eval.rows import append_rows, evaluations, read_rows, rows_of, select
from selftaught.eval.summary import compare, summarise, too_few

__all__ = [
    "EvalConfig", "append_rows", "compare", "evaluations", "read_rows", "rows_of", "select", "summarise", "too_few",
]  # fmt: skip
