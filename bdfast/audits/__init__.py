"""Audits: is the safety of a purified network only superficial? One file each; names in `METHODS`."""

from bdfast.audits.base import AuditMethod, Finding
from bdfast.audits.batch_statistics import BatchStatisticsAudit, BatchStatisticsFinding
from bdfast.audits.findings import Audit
from bdfast.audits.path import PathAudit, PathFinding
from bdfast.audits.rates import Figures
from bdfast.audits.reactivation import ReactivationAudit, ReactivationFinding
from bdfast.audits.relearning import RelearningAudit, RelearningFinding
from bdfast.audits.retuning import RetuningAudit, RetuningFinding

METHODS: dict[str, type[AuditMethod]] = {
    "batch_statistics": BatchStatisticsAudit,
    "retuning": RetuningAudit,
    "reactivation": ReactivationAudit,
    "path": PathAudit,
    "relearning": RelearningAudit,
}

__all__ = [
    "METHODS",
    "Audit",
    "AuditMethod",
    "BatchStatisticsAudit",
    "BatchStatisticsFinding",
    "Figures",
    "Finding",
    "PathAudit",
    "PathFinding",
    "ReactivationAudit",
    "ReactivationFinding",
    "RelearningAudit",
    "RelearningFinding",
    "RetuningAudit",
    "RetuningFinding",
]
