"""Concept graphs: what self-distillation from sampled demonstrations does to the ways in which a problem is solved."""
