"""State dicts as checkpoints hold them: under some key, with names that a wrapper changed, among other things.

`found` lists every dict of named tensors in a file, `plain` takes one without knowing the network, and
`name_matching.py` with its names in view. Of several, plain weights are preferred to averaged ones (EMA, SWA), outer
ones to inner ones, then the earlier key in `KEYS`, then the earlier in the file.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from math import prod
from typing import cast

import torch
from torch import Tensor

KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "netc",
    "network",
    "net_state_dict",
    "network_state_dict",
    "state",
    "weights",
    "model_weights",
    "params",
    "parameters",
    "module",
    "classifier",
    "backbone",
    "best_state_dict",
    "best_model",
    "checkpoint",
)
"""Keys under which weights stand, whatever their case."""
AVERAGED = frozenset({"ema", "swa", "averaged"})
"""Words in the keys and names of averaged weights."""
RESERVED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch puts in anywhere: torch.compile, FSDP, activation checkpointing."""
WRAPPERS = RESERVED | {"module", "_module", "_forward_module"}
"""And those of DataParallel and AveragedModel, Opacus and Fabric, which may also be a network's own."""
_IN_FRONT = {f"{part}." for part in WRAPPERS}
COUNTERS = frozenset({"total_ops", "total_params", "n_averaged", "num_batches_tracked"})
"""Last parts of names of thop, AveragedModel and BatchNorm that only count."""
EXTRA_STATE = "_extra_state"
DEEPEST = 6
"""Levels of nesting that are looked through, and parts of a prefix."""
MOST = 64
"""State dicts of a file that are compared with a network; of more, those with the most tensors."""


@dataclass(frozen=True, eq=False)
class StateDict:
    """A dict of named tensors in a file.

    Attributes:
        keys: Under which it stands, from the outside in; none for what the file itself is.
        tensors: Its tensors, in its order.
        others: What else is in it, name to kind; it is left out.
        unusable: Tensors that cannot be loaded, name to reason.
    """

    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    others: dict[str, str]
    unusable: dict[str, str]

    @property
    def where(self) -> str:
        """Where it stands, for messages."""
        return "under " + " > ".join(repr(key[:80]) for key in self.keys) if self.keys else "at the top"


def last(name: str) -> str:
    """The last part of a name: what it is within its module."""
    return name.rpartition(".")[2]


def is_averaged(key: str) -> bool:
    """Whether a key or a part of a name says that the weights are averaged ones."""
    return not AVERAGED.isdisjoint(re.split(r"[^a-z]+", key.lower()))


def no_weight(name: str, value: object) -> str | None:
    """What an entry of a state dict is that is neither written nor read; None for a tensor."""
    if last(name) == EXTRA_STATE:
        # Its module decides what to do with it; that of Transformer Engine unpickles it.
        return "extra state"
    return None if isinstance(value, Tensor) else type(value).__name__


def same(first: Tensor, second: Tensor) -> bool:
    """Whether both hold the same bits."""
    if first is second:
        return True
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    one, other = (x.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (first, second))
    return torch.equal(one, other)


def listing(reasons: Mapping[str, str]) -> str:
    """The first names with their reasons, for messages."""
    some = [f"{name[:80]!r} ({reason})" for name, reason in islice(reasons.items(), 5)]
    return ", ".join(some) + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")


def without(parts: frozenset[str], names: Iterable[str], *, in_front: bool = True) -> dict[str, str] | None:
    """From each name to itself without these parts, those in front of any other on request; None if two become one."""
    short = {}
    for name in names:
        *modules, leaf = name.split(".")
        front = [] if in_front else list(takewhile(parts.__contains__, modules))
        inner = [part for part in modules[len(front) :] if part not in parts]
        short[name] = ".".join([*front, *inner, leaf])
    return short if len(set(short.values())) == len(short) else None


