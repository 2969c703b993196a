"""Evaluation: ACC, ASR and RA, DER and RIR against a baseline, and the loss landscape."""

from bdfast.evaluation.evaluator import Evaluator, Metrics, evaluate

__all__ = ["Evaluator", "Metrics", "evaluate"]
