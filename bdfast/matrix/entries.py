"""The entries of a grid: networks, attacks and defenses with their options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torchvision

from bdfast import attacks, defenses
from bdfast.attacks import Attack
from bdfast.defenses import Defense
from bdfast.errors import nearest
from bdfast.matrix.options import defaults, number, option_names, typed_options
from bdfast.matrix.places import Place
from bdfast.models import ARCHITECTURES, ModelSpec
from bdfast.training.descriptions import plain

NONE = "none"
ALL_TO_ALL = "all-to-all"
FROM_DATA = {"num_classes", "in_channels", "class_names", "image_size"}
"""Arguments of a `ModelSpec` that the data decides."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What all entries share.

    Attributes:
        name: What it is called in tables and in `exclude`.
        kind: The architecture, or the name of the method.
        options: Every option, defaults included.
        place: Where it stands in the file, for messages.
    """

    name: str
    kind: str
    options: dict[str, Any]
    place: str = field(default="", kw_only=True)

    def content(self) -> dict[str, Any]:
        """What makes two entries the same: all but name and place, as JSON holds it."""
        return json.loads(json.dumps(plain({"kind": self.kind, "options": self.options})))

    def described(self) -> dict[str, Any]:
        """For a record."""
        return {"name": self.name, **self.content()}


@dataclass(frozen=True, eq=False)
class NetworkEntry(Entry):
    """A network and how the attacker trains it.

    Attributes:
        epochs: Of the training; that of the data when None.
        lr: Peak of the learning rate.
    """

    epochs: int | None = None
    lr: float = 0.1

    def content(self) -> dict[str, Any]:
        """See `Entry.content`."""
        return {**super().content(), "epochs": self.epochs, "lr": self.lr}


@dataclass(frozen=True, eq=False)
class AttackEntry(Entry):
    """An attack; kind "none" is a network that never saw a trigger.

    Attributes:
        trigger: What the network is judged with, for kind "none".
    """

    trigger: AttackEntry | None = None

    def content(self) -> dict[str, Any]:
        """See `Entry.content`."""
        return {**super().content(), "trigger": self.trigger and self.trigger.content()}

    def attack(self, num_classes: int) -> Attack | None:
        """What the attacker does; None for kind "none".

        Raises:
            ValueError: An option has a value that the attack refuses.
        """
        if self.kind == NONE:
            return None
        options = dict(self.options)
        if options.get("targets") == ALL_TO_ALL:
            options["targets"] = (*range(1, num_classes), 0)
        return attacks.METHODS[self.kind](**options)

    def judge(self, num_classes: int) -> Attack | None:
        """Whose trigger the test set gets; None for none."""
        return (self.trigger or self).attack(num_classes)


@dataclass(frozen=True, eq=False)
class DefenseEntry(Entry):
    """A defense; kind "none" leaves the network as it is.

    Attributes:
        settings: Arguments of `purify` beside the options of the method.
    """

    settings: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """See `Entry.content`."""
        return {**super().content(), "settings": self.settings}

    def defense(self) -> Defense | None:
        """The method with its options; None for kind "none"."""
        return None if self.kind == NONE else defenses.METHODS[self.kind](**self.options)


def network_entry(value: Any, place: Place) -> NetworkEntry:
    """From `preact_resnet18` or `{arch: preact_resnet18, width: 16, epochs: 6, lr: 0.02, name: small}`.

    Raises:
        GridError: There is no such network or argument, or a value has the wrong type.
    """
    given = {"arch": value} if isinstance(value, str) else value
    allowed = [name for name in option_names(ModelSpec) if name not in FROM_DATA]
    given = dict(place.mapping(given, ["name", *allowed, "epochs", "lr"]))
    name, epochs, lr = given.pop("name", None), given.pop("epochs", None), given.pop("lr", NetworkEntry.lr)
    arch = given.pop("arch", ModelSpec.arch)
    known = [*ARCHITECTURES, *torchvision.models.list_models(module=torchvision.models)]
    # The constructor knows further names, such as those of timm.
    if not isinstance(arch, str) or (arch not in known and "/" not in arch):
        raise place["arch"].error(
            f"expected one of {', '.join(ARCHITECTURES)}, or a classifier of torchvision, got {arch!r}; "
            f"{nearest(str(arch), known)}"
        )
    # One number is for every channel.
    given |= {key: [given[key]] for key in ("mean", "std") if number(given.get(key)) is not None}
    options = typed_options(ModelSpec, given, place)
    if ("mean" in options) != ("std" in options) or not all(value > 0 for value in options.get("std", ())):
        raise place.error(
            f"expected mean and std together, std above zero, got {options.get('mean')} and {options.get('std')}; "
            "leave both out for those of the training images."
        )
    rate = number(lr)
    if rate is None or not 0 < rate < float("inf"):
        raise place["lr"].error(f"expected a number above zero, got {lr!r}; 0.1 is the default.")
    training = {} if epochs is None else {"epochs": epochs}
    if rate != NetworkEntry.lr:
        training["lr"] = rate
    return NetworkEntry(
        _name(name, place, arch, options | training),
        arch,
        {**defaults(ModelSpec, allowed), **options, "arch": arch},
        epochs=epoch_count(epochs, place["epochs"]),
        lr=rate,
        place=str(place),
    )


def epoch_count(value: Any, place: Place) -> int | None:
    """A number of epochs, or None for what the data takes.

    Raises:
        GridError: It is something else.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise place.error(
            f"expected a whole number of epochs, 1 or more, got {value!r}; leave it out for that of data."
        )
    return value