def unpruned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the pairs of torch.nn.utils.prune (`weight_orig`, `weight_mask`) multiplied; the dict itself without any."""
    pairs = {}
    for name, mask in tensors.items():
        base = name.removesuffix("_mask")
        original = tensors.get(f"{base}_orig")
        if base != name and base not in tensors and original is not None and original.shape == mask.shape:
            with suppress(RuntimeError):  # a dtype that has no product stays as it is, and fits nothing
                pairs[base] = mask.to(original.dtype) * original
    if not pairs:
        return tensors
    result = {}
    for name, value in tensors.items():
        base = name.removesuffix("_mask").removesuffix("_orig")
        if base not in pairs:
            result[name] = value
        elif name.endswith("_orig"):
            result[base] = pairs[base]
    return result


def found(content: object, size: int) -> list[StateDict]:
    """Every dict with named tensors in what a file of `size` bytes holds, preferred ones first."""
    listed = [_state_dict(keys, entries, size) for keys, entries in _dicts(content)]
    listed = [state for state in listed if state.tensors or state.unusable]
    if len(listed) > MOST:
        listed = sorted(listed, key=lambda state: -len(state.tensors))[:MOST]
    return sorted(listed, key=_preference)


def plain(states: list[StateDict]) -> tuple[StateDict, dict[str, Tensor], list[StateDict]]:
    """One of what `found` listed, its tensors under the names of the network as far as can be told, and its rivals.

    It is that under a key of `KEYS`, or of averaged weights; where there is no such key, that with the most tensors.
    """
    known = [state for state in states if state.keys and _is_known(state.keys[-1])]
    chosen = known[0] if known else max(states, key=lambda state: len(state.tensors))

    def is_rival(state: StateDict) -> bool:
        more = len(state.tensors) - len(chosen.tensors)
        return state is not chosen and (more > 0 or (more == 0 and (not known or state in known)))

    counted = COUNTERS - {"num_batches_tracked"}
    tensors = {name: value for name, value in chosen.tensors.items() if last(name) not in counted}
    short = without(RESERVED, tensors)
    if short is not None:
        tensors = {short[name]: value for name, value in tensors.items()}
    while len(first := {"".join(name.partition(".")[:2]) for name in tensors}) == 1 and first <= _IN_FRONT:
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    return chosen, unpruned(tensors), [state for state in states if is_rival(state)]


def _dicts(content: object) -> Iterator[tuple[tuple[str, ...], dict[object, object]]]:
    """All dicts in nested dicts, lists and tuples, outer ones first, each once: a file may put one into itself."""
    waiting: deque[tuple[tuple[str, ...], object]] = deque([((), content)])
    seen = set()
    while waiting:
        keys, value = waiting.popleft()
        if id(value) in seen or len(keys) > DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield keys, value
            # Not value.items(): a file can give an OrderedDict attributes, and with them another `items`.
            inner = [(str(key), item) for key, item in dict.items(value) if isinstance(key, str | int)]
        elif isinstance(value, list | tuple):
            inner = [(str(position), item) for position, item in enumerate(value)]
        else:
            continue
        waiting.extend(((*keys, key), item) for key, item in inner if isinstance(item, dict | list | tuple))


def _state_dict(keys: tuple[str, ...], entries: dict[object, object], size: int) -> StateDict:
    state = StateDict(keys, {}, {}, {})
    for name, value in dict.items(entries):
        if not isinstance(name, str):
            state.others[f"{type(name).__name__} {str(name)[:20]}" if isinstance(name, int) else "?"] = "no name"
        elif (kind := no_weight(name, value)) is not None:
            state.others[name] = kind
        else:
            # Not value.detach(), as above. What is attached to it, hooks among others, stays behind.
            tensor = Tensor.detach(cast(Tensor, value))
            reason = _unusable(tensor, size)
            if reason is None:
                state.tensors[name] = tensor
            else:
                state.unusable[name] = reason
    return state


def _unusable(tensor: Tensor, size: int) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantised"
    if tensor.is_meta:
        return "without data"
    # One value may be stretched over any shape; a copy of it would have no bound.
    needed = prod(tensor.shape) * tensor.element_size()
    return f"of {needed:,} bytes in a file of {size:,}" if needed > size else None


def _is_known(key: str) -> bool:
    return key.lower() in KEYS or is_averaged(key)


def _preference(state: StateDict) -> tuple[bool, int, list[int]]:
    ranks = [KEYS.index(key.lower()) if key.lower() in KEYS else len(KEYS) for key in state.keys]
    return any(map(is_averaged, state.keys)), len(state.keys), ranks
