"""What every audit shares: options in a frozen dataclass, `run`, and a finding with the rates it measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from bdfast.audits.case import Case
from bdfast.audits.rates import Figures
from bdfast.method_options import Checked
from bdfast.training import Run


@dataclass(frozen=True)
class Finding(ABC):
    """What an audit found.

    Attributes:
        rate_name: "ASR" or "surrogate rate", what all rates in it are.
    """

    rate_name: str

    @property
    def p_rate(self) -> float | None:
        """The rate that the audit brought the purified network to; None where it measures something else."""
        return None

    @property
    def by_itself(self) -> float:
        """What part of `p_rate` has another reason than a backdoor that is left, as a control tells; 0 without one."""
        return 0.0

    @abstractmethod
    def sentences(self, after: Figures) -> list[str]:
        """What it means, in words, beside the figures of the purified network."""

    def as_json(self) -> dict[str, Any]:
        """Every field for a file."""
        return {field.name: _as_json(getattr(self, field.name), self.rate_name) for field in fields(self)}


@dataclass(frozen=True)
class AuditMethod(Checked, ABC):
    """An audit; the fields of a subclass are its options.

    Attributes:
        paper: Where it was published.
    """

    paper: ClassVar[str] = ""

    def lacks(self, case: Case) -> str | None:
        """What the audit needs and `case` has not, as the end of "expected ..."; None where nothing is missing."""
        return None

    @abstractmethod
    def run(self, case: Case, run: Run) -> Finding:
        """Audit the purified network of `case`, none of whose networks may change."""


def _as_json(value: Any, rate_name: str) -> Any:
    if isinstance(value, Figures):
        return value.as_json(rate_name)
    if isinstance(value, tuple | list):
        return [_as_json(part, rate_name) for part in value]
    if isinstance(value, dict):
        return {str(key): _as_json(part, rate_name) for key, part in value.items()}
    return value