def attack_entry(value: Any, place: Place) -> AttackEntry:
    """From `badnets`, `{attack: badnets, target: 3, name: three}`, `none` or `{attack: none, trigger: badnets}`.

    Raises:
        GridError: There is no such attack or option, or a value is wrong.
    """
    kind, name, given = _method(value, place, "attack", attacks.METHODS)
    if kind == NONE:
        place.mapping(given, ["trigger"])
        trigger = None if "trigger" not in given else attack_entry(given["trigger"], place["trigger"])
        if trigger is not None and trigger.kind == NONE:
            raise place["trigger"].error("expected an attack, got none; leave it out to measure ACC only.")
        label = f"{NONE}, judged by {trigger.name}" if trigger else NONE
        return AttackEntry(name or label, NONE, {}, trigger=trigger, place=str(place))
    cls = attacks.METHODS[kind]
    allowed = option_names(cls)
    place.mapping(given, allowed)
    all_to_all = "targets" in allowed and given.get("targets") == ALL_TO_ALL
    typed = typed_options(
        cls, {key: part for key, part in given.items() if not (all_to_all and key == "targets")}, place
    )
    complete = _complete(cls, typed, place)
    if all_to_all:
        typed["targets"] = complete["targets"] = ALL_TO_ALL
    return AttackEntry(_name(name, place, kind, typed), kind, complete, place=str(place))


def defense_entry(value: Any, place: Place) -> DefenseEntry:
    """From `tsbd`, `{defense: tsbd, n: 0.2, batch_size: 64, name: strong}` or `none`.

    Raises:
        GridError: There is no such defense or option, or a value is wrong.
    """
    kind, name, given = _method(value, place, "defense", defenses.METHODS)
    if kind == NONE:
        place.mapping(given, [])
        return DefenseEntry(name or NONE, NONE, {}, place=str(place))
    cls = defenses.METHODS[kind]
    allowed = option_names(cls)
    settings: dict[str, Any] = {}
    for key, hint, sound in (("batch_size", int, lambda size: size >= 1), ("amp", bool, lambda _: True)):
        if key in given and key not in allowed:
            if type(given[key]) is not hint or not sound(given[key]):
                expected = "a whole number, 1 or more" if hint is int else "true or false"
                raise place[key].error(f"expected {expected}, got {given[key]!r}; see bdfast.purify.")
            settings[key] = given.pop(key)
    place.mapping(given, [*allowed, "batch_size", "amp"])
    typed = typed_options(cls, given, place)
    label = _name(name, place, kind, typed | settings)
    return DefenseEntry(label, kind, _complete(cls, typed, place), settings=settings, place=str(place))


def _method(value: Any, place: Place, verb: str, methods: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """Its kind, the name that the user gave it, and its options."""
    given = {verb: value} if isinstance(value, str) else value
    if not isinstance(given, dict) or verb not in given:
        raise place.error(f"expected the name of a method or {{{verb}: NAME, ...}}, got {value!r}; write its name.")
    given = dict(given)
    kind, name = given.pop(verb), given.pop("name", None)
    if kind != NONE and kind not in methods:
        known = [*methods, NONE]
        raise place[verb].error(f"expected one of {', '.join(known)}, got {kind!r}; {nearest(str(kind), known)}")
    if name is not None:
        _name(name, place, kind, {})
    return kind, name, given


def _complete(cls: type, typed: dict[str, Any], place: Place) -> dict[str, Any]:
    """All options with the values that the class gives them, once it has accepted those of the user."""
    try:
        built = cls(**typed)
    except (ValueError, TypeError) as error:
        raise place.error(str(error)) from error
    values = asdict(built)
    return {name: values[name] for name in option_names(cls)}


def _name(given: Any, place: Place, kind: str, options: dict[str, Any]) -> str:
    """The name that the user gave, or one of the kind and the options that were given."""
    if given is None:
        return " ".join([kind, *(f"{key}={_short(value)}" for key, value in options.items())])
    if not isinstance(given, str) or not given.strip():
        raise place["name"].error(f"expected a text, got {given!r}; choose a short name.")
    return given


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
