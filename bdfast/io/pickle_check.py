"""A look through the pickle in a file of torch.save, without building anything.

torch's safe loader runs no foreign code, but it calls what is on its own list with whatever arguments a file gives, and
a few bytes can make that fill any memory (`bytearray(10**12)`, an OrderedDict of a tensor that is one value stretched).
So the calls are read first, on a stack of kinds instead of values, and must be those that torch.save writes.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch


class Refused(Exception):
    """The file is not read; the message says why."""


@dataclass(frozen=True)
class Kind:
    """What stands on the stack in place of a value.

    Attributes:
        of: "plain", "list", "dict", "tuple", "name" of a function or class, or "made" by a call.
        name: What is named, or was called.
        parts: Of a tuple.
    """

    of: str
    name: str = ""
    parts: tuple[Kind, ...] = ()


PLAIN = Kind("plain")
REBUILDS = frozenset(
    f"torch._utils._rebuild_{name}"
    for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)
WITH_TYPE = "torch._tensor._rebuild_from_type_v2"
"""Calls its first argument; for tensors with attributes."""
TYPES = frozenset(
    {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"}
)
"""Are named by other calls, and not called themselves."""
NUMPY = frozenset(
    {
        "numpy.ndarray",
        "numpy.dtype",
        # The module was renamed in numpy 2; files name it as it was called where they were written.
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    }
)
"""Are replaced by stand-ins that do nothing."""


def _flat(arguments: Iterable[Kind]) -> bool:
    return all(part.of == "plain" or (part.of == "tuple" and _flat(part.parts)) for part in arguments)


CALLS: dict[str, Callable[[tuple[Kind, ...]], bool]] = {
    "collections.OrderedDict": lambda arguments: not arguments,
    "collections.Counter": lambda arguments: [part.of for part in arguments] == ["dict"],
    "builtins.set": lambda arguments: [part.of for part in arguments] == ["list"],
    "builtins.complex": _flat,
    "_codecs.encode": _flat,
    "builtins.bytes": lambda arguments: not arguments,
    "torch.Size": _flat,
    "torch.device": _flat,
    **dict.fromkeys(REBUILDS | NUMPY, lambda arguments: True),
    WITH_TYPE: lambda arguments: bool(arguments) and arguments[0].of == "name" and arguments[0].name in REBUILDS,
}
"""What may be called, and with what."""
CONSTANTS = ("NONE", "NEWFALSE", "NEWTRUE")
NUMBERS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1")
VALUES = frozenset([*CONSTANTS, *NUMBERS, "BINUNICODE", "SHORT_BINSTRING"])
EMPTY = {"EMPTY_LIST": Kind("list"), "EMPTY_DICT": Kind("dict"), "EMPTY_TUPLE": Kind("tuple")}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check_pickle(stream: BinaryIO | bytes) -> None:
    """Read one pickle to its end.

    Raises:
        Refused: It holds more than a checkpoint is made of; the message names it.
        Exception: It is no pickle, or a damaged one.
    """
    operations = list(pickletools.genops(stream))
    strange = dict.fromkeys(name for name in _names(operations) if not _is_known(name))
    if strange:
        some = ", ".join(repr(name[:80]) for name in list(strange)[:3])
        raise Refused(f"it holds {some}, which reading would have to call")
    if operations[0][0].name == "PROTO" and operations[0][1] != 2:
        raise Refused(f"it is a pickle of protocol {operations[0][1]}, torch.save's own is 2")
    _check_calls(operations)


def _names(operations: Iterable[Any]) -> Iterator[str]:
    for operation, argument, _ in operations:
        if operation.name in ("GLOBAL", "INST"):
            yield _full_name(argument)


def _full_name(argument: Any) -> str:
    # Python 2 called it so, and so does protocol 2.
    return re.sub(r"^__builtin__\.", "builtins.", str(argument).replace(" ", ".", 1))


def _is_known(name: str) -> bool:
    if name in CALLS or name in TYPES or re.fullmatch(r"torch(\.cuda)?\.[A-Z]\w*Storage", name):
        return True
    module, _, last = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)


def _check_calls(operations: Iterable[Any]) -> None:
    stack: list[Kind] = []
    marks: list[int] = []
    memo: dict[int, Kind] = {}
    for operation, argument, _ in operations:
        name = operation.name
        if name in VALUES:
            stack.append(PLAIN)
        elif name in EMPTY:
            stack.append(EMPTY[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            stack.append(Kind("name", _full_name(argument)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in TUPLES:
            parts = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(Kind("tuple", parts=tuple(reversed(parts))))
        elif name == "TUPLE":
            start = marks.pop()
            stack[start:] = [Kind("tuple", parts=tuple(stack[start:]))]
        elif name in ("APPENDS", "SETITEMS"):
            del stack[marks.pop() :]
        elif name in ("APPEND", "SETITEM"):
            del stack[-1 if name == "APPEND" else -2 :]
        elif name == "BINPERSID":
            stack[-1] = Kind("made", "a storage")
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if function.of != "name" or arguments.of != "tuple" or not _may_call(function.name, arguments.parts):
                raise Refused(f"it calls {function.name or function.of!r} as torch.save never does")
            stack.append(Kind("made", function.name))
        elif name == "BUILD":
            state, made = stack.pop(), stack[-1]
            if made.name not in NUMPY and (made.name != "collections.OrderedDict" or state.of != "dict"):
                raise Refused(f"it changes a {made.name or made.of} as torch.save never does")
        elif name not in ("PROTO", "STOP"):
            raise Refused(f"its pickle has the instruction {name}, which torch.save does not write")


def _may_call(name: str, arguments: tuple[Kind, ...]) -> bool:
    return name in CALLS and CALLS[name](arguments)
