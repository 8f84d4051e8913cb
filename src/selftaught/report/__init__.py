"""Stage 10: the run folder, metrics, trackers, progress, the HTML report and the model card."""

from selftaught.report.card import model_card
from selftaught.report.curves import write_curves
from selftaught.report.folder import RunFolder, refuse_other, refuse_taken
from selftaught.report.health import Health
from selftaught.report.html import write_report
from selftaught.report.progress import Progress, duration
from selftaught.report.trackers import ReportConfig, Trackers, check_trackers
from selftaught.report.versions import versions
from selftaught.report.words import result_sentence, result_table

__all__ = [
    "Health",
    "Progress",
    "ReportConfig",
    "RunFolder",
    "Trackers",
    "check_trackers",
    "duration",
    "model_card",
    "refuse_other",
    "refuse_taken",
    "result_sentence",
    "result_table",
    "versions",
    "write_curves",
    "write_report",
]
