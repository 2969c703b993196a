"""Which tensor of a file belongs to which name of a network.

Names may differ by what wraps the network in the file or in memory: prefixes that all names share (`backbone.`), or
common ones beside which other things stand (`model.`, `ema.`), and the parts that DataParallel and torch.compile put in
anywhere. Everything else must agree: a larger network that happens to hold all names of a smaller one does not fit it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bdfast.io.state_dicts import (
    COUNTERS,
    DEEPEST,
    WRAPPERS,
    StateDict,
    is_averaged,
    last,
    no_weight,
    unpruned,
    without,
)
from bdfast.models.normalization import Normalize

HOLDERS = WRAPPERS | {"model", "net", "netc", "network"}
"""Parts of names under which a network stands beside other things, in Lightning and in training scripts."""
NORMALIZATION = frozenset({"mean", "std"})
MOST_PREFIXES = 32
ROLES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})


@dataclass(frozen=True, eq=False)
class Target:
    """The names of a network.

    Attributes:
        tensors: Its state dict, without extra state.
        given: Names of the input normalisation, which the caller chose; a file need not have them.
        tied: From a name to the others of the same tensor.
    """

    tensors: dict[str, Tensor]
    given: frozenset[str]
    tied: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        """The names of `model`.

        Raises:
            ValueError: A tensor of it has no memory to load into.
        """
        tensors = {name: x for name, x in model.state_dict().items() if no_weight(name, x) is None}
        for name, tensor in tensors.items():
            if is_lazy(tensor) or tensor.is_meta:
                kind = "is not initialised" if is_lazy(tensor) else "is on the meta device"
                raise ValueError(
                    f"model: expected tensors with data to load into, got {name!r}, which {kind}; run one batch "
                    "through lazy modules, or call model.to_empty(device='cpu'), first."
                )
        given = {
            f"{module_name}.{name}" if module_name else name
            for module_name, module in model.named_modules()
            if isinstance(module, Normalize)
            for name in module.state_dict()
        }
        shared: dict[int, list[str]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(tensor), []).append(name)
        for name, tensor in model.named_buffers(remove_duplicate=False):
            shared.setdefault(id(tensor), []).append(name)
        tied = {name: group for group in shared.values() if len(group) > 1 for name in group}
        return cls(tensors, frozenset(given), tied)


@dataclass(frozen=True, eq=False)
class Match:
    """A state dict of a file beside the names of a network.

    Attributes:
        state: The state dict.
        prefix: What stands in front of its names.
        tensors: Name in the network to tensor of the file.
        missing: Names of the network that the file lacks.
        unknown: Names of the file that the network lacks.
        wrong: Names of the network whose tensor in the file has another shape.
        aside: Names of the file that stand beside the network and are left out.
    """

    state: StateDict
    prefix: str
    tensors: dict[str, Tensor]
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)

    @property
    def misfits(self) -> int:
        """How many names do not agree."""
        return len(self.missing) + len(self.unknown) + len(self.wrong)

    @property
    def agreeing(self) -> int:
        """How many tensors the network could take."""
        return len(self.tensors) - len(self.wrong)

    @property
    def distance(self) -> int:
        """How far it is from a match that leaves nothing out."""
        return self.misfits + len(self.aside)

    @property
    def where(self) -> str:
        """Where the weights stand in the file, for messages."""
        return self.state.where + (f", behind {self.prefix[:80]!r}" if self.prefix else "")


def matches(target: Target, state: StateDict) -> list[Match]:
    """All ways in which the state dict fits the network, preferred first; the nearest miss where none does."""
    nearest: Match | None = None
    folded = unpruned(state.tensors)
    for tensors in (state.tensors,) if folded is state.tensors else (state.tensors, folded):
        # As the names stand, before anything is taken out of them: a network may have a part called "module". Those in
        # front stay even then: they tell the network from what stands beside it.
        for parts in (frozenset[str](), WRAPPERS):
            theirs = without(parts, tensors, in_front=False)
            ours = without(parts, target.tensors, in_front=False)
            if theirs is None or ours is None:
                continue
            named = {theirs[name]: tensor for name, tensor in tensors.items()}
            wanted = {ours[name]: name for name in target.tensors}
            attempts = [
                _attempt(target, state, wanted, named, prefix, holder)
                for holder in _holders(target, ours)
                for prefix in _prefixes(named)
            ]
            fitting: dict[tuple[int, ...], Match] = {}
            for attempt in attempts:
                if not attempt.misfits:
                    fitting.setdefault(tuple(map(id, attempt.tensors.values())), attempt)
            if fitting:
                return list(fitting.values())
            nearest = min([*attempts, *([] if nearest is None else [nearest])], key=lambda match: match.distance)
    return [] if nearest is None else [nearest]


def matched_by_shape(target: Target, state: StateDict, *, ordered: bool) -> Match | None:
    """Names that agree, then the rest by shape: in the order of both, or where each shape occurs once.

    None where that leaves a choice, or a tensor of another shape.
    """
    tensors = unpruned(state.tensors)
    agreed = {x: tensors[x] for x in target.tensors if x in tensors and tensors[x].shape == target.tensors[x].shape}
    ours = [name for name in target.tensors if name not in agreed and name not in target.given]
    theirs = [name for name in tensors if name not in agreed]
    for left_alone in (frozenset[str](), COUNTERS):  # they change no output
        pairs = _paired(
            {name: target.tensors[name] for name in ours if last(name) not in left_alone},
            {name: tensors[name] for name in theirs if last(name) not in left_alone},
            ordered=ordered,
        )
        if pairs is not None:
            return Match(state, "", {**agreed, **{name: tensors[other] for name, other in pairs.items()}})
    return None


def _attempt(
    target: Target, state: StateDict, wanted: Mapping[str, str], named: Mapping[str, Tensor], prefix: str, holder: str
) -> Match:
    """The match of names behind `prefix` in the file with those behind `holder` in the network."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    behind = {name.removeprefix(holder): own for name, own in wanted.items() if name.startswith(holder)}
    first_parts = {name.partition(".")[0] for name in behind}
    around = "".join(f"{part}." for part in prefix.split(".")[:-2])
    match = Match(state, prefix, {own: inside[name] for name, own in behind.items() if name in inside})
    for name in named:
        within = name.startswith(prefix)
        short = name.removeprefix(prefix) if within else name
        first = short.partition(".")[0]
        if last(name) in COUNTERS or (within and short in behind):
            continue
        # Beside a network that stands behind a prefix; or behind a prefix itself, beside one that does not.
        apart = not within or (first not in first_parts and (first.lower() in HOLDERS or is_averaged(first)))
        # The network in the file normalises its input by what stands next to it; without that it is another network.
        normalizes = not within and last(name) in NORMALIZATION and name.removeprefix(around).count(".") < 2
        (match.aside if apart and not normalizes else match.unknown).append(name)
    for own in target.tensors:
        if own not in match.tensors:
            for other in target.tied.get(own, ()):  # some formats keep one name of a tied tensor
                if other in match.tensors:
                    match.tensors[own] = match.tensors[other]
    for own, tensor in target.tensors.items():
        if own not in match.tensors:
            if not _may_be_missing(own, target, match.tensors):
                match.missing.append(own)
        elif match.tensors[own].shape != tensor.shape:
            match.wrong.append(own)
    return match


