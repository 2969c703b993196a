"""Detectors on many small networks, clean and backdoored: AUROC, and what is found at a threshold from clean networks.

    python -m bench.detection train --networks networks             # trains what is not there
    python -m bench.detection run surrogate --networks networks     # appends to the results
    python -m bench.detection calibrations                          # writes what comes with bdfast
    python -m bench.detection table

Three kinds of network (with BatchNorm, without, and ConvNeXt) on 10 and on 36 classes; a class of the latter is a pair
of garments side by side. Thresholds are calibrated on clean networks of seeds 0 to 3, and everything is measured on
those of seeds 4 to 7 and on backdoored networks; no option of a detector is chosen with any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import torch
import tyro
from torch import nn

import bdfast
from bdfast.attacks import SIG, Attack, BadNets, Blended, WaNet, poisoned
from bdfast.data.images import ImageTensors
from bdfast.data.sources import load_source
from bdfast.detectors import METHODS, Calibration
from bdfast.detectors.calibration import SHIPPED
from bdfast.evaluation import Evaluator
from bdfast.files import finite, write_json
from bdfast.io import load_into, save_weights
from bdfast.matrix.tables import DASH, markdown_table
from bdfast.models import ModelSpec
from bdfast.scenario import untrained
from bdfast.training import fit
from bdfast.training.descriptions import plain
from bdfast.training.seeds import derived_seed

RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
TRAINED_ON, DEFENDER, TESTED_ON = 12_000, 500, 2_000
FAMILIES = ("patch", "blended", "sinusoid", "warp", "all-to-all")
CALIBRATING, MEASURING = (0, 1, 2, 3), (4, 5, 6, 7)
KINDS = {
    "resnet": ({"arch": "preact_resnet18", "width": 8, "stem": "stride2"}, 0.1),
    "vgg": ({"arch": "small_vgg11", "width": 8}, 0.02),
    "convnext": ({"arch": "small_convnext", "width": 8, "depth": 1}, 0.02),
}
EPOCHS = {"garments": 6, "pairs": 8}
FALSE_ALARMS = 0.05
PLANTED = 0.8
"""The least ASR of a network that counts as backdoored."""


@dataclass(frozen=True)
class Network:
    """One of the networks; family "clean" for one without a backdoor."""

    kind: str
    data: str
    family: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.data}-{self.family}-{self.seed}"


def every_network() -> Iterator[Network]:
    for kind in KINDS:
        for data in EPOCHS:
            for seed in (*CALIBRATING, *MEASURING):
                yield Network(kind, data, "clean", seed)
            for family in FAMILIES:
                yield Network(kind, data, family, MEASURING[0])


@cache
def images(data: str) -> tuple[ImageTensors, ImageTensors, ImageTensors]:
    """What the networks are trained on, the defender's, and the test images."""
    source = load_source("fashion-mnist")
    draws = torch.Generator().manual_seed(0)

    def beside(part: ImageTensors) -> ImageTensors:
        """Pairs of the first six garments."""
        known = (part.labels < 6).nonzero()[:, 0]
        left, right = (known[torch.randperm(len(known), generator=draws)] for _ in range(2))
        pairs = torch.cat([part.images[left], part.images[right]], dim=3)[..., ::2]
        return ImageTensors(pairs, part.labels[left] * 6 + part.labels[right])

    train, test = (part if data == "garments" else beside(part) for part in (source.train, source.test))
    order = torch.randperm(len(train), generator=draws)
    parts = order[:TRAINED_ON], order[TRAINED_ON : TRAINED_ON + DEFENDER]
    return train.subset(parts[0]), train.subset(parts[1]), test.subset(torch.arange(TESTED_ON))


def attack_of(network: Network) -> Attack | None:
    classes = 10 if network.data == "garments" else 36
    target = derived_seed(network.seed, network.name) % classes
    made = {
        "patch": lambda: BadNets(target=target),
        "blended": lambda: Blended(target=target),
        "sinusoid": lambda: SIG(target=target, poison_rate=0.1, clean_label=False),
        "warp": lambda: WaNet(target=target),
        "all-to-all": lambda: BadNets(targets=(*range(1, classes), 0)),
    }
    return made[network.family]() if network.family in made else None


def spec_of(network: Network) -> ModelSpec:
    source = load_source("fashion-mnist")
    classes = 10 if network.data == "garments" else 36
    options = {"in_channels": 1, "num_classes": classes, "mean": source.mean, "std": source.std}
    return ModelSpec(**KINDS[network.kind][0], **options)


def train(networks: Path, threads: int = 1) -> None:
    """Train every network that is not there."""
    torch.set_num_threads(threads)
    networks.mkdir(parents=True, exist_ok=True)
    for network in every_network():
        _trained(network, networks)


