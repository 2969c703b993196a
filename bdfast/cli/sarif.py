"""Findings as SARIF 2.1.0, the format that code scanning services read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bdfast._version import __version__
from bdfast.detectors import Detection

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULE = "backdoor"


def as_sarif(detection: Detection, weights: Path) -> dict[str, Any]:
    """One run with one result: a warning where the network is suspicious, else a pass.

    A finding is a warning and no error: clean networks get there, too, as often as `false_alarms` says.
    """
    alarms = detection.false_alarms
    rate = "nobody has measured how often clean networks get there" if alarms is None else str(alarms)
    message = f"{detection} ({detection.scored_by}; threshold: {detection.threshold_from}; {rate})."
    result = {
        "ruleId": RULE,
        "ruleIndex": 0,
        "kind": "fail" if detection.suspicious else "pass",
        "level": "warning" if detection.suspicious else "none",
        "message": {"text": message},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(weights)}}}],
        "properties": detection.as_json(),
    }
    rule = {
        "id": RULE,
        "name": "Backdoor",
        "shortDescription": {"text": "The network looks as if it had a backdoor."},
        "fullDescription": {
            "text": "A backdoored network behaves normally until a trigger appears in its input, then answers what an "
            "attacker chose. The detector looks at the network with clean images only."
        },
        "help": {
            "text": "Look at the evidence. `bdfast purify` removes backdoors with clean images; `bdfast detect` with "
            "another method, or with more images, gives a second opinion."
        },
        "defaultConfiguration": {"level": "warning"},
    }
    driver = {"name": "bdfast", "version": __version__, "rules": [rule]}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "invocations": [{"executionSuccessful": True}], "results": [result]}],
    }


def _uri(path: Path) -> str:
    """Relative paths stay relative: to where the scan ran."""
    from urllib.parse import quote

    return path.absolute().as_uri() if path.is_absolute() else quote(path.as_posix())
