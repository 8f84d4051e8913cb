"""The views: (weights, context) to hidden states to distributions, chunk by chunk."""

from selftaught.score.backbone import Backbone, ScoreConfig
from selftaught.score.external import TeacherConfig
from selftaught.score.views import Micro, Scorer

__all__ = ["Backbone", "Micro", "ScoreConfig", "Scorer", "TeacherConfig"]
