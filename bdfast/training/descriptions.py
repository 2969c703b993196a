"""What a run was given, as text: for its fingerprint, and for JSON."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as those of Python, at any depth; what JSON cannot hold as its `repr`."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist() if value.ndim else value.item()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(plain(part) for part in value) if not hasattr(value, "_fields") else tuple(map(plain, value))
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def number(value: Any) -> Any:
    """A number of numpy or torch as that of Python; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def described(value: Any, name: str) -> str:
    """A function, or an object that is called like one, by what it does and not by its address.

    Raises:
        ValueError: It holds something that has no description, so that a later run could not tell it from another.
    """
    try:
        return _described(value, name)
    except RecursionError as error:
        raise ValueError(
            f"{name}: expected something that a resumed run can be told by, got {type(value).__name__}, which holds "
            "itself; leave workdir= out, or pass a function of its own at the top level of a module."
        ) from error


def _described(value: Any, name: str) -> str:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.generic | torch.dtype | torch.device | torch.Size):
        return repr(value)
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"tensor({list(value.shape)}, {value.dtype}, {hashlib.sha256(flat.numpy().data).hexdigest()})"
    if isinstance(value, tuple | list | set | frozenset):
        parts = [_described(part, name) for part in value]
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_described(k, name)}: {_described(v, name)}' for k, v in value.items())})"
    if isinstance(value, functools.partial):
        return f"partial({_described([value.func, value.args, value.keywords], name)})"
    if isinstance(value, types.MethodType):
        return f"method({_described(value.__func__, name)}, {_described(value.__self__, name)})"
    if isinstance(value, types.FunctionType):
        return _function(value, name)
    if isinstance(value, types.BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__}({value!r}, {_described(dict(value.state_dict()), name)})"
    if is_dataclass(value) or hasattr(value, "__dict__"):
        return f"{type(value).__module__}.{type(value).__qualname__}({_described(vars(value), name)})"
    raise ValueError(
        f"{name}: expected something that a resumed run can be told by, got {type(value).__name__} in it; leave "
        "workdir= out, or pass a function of its own at the top level of a module."
    )


def _function(function: Callable[..., Any], name: str) -> str:
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return (
        f"function({function.__module__}.{function.__qualname__}, {_code(code)}, "
        f"{_described(function.__defaults__, name)}, {_described(function.__kwdefaults__, name)}, "
        f"{_described(cells, name)})"
    )


def _code(code: types.CodeType) -> str:
    constants = [_code(x) if isinstance(x, types.CodeType) else repr(x) for x in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
