"""Evaluation: ACC, ASR and RA, DER and RIR against a baseline."""

from bdfast.evaluation.evaluator import Evaluator, Metrics, evaluate

__all__ = ["Evaluator", "Metrics", "evaluate"]
