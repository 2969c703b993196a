"""`bdfast demo`: plant a backdoor, remove it with clean data only, and show what happened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import tyro
from torch import nn

from bdfast import report
from bdfast.attacks import METHODS as ATTACKS
from bdfast.attacks import Attack
from bdfast.attacks.training import train
from bdfast.cli.terminal import Output, metrics_table
from bdfast.data.images import ImageTensors
from bdfast.data.poison import Triggered, poisoned
from bdfast.data.sources import DataSource, demo_data
from bdfast.defenses import METHODS as DEFENSES
from bdfast.defenses.result import write_json
from bdfast.evaluation import Evaluator
from bdfast.io.checkpoints import save_weights
from bdfast.landscape import Landscape, survey
from bdfast.models.spec import ModelSpec
from bdfast.purification import purify
from bdfast.training import derived_seed, seeded

Flat = tyro.conf.arg(name="")

SURVEYED = 500
"""Images on which the report's landscape is measured."""


@dataclass(frozen=True)
class Demo:
    """Train a backdoored PreAct-ResNet18 on Fashion-MNIST, clean it, and write a report.

    The defense gets clean images that the attacker did not train on, and nothing else; the test set and its triggered
    copy only serve to measure.

    Attributes:
        attack: What to plant: badnets or blended.
        method: What to remove it with: tsbd, ft_sam, pam, or the baselines ft and sam.
        seed: Of all randomness.
        clean_share: Clean images that the defender has, as a fraction of the training set.
        output: Folder for the report, the metrics and both models.
        show: How to report.
    """

    attack: str = "badnets"
    method: str = "tsbd"
    seed: int = 0
    clean_share: float = 0.05
    output: Path = Path("demo-output")
    show: Annotated[Output, Flat] = field(default_factory=Output)


@dataclass(frozen=True)
class Scene:
    """Everything that the demo starts from."""

    source: DataSource
    attack: Attack
    clean: ImageTensors
    attacker: ImageTensors
    triggered: Triggered
    spec: ModelSpec
    epochs: int


def set_up(attack: str, seed: int, clean_share: float) -> Scene:
    """Fetch the images and give `clean_share` of the training set to the defender, the rest to the attacker."""
    source = demo_data()
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(derived_seed(seed, "clean")))
    count = round(clean_share * len(order))
    pixels = source.train.images.float() / 255
    classes = len(source.train.class_names or ())
    spec = ModelSpec(
        num_classes=classes,
        in_channels=1,
        width=16,
        mean=(round(pixels.mean().item(), 4),),
        std=(round(pixels.std().item(), 4),),
    )
    trigger = ATTACKS[attack]()
    return Scene(
        source=source,
        attack=trigger,
        clean=source.train.subset(order[:count]),
        attacker=source.train.subset(order[count:]),
        triggered=Triggered(source.test, trigger),
        spec=spec,
        epochs=4 if source.name == "Fashion-MNIST" else 30,  # the 1,500 digits are soon read
    )


def plant(scene: Scene, seed: int, show: Output) -> nn.Module:
    """A network that the attacker has trained."""
    with seeded(derived_seed(seed, "weights"), torch.device("cpu")):
        model = scene.spec.build()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Convolutions run faster in this layout, on CPUs and GPUs alike.
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = poisoned(scene.attacker, scene.attack, seed=derived_seed(seed, "poison"))
    train(model, data, epochs=scene.epochs, seed=seed, progress=show.progress())
    return model.eval()


def main(arguments: list[str]) -> None:
    """Run `bdfast demo`."""
    demo = tyro.cli(Demo, prog="bdfast demo", args=arguments)
    for name, value, known in (("attack", demo.attack, ATTACKS), ("method", demo.method, DEFENSES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}; choose one of these.")
    if not 0 < demo.clean_share < 1:
        raise ValueError(f"clean_share: expected a fraction in (0, 1), got {demo.clean_share}; 0.05 is 5 %.")
    demo.output.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    console = demo.show.console

    scene = set_up(demo.attack, demo.seed, demo.clean_share)
    console.print(f"Data: {scene.source.message}. The defender holds {len(scene.clean):,} clean images.")
    model = plant(scene, demo.seed, demo.show)
    save_weights(model, demo.output / "backdoored.safetensors", description=scene.spec.to_json())

    judge = Evaluator(scene.source.test, scene.triggered, device=next(model.parameters()).device)
    before = judge(model)
    console.print(metrics_table({"backdoored": before}))
    result = purify(model, scene.clean, method=demo.method, seed=demo.seed, progress=demo.show.progress())
    after = judge(result.model, baseline=before)
    result.save(demo.output / "purified", description=scene.spec.to_json())

    seconds = perf_counter() - started
    content = {
        "before": {name: asdict(before)[name] for name in ("acc", "asr", "ra")},
        "after": {name: asdict(after)[name] for name in ("acc", "asr", "ra")},
        "der": after.der,
        "found": result.found,
        "seconds": seconds,
        "options": {
            "attack": demo.attack,
            **{f"attack.{name}": value for name, value in asdict(scene.attack).items()},
            "method": demo.method,
            "data": scene.source.name,
            "clean_images": len(scene.clean),
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
        examples=_examples(scene, model, result.model),
        surroundings=_surroundings(scene, model, result.model),
        facts=_facts(demo, scene, seconds),
    )
    demo.show.result(content, metrics_table({"backdoored": before, "purified": after}))
    console.print(f"{seconds:.0f} s. Open {page} to see what happened.")


def _examples(scene: Scene, before: nn.Module, after: nn.Module) -> report.Examples:
    """One test image of each class outside the target, with what both models say."""
    labels = scene.source.test.labels
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique().tolist() if label != scene.attack.target]
    clean, true = scene.source.test.batch(torch.tensor(chosen[:6]))
    triggered = scene.attack(clean)
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
        class_names=scene.source.test.class_names or [str(label) for label in range(scene.spec.num_classes)],
        targets=[scene.attack.target] * len(true),
    )


def _surroundings(scene: Scene, before: nn.Module, after: nn.Module) -> Landscape:
    """On few images, as there are eleven points with two sets each."""

    def few(images: ImageTensors) -> ImageTensors:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images.subset(order[:SURVEYED])

    test = few(scene.source.test)
    judge = Evaluator(test, Triggered(test, scene.attack), device=next(after.parameters()).device)
    note = f"Measured on {SURVEYED:,} clean images, and the way below on {SURVEYED:,} test images."
    return survey(before, after, judge, few(scene.clean), note=note)


def _facts(demo: Demo, scene: Scene, seconds: float) -> dict[str, str]:
    spec, attack = scene.spec, scene.attack
    return {
        "Data": scene.source.message,
        "Attack": f"{demo.attack}, target label {attack.target}, poison rate {attack.poison_rate:.0%}",
        "Network": f"{spec.arch}, width {spec.width}, stem {spec.stem}, trained for {scene.epochs} epochs",
        "Clean set": f"{len(scene.clean):,} images ({demo.clean_share:.0%}) that the attacker did not train on",
        "Test set": f"{len(scene.source.test):,} images; {len(scene.triggered):,} of them triggered",
        "Seed": f"{demo.seed} (one run)",
        "Duration": f"{seconds:.0f} s in all",
        "PyTorch": torch.__version__,
    }
