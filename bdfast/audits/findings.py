"""What an audit returns: the findings by name, the rates before and after them, and a verdict in words."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bdfast.audits.base import Finding
from bdfast.audits.rates import ROSE, Figures, rises, share
from bdfast.files import write_json

Status = Literal["superficial", "not removed", "no sign", "not attacked", "not measured"]


@dataclass(frozen=True, eq=False)
class Audit:
    """Whether the safety of a purified network is only superficial.

    Attributes:
        before: What the original network shows.
        after: What the purified one shows.
        clean_model: What the clean network shows; None without one.
        results: The findings by the name of the audit, in order.
        rate_name: "ASR", or "surrogate rate" where a surrogate stands in for the trigger; what all rates are.
        trigger: What the trigger was; None without one.
        notes: What a reader should know of how it was measured.
        options: The options of each audit, and the seed.
        seconds: Wall-clock time.
        warnings: What speaks against trusting the figures.
    """

    before: Figures
    after: Figures
    clean_model: Figures | None
    results: dict[str, Finding]
    rate_name: str
    trigger: dict[str, Any] | None
    notes: list[str]
    options: dict[str, Any]
    seconds: float
    warnings: list[str] = field(default_factory=list)

    @property
    def o_rate(self) -> float | None:
        """The rate of the purified network as it is, before any audit."""
        return self.after.rate

    @property
    def p_rates(self) -> dict[str, float]:
        """For each audit that attacks the purified network, the rate that it brought it to."""
        return {name: x.p_rate for name, x in self.results.items() if x.p_rate is not None}

    @property
    def o_asr(self) -> float | None:
        """O-ASR (Min et al., NeurIPS 2024): the ASR before any audit; None for a surrogate trigger."""
        return self.o_rate if self.rate_name == "ASR" else None

    @property
    def p_asr(self) -> dict[str, float]:
        """P-ASR: the ASR after each audit; empty for a surrogate trigger."""
        return self.p_rates if self.rate_name == "ASR" else {}

    @property
    def curves(self) -> dict[str, list[tuple[float, Figures]]]:
        """For each audit that has one: its course, over t for "path", over updates for the others."""
        found = {name: getattr(result, "curve", None) for name, result in self.results.items()}
        return {name: list(curve) for name, curve in found.items() if curve is not None}

    @property
    def back(self) -> list[str]:
        """The audits in which the rate came back, by `ROSE` at least and so much above what the control shows."""
        start = self.o_rate
        return [
            name
            for name, result in self.results.items()
            if rises(result.p_rate, start) and rises(result.p_rate, result.by_itself)
        ]

    @property
    def status(self) -> Status:
        """In one phrase: "not attacked" where no audit gave a rate that could come back. The thresholds are ours."""
        if self.o_rate is None:
            return "not measured"
        if self.o_rate - self._by_itself >= ROSE:
            return "not removed"
        if not self.p_rates:
            return "not attacked"
        return "superficial" if self.back else "no sign"

    @property
    def verdict(self) -> str:
        """In a sentence."""
        name, rate = self.rate_name, share(self.o_rate)
        guessed = "" if name == "ASR" else ", as far as a surrogate trigger tells"
        if self.status == "not measured":
            return "not measured: there is no trigger, so that nothing can come back"
        if self.status == "not removed":
            return f"not removed{guessed}: the {name} of the purified network is {rate}"
        if self.status == "superficial":
            found = ", ".join(f"{share(self.p_rates[audit])} after {audit}" for audit in self.back)
            return f"superficial{guessed}: the {name} of {rate} comes back: {found}"
        if self.status == "not attacked":
            return f"not attacked: the {name} of the purified network is {rate}"
        attacks = ", ".join(self.p_rates)
        return f"no sign that it is superficial{guessed}: the {name} of {rate} comes back in none of {attacks}"

    @property
    def _by_itself(self) -> float:
        """What the trigger reaches in the clean network: no sign of a backdoor."""
        return 0.0 if self.clean_model is None else self.clean_model.rate or 0.0

    def sentences(self) -> list[str]:
        """What each audit found, in words."""
        said = [sentence for result in self.results.values() for sentence in result.sentences(self.after)]
        if self.before.rate is not None and self.before.rate < ROSE:
            said.append(
                f"The {self.rate_name} of the original network is {share(self.before.rate)} already, so that there is "
                "not much to come back."
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """For a file: the verdict, and all figures, with rates under their name."""
        return {
            "status": self.status,
            "verdict": self.verdict,
            "sentences": self.sentences(),
            "rate": self.rate_name,
            "before": self.before.as_json(self.rate_name),
            "after": self.after.as_json(self.rate_name),
            "clean_model": None if self.clean_model is None else self.clean_model.as_json(self.rate_name),
            f"{self.rate_name} before audits": self.o_rate,
            f"{self.rate_name} after audits": self.p_rates,
            "trigger": self.trigger,
            "results": {name: result.as_json() for name, result in self.results.items()},
            "notes": self.notes,
            "warnings": self.warnings,
            "options": self.options,
            "seconds": self.seconds,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `audit.json` into `folder`, whole or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "audit.json", self.as_json())

    def __str__(self) -> str:
        """The verdict."""
        return self.verdict
