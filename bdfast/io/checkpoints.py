"""Weights on disk: safetensors out; safetensors and files of torch.save in. Nothing in a file is ever executed.

How a file is read, `reading.py` says; which weights in it are taken and under which names, `state_dicts.py` and
`name_matching.py`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bdfast.files import whole_file
from bdfast.io.name_matching import NORMALIZATION, Match, Target, matched_by_shape, matches
from bdfast.io.reading import file_content, no_checkpoint
from bdfast.io.state_dicts import RESERVED, StateDict, found, last, listing, no_weight, plain, same, without

DESCRIPTION = "bdfast.model"
"""Key in the metadata of a safetensors file under which the description of the network stands."""


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, description: str | None = None) -> None:
    """Write the state dict as safetensors; the file appears whole or not at all.

    The names are those of the network itself, without what DataParallel or torch.compile put in front of them. Tied
    parameters are stored under each of their names. Extra state of modules is left out, with a warning. `description`
    (`ModelSpec.to_json()`) travels with the weights, so that `bdfast evaluate FILE` can build the network again.
    """
    entries = _unwrapped(model).state_dict()
    left_out = {name: kind for name, value in entries.items() if (kind := no_weight(name, value)) is not None}
    tensors = {name: value for name, value in entries.items() if name not in left_out}
    names = without(RESERVED, tensors) or {name: name for name in tensors}
    state = {names[name]: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    if left_out:
        warnings.warn(f"model: not written to {path}, as they are no tensors: {listing(left_out)}.", stacklevel=2)
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata={DESCRIPTION: description} if description else None)


def read_description(path: str | os.PathLike[str]) -> str | None:
    """The description that `save_weights` stored with the weights; None where there is none."""
    if not Path(path).is_file():  # what is not, a pipe for one, may never end
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(DESCRIPTION)
    except (SafetensorError, OSError):
        return None


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a file of torch.save with its safe loader.

    Weights under a common key ("state_dict", "model", "net", ...) are found, and "module." and "_orig_mod." taken out
    of the names where DataParallel and torch.compile put them. `load_into` knows the names of the network, and so can
    do more.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or not one that can be read without executing what is in it.

    Warns:
        UserWarning: Something in the state dict is no tensor and was left out, or others might have been meant.
    """
    source = Path(path)
    content = file_content(source)
    states = found(content.value, content.size)
    if not states:
        raise no_checkpoint(source, f"it holds a {type(content.value).__name__} without named tensors")
    chosen, tensors, rivals = plain(states)
    _check_usable(source, chosen)
    if chosen.others:
        warnings.warn(f"path: left out of {source}, as they are no tensors: {listing(chosen.others)}.", stacklevel=2)
    if rivals:
        warnings.warn(
            f"path: several weights are in {source}; took those {chosen.where}, not those "
            f"{', '.join(state.where for state in rivals[:3])}; save the others alone to load them.",
            stacklevel=2,
        )
    return tensors


