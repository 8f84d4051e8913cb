"""Stage 9: measures as pure functions over saved completions."""

from selftaught.eval.config import EvalConfig, LeakageConfig
from selftaught.eval.diversity import diversity_table, summarise_diversity
from selftaught.eval.leakage import Scored, compare_leakage, leakage_table, summarise_leakage
from selftaught.eval.rows import append_rows, evaluations, read_rows, rows_of, select
from selftaught.eval.summary import compare, summarise, too_few

__all__ = ["EvalConfig", "LeakageConfig", "Scored", "append_rows", "compare", "compare_leakage", "diversity_table",
           "evaluations", "leakage_table", "read_rows", "rows_of", "select", "summarise", "summarise_diversity",
           "summarise_leakage", "too_few"]