def _may_be_missing(name: str, target: Target, present: Mapping[str, Tensor]) -> bool:
    if last(name) == "num_batches_tracked":  # files older than torch 0.4.1 lack it, not its layer
        return name.removesuffix("num_batches_tracked") + "running_mean" in present
    return name in target.given or last(name) in COUNTERS


def _holders(target: Target, ours: Mapping[str, str]) -> list[str]:
    """What stands in front of all names of the network that a file must have."""
    return ["", *_shared([short for name, short in ours.items() if name not in target.given])]


def _prefixes(named: Iterable[str]) -> list[str]:
    """What may stand in front of the names of the network in the file, preferred first."""
    prefixes = dict.fromkeys(["", *_shared(named)])
    for name in named:
        prefix = ""
        for part in name.split(".")[:-1][:DEEPEST]:
            if part.lower() not in HOLDERS and not is_averaged(part):
                break
            prefix += f"{part}."
            prefixes[prefix] = None
    return sorted(prefixes, key=lambda prefix: (is_averaged(prefix), prefix.count(".")))[:MOST_PREFIXES]


def _shared(names: Iterable[str]) -> list[str]:
    """The leading parts that all names have in common, from the shortest on; counters aside."""
    modules = [name.split(".")[:-1][:DEEPEST] for name in names if last(name) not in COUNTERS]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    return [f"{prefix}." for prefix in accumulate((parts[0] for parts in shared), "{}.{}".format)]


def _paired(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, ordered: bool) -> dict[str, str] | None:
    """Each name with one of the other side; None if that is not certain."""
    if len(ours) != len(theirs):
        return None
    if ordered and all(
        a.shape == b.shape and (last(x) == last(y) or not {last(x), last(y)} <= ROLES)
        for (x, a), (y, b) in zip(ours.items(), theirs.items(), strict=True)
    ):
        return dict(zip(ours, theirs, strict=True))
    for with_role in (True, False):
        by_kind = [
            {(tensor.shape, last(name) if with_role else ""): name for name, tensor in side.items()}
            for side in (ours, theirs)
        ]
        if by_kind[0].keys() == by_kind[1].keys() and len(by_kind[0]) == len(by_kind[1]) == len(ours):
            return {name: by_kind[1][kind] for kind, name in by_kind[0].items()}
    return None