def _trained(network: Network, folder: Path) -> nn.Module:
    weights, model = folder / f"{network.name}.safetensors", untrained(spec_of(network), seed=network.seed)
    if weights.exists():
        return load_into(model, weights).eval()
    training, _, test = images(network.data)
    attack = attack_of(network)
    given = training if attack is None else poisoned(training, attack, seed=network.seed)
    fit(model, given, epochs=EPOCHS[network.data], lr=KINDS[network.kind][1], seed=network.seed)
    model.eval()
    metrics = Evaluator(test, None if attack is None else bdfast.Triggered(test, attack))(model)
    facts = {**asdict(network), "target": getattr(attack, "target", None), **metrics.as_dict()}
    write_json(folder / f"{network.name}.json", facts)
    save_weights(model, weights)
    print(network.name, metrics)
    return model


def run(
    method: tyro.conf.Positional[str], networks: Path, only: str = "", threads: int = 1, results: Path = RESULTS
) -> None:
    """Scan every network that has no record of this method yet; `only`: whose name contains it."""
    torch.set_num_threads(threads)
    done = {(row["method"], row["name"]) for row in _rows(results)}
    for network in every_network():
        if (method, network.name) in done or only not in network.name:
            continue
        model = _trained(network, networks)
        facts = json.loads((networks / f"{network.name}.json").read_text(encoding="utf-8"))
        started = perf_counter()
        found = bdfast.detect(model, images(network.data)[1], method=method, threshold=0.0, seed=network.seed)
        row = {
            "method": method,
            "name": network.name,
            **facts,
            "score": found.score,
            "targets": list(found.targets),
            "evidence": found.evidence,
            "options": plain(asdict(METHODS[method]())),
            "seconds": perf_counter() - started,
            "torch": torch.__version__,
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")
        print(network.name, f"{found.score:.3f}", found.targets, f"{row['seconds']:.0f} s", flush=True)


def calibrations() -> None:
    """Write the calibration of every method that has all its clean networks."""
    SHIPPED.mkdir(exist_ok=True)
    for method in METHODS:
        rows = [row for row in _rows(RESULTS) if row["method"] == method and row["family"] == "clean"]
        scores = tuple(row["score"] for row in rows if row["seed"] in CALIBRATING)
        if len(scores) == len(KINDS) * len(EPOCHS) * len(CALIBRATING):
            what = f"small networks of {len(KINDS)} kinds, 10 and 36 classes of garments, {DEFENDER} clean images"
            Calibration(method, rows[0]["options"], scores, what).save(SHIPPED / f"{method}.json")


def table() -> None:
    """Print the tables."""
    rows = _rows(RESULTS)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines, found = [], []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        clean = [row["score"] for row in own if row["family"] == "clean" and row["seed"] in MEASURING]
        calibrating = [row["score"] for row in own if row["family"] == "clean" and row["seed"] in CALIBRATING]
        if not clean or not calibrating:
            continue
        limit = Calibration(method, {}, tuple(calibrating), "").threshold(FALSE_ALARMS)
        attacked = [row for row in own if row["family"] != "clean" and (row["asr"] or 0) >= PLANTED]
        flagged = [row for row in attacked if row["score"] > limit]
        right = sum(row["target"] in row["targets"] or _to_all(row) for row in flagged)
        seconds = sorted(row["seconds"] for row in own)
        lines.append(
            [
                method,
                f"{len(attacked)} / {len(clean)}",
                f"{auroc([row['score'] for row in attacked], clean):.3f}",
                f"{limit:.3g}",
                f"{len(flagged)} of {len(attacked)}",
                f"{sum(score > limit for score in clean)} of {len(clean)}",
                f"{right} of {len(flagged)}",
                f"{seconds[len(seconds) // 2]:.0f}",
            ]
        )
        for family in FAMILIES:
            scores = [row["score"] for row in attacked if row["family"] == family]
            share = f"{sum(score > limit for score in scores)} of {len(scores)}"
            found.append([method, family, f"{auroc(scores, clean):.3f}" if scores else DASH, share])
    heads = ["method", "backdoored / clean", "AUROC", "threshold", "found", "clean ones accused", "target right"]
    print(markdown_table([*heads, "median seconds"], lines, names=1))
    print()
    print(markdown_table(["method", "family", "AUROC", "found"], found, names=2))


def _to_all(row: dict) -> bool:
    return row["family"] == "all-to-all" and row["targets"] == [-1]


def auroc(positive: list[float], negative: list[float]) -> float:
    """How often a backdoored network scores higher than a clean one; ties count half."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"train": train, "run": run, "calibrations": calibrations, "table": table}, description=__doc__
    )
