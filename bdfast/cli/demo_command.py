"""`bdfast demo`: plant a backdoor, remove it with clean data only, and show what happened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import tyro
from torch import nn

from bdfast import defenses, report
from bdfast.attacks import PreparedAttack, Triggered
from bdfast.attacks.trigger_files import save_trigger, trigger_path
from bdfast.audits.landscape import Landscape, survey
from bdfast.cli.terminal import Output, metrics_table
from bdfast.data.images import ImageTensors
from bdfast.defenses.purification import purify
from bdfast.errors import nearest
from bdfast.evaluation import Evaluator
from bdfast.files import writable_folder, write_json
from bdfast.io import save_weights
from bdfast.methods import option_fields
from bdfast.scenario import Scenario, plan, plant

Flat = tyro.conf.arg(name="")

SURVEYED = 500
"""Images on which the report's landscape is measured."""


@dataclass(frozen=True)
class Demo:
    """Train a backdoored PreAct-ResNet18 on Fashion-MNIST, clean it, and write a report.

    The defense gets clean images that the attacker did not train on, and nothing else; the test set and its triggered
    copy only serve to measure.

    Attributes:
        attack: What to plant: a name from `bdfast.list_methods("poison")`.
        method: What to remove it with: a name from `bdfast.list_methods("purify")`.
        seed: Of all randomness.
        clean_share: Clean images that the defender has, as a fraction of the training set.
        output: Folder for the report, the metrics and both models.
        show: How to report.
    """

    attack: str = "badnets"
    method: str = "uau"
    seed: int = 0
    clean_share: float = 0.05
    output: Path = Path("demo-output")
    show: Annotated[Output, Flat] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast demo`."""
    demo = tyro.cli(Demo, prog="bdfast demo", args=arguments)
    methods = defenses.METHODS
    if demo.method not in methods:
        raise ValueError(
            f"method: expected one of {', '.join(methods)}, got {demo.method!r}; {nearest(demo.method, methods)}"
        )
    started = perf_counter()
    console = demo.show.console
    planned = plan(demo.attack, seed=demo.seed, clean_share=demo.clean_share)
    writable_folder(demo.output)
    console.print(f"Data: {planned.source.message}. The defender holds {len(planned.clean):,} clean images.")
    scenario = plant(planned, seed=demo.seed, progress=demo.show.progress())
    model = scenario.model
    weights = demo.output / "backdoored.safetensors"
    save_weights(model, weights, description=scenario.spec.to_json())
    if isinstance(scenario.attack, PreparedAttack):
        save_trigger(scenario.attack, trigger_path(weights))

    evaluator = Evaluator(scenario.test, scenario.triggered, device=next(model.parameters()).device)
    before = evaluator(model)
    console.print(metrics_table({"backdoored": before}))
    result = purify(model, scenario.clean, method=demo.method, seed=demo.seed, progress=demo.show.progress())
    after = evaluator(result.model, baseline=before)
    result.save(demo.output / "purified", description=scenario.spec.to_json())

    seconds = perf_counter() - started
    content = {
        "before": {name: asdict(before)[name] for name in ("acc", "asr", "ra")},
        "after": {name: asdict(after)[name] for name in ("acc", "asr", "ra")},
        "der": after.der,
        "found": result.found,
        "verdict": None if result.verdict is None else result.verdict.as_json(),
        "seconds": seconds,
        "options": {
            "attack": demo.attack,
            **{
                f"attack.{field.name}": getattr(scenario.attack, field.name)
                for field in option_fields(type(scenario.attack))
            },
            "method": demo.method,
            "data": scenario.source.name,
            "clean_images": len(scenario.clean),
            "seed": demo.seed,
            **{f"{demo.method}.{name}": value for name, value in result.options.items() if name != "seed"},
        },
    }
    write_json(demo.output / "metrics.json", content)
    page = report.write(
        demo.output,
        title=f"{demo.method.upper()} against {demo.attack}",
        before=before,
        after=after,
        result=result,
        examples=_examples(scenario, model, result.model),
        landscape=_landscape(scenario, model, result.model),
        facts=_facts(demo, scenario, seconds),
    )
    demo.show.result(content, metrics_table({"backdoored": before, "purified": after}))
    if result.verdict is not None:
        console.print(f"From clean images alone: {result.verdict}.")
    console.print(f"{seconds:.0f} s. Open {page} to see what happened.")


def _examples(scenario: Scenario, before: nn.Module, after: nn.Module) -> report.Examples:
    """One triggered test image of each class, with what both models say."""
    triggered_set = scenario.triggered
    labels = triggered_set.original_labels
    chosen = triggered_set.indices[[int((labels == label).nonzero()[0]) for label in labels.unique().tolist()]]
    clean, true = scenario.test.batch(chosen[:6])
    triggered = scenario.attack(clean)
    device = next(before.parameters()).device

    def predictions(model: nn.Module, images: torch.Tensor) -> list[int]:
        with torch.inference_mode():
            return model.eval()(images.to(device)).argmax(1).tolist()

    return report.Examples(
        clean=clean,
        triggered=triggered,
        labels=true.tolist(),
        clean_before=predictions(before, clean),
        clean_after=predictions(after, clean),
        triggered_before=predictions(before, triggered),
        triggered_after=predictions(after, triggered),
        class_names=scenario.test.class_names or [str(label) for label in range(scenario.spec.num_classes)],
        targets=scenario.attack.relabel(true).tolist(),
    )


def _landscape(scenario: Scenario, before: nn.Module, after: nn.Module) -> Landscape:
    """On few images, as there are eleven points with two sets each."""

    def few(images: ImageTensors) -> ImageTensors:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images.subset(order[:SURVEYED])

    test = few(scenario.test)
    evaluator = Evaluator(test, Triggered(test, scenario.attack), device=next(after.parameters()).device)
    note = f"Measured on {SURVEYED:,} clean images, and the way below on {SURVEYED:,} test images."
    return survey(before, after, evaluator, few(scenario.clean), note=note)


def _facts(demo: Demo, scenario: Scenario, seconds: float) -> dict[str, str]:
    spec, attack = scenario.spec, scenario.attack
    return {
        "Data": scenario.source.message,
        "Attack": f"{demo.attack}, target label {attack.target}, poison rate {attack.poison_rate:.0%}",
        "Network": f"{spec.arch}, width {spec.width}, stem {spec.stem}, trained for {scenario.epochs} epochs",
        "Clean set": f"{len(scenario.clean):,} images ({demo.clean_share:.0%}) that the attacker did not train on",
        "Test set": f"{len(scenario.test):,} images; {len(scenario.triggered):,} of them triggered",
        "Seed": f"{demo.seed} (one run)",
        "Duration": f"{seconds:.0f} s in all",
        "PyTorch": torch.__version__,
    }