def load_into(model: nn.Module, path: str | os.PathLike[str], *, by_shape: bool = False) -> nn.Module:
    """Load the weights at `path` into `model`, all of them or none.

    They may stand under any key, and behind prefixes of wrappers or holders ("module.", "_orig_mod.", "model.",
    "backbone.", ...) in the file, in the model or in both. Pruning masks of torch are multiplied in. Counters
    (BatchNorm's batches, thop's) and the input normalisation of `normalized` may be missing, and keep their values.

    Args:
        model: The network.
        path: A file of `save_weights`, of safetensors or of torch.save.
        by_shape: Match names that differ by the order and the shapes of the tensors. That they mean the same is then
            only likely: look at the accuracy.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint; or names or shapes differ, and the message counts them and shows the first.

    Warns:
        UserWarning: Something beside the weights was left out, or several weights fit and one had to be taken.
    """
    source = Path(path)
    target = Target.of(model)
    content = file_content(source)
    states = found(content.value, content.size)
    if not states:
        raise no_checkpoint(source, f"it holds a {type(content.value).__name__} without named tensors")
    tried = [match for state in states for match in matches(target, state)]
    fitting = [match for match in tried if not match.misfits]
    if not fitting:
        alike = (matched_by_shape(target, state, ordered=content.ordered) for state in states)
        pairings = [match for match in alike if match is not None]
        if not by_shape or not pairings:
            raise _differs(source, min(tried, key=lambda match: match.distance), can_pair=bool(pairings))
        fitting = pairings
    match, *others = fitting
    _check_usable(source, match.state)
    _check_values(source, target, match.tensors)
    # Before anything changes, as a warning may be made an error.
    near = [x for x in tried[: tried.index(match)] if 2 * x.agreeing > len(target.tensors)] if match in tried else []
    if remarks := _remarks(source, match, others, near):
        warnings.warn(f"path: {'; '.join(remarks)}.", stacklevel=2)
    _load(model, source, target, match.tensors)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def _differs(path: Path, match: Match, *, can_pair: bool) -> ValueError:
    advice = "choose the architecture, width, stem and number of classes that the file was made with"
    if match.unknown and not match.missing and all(last(name) in NORMALIZATION for name in match.unknown):
        advice = "the network in the file normalises its input: build this one with the same mean and std"
    elif can_pair:
        advice += "; the shapes agree in order, so that load_into(..., by_shape=True) can match them"
    unusable = f"; of the file, not usable: {listing(match.state.unusable)}" if match.state.unusable else ""
    return ValueError(
        f"path: expected the weights of this architecture in {path}, got {len(match.missing)} names missing, "
        f"{len(match.unknown)} unknown and {len(match.wrong)} of another shape (the first is "
        f"{min([*match.wrong, *match.missing, *match.unknown])[:80]!r}) {match.where}{unusable}; {advice}."
    )


def _check_usable(path: Path, state: StateDict) -> None:
    if state.unusable:
        raise no_checkpoint(path, f"it has tensors that cannot be loaded: {listing(state.unusable)}")


def _check_values(path: Path, target: Target, tensors: dict[str, Tensor]) -> None:
    """Refuse what would be loaded, but not as it stands in the file."""
    for name, value in tensors.items():
        own = target.tensors[name]
        rounds = value.is_floating_point() and (own.is_floating_point() or own.is_complex())
        if not rounds and (
            value.is_complex() > own.is_complex() or not same(value.to(own.dtype).to(value.dtype), value)
        ):
            raise ValueError(
                f"path: expected values of {own.dtype} for {name!r} in {path}, got {value.dtype} that it cannot hold; "
                "choose the network that the file was made with."
            )
        for other in target.tied.get(name, ()):
            if other in tensors and not same(value, tensors[other]):
                raise ValueError(
                    f"path: expected one value for {name!r} and {other!r} in {path}, as the model ties them, got two; "
                    "build the model without tying them."
                )


def _remarks(path: Path, match: Match, others: list[Match], near: list[Match]) -> list[str]:
    """What the user should know although the weights fit: `near` would have been preferred, and almost fits."""
    remarks = []
    left_out = {**match.state.others, **dict.fromkeys(match.aside, "beside the network")}
    if left_out:
        remarks.append(f"left out of {path}: {listing(left_out)}")
    different = [
        other.where
        for other in others
        if not all(same(tensor, other.tensors[name]) for name, tensor in match.tensors.items() if name in other.tensors)
    ]
    if different:
        remarks.append(
            f"several weights in {path} fit and differ; took those {match.where}, not those "
            f"{', '.join(different[:3])}; save the others alone to load them"
        )
    if near:
        some = ", ".join(f"{other.where} ({other.misfits} names do not agree)" for other in near[:3])
        remarks.append(f"took the weights {match.where} of {path}, as these do not fit: {some}")
    return remarks


def _load(model: nn.Module, path: Path, target: Target, tensors: dict[str, Tensor]) -> None:
    """Put the tensors into the model; after an error of a module's own loading code it is as it was."""
    before = [(x, x.detach().clone()) for x in [*model.parameters(), *model.buffers()]]
    try:
        result = model.load_state_dict({**target.tensors, **tensors}, strict=False)
        stray = [
            name for name in [*result.missing_keys, *result.unexpected_keys] if no_weight(name, before) != "extra state"
        ]
        if stray:
            raise RuntimeError(f"it did not take {stray[0]!r}")
    except Exception as error:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise ValueError(
            f"path: expected weights in {path} that the model can load, got an error from it ({error}); load them by "
            "hand, or change the modules that refuse them."
        ) from error
