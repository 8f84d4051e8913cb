"""Concept graphs: what self-distillation from sampled demonstrations does to the ways in which a problem is solved."""

from selftaught.studies.graphs.study import run

__all__ = ["run"]
