"""Training on data that may be poisoned. One file for each method; names in `METHODS`."""

from bdfast.suppression.abl import ABLSuppression
from bdfast.suppression.base import Suppressed, Suppression
from bdfast.suppression.cbd import CBDSuppression
from bdfast.suppression.suppress_result import SuppressResult

METHODS: dict[str, type[Suppression]] = {
    "abl": ABLSuppression,
    "cbd": CBDSuppression,
}

__all__ = ["METHODS", "ABLSuppression", "CBDSuppression", "SuppressResult", "Suppressed", "Suppression"]
