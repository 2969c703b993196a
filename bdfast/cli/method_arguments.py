"""`bdfast VERB METHOD ...`: the list of methods, and the options of a command beside those of a method."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import cleandoc
from typing import Annotated, Any

import tyro

from bdfast.errors import nearest
from bdfast.methods import list_methods

Flat = tyro.conf.arg(name="")


def parsed(
    verb: str, operands: str, command: type[Any], methods: Mapping[str, type[Any]], arguments: list[str]
) -> tuple[Any, Any] | None:
    """The command and the method with their options; None where only help was asked for, which is printed.

    Args:
        verb: Name of the command.
        operands: What it takes beside METHOD and options, for the usage line.
        command: Dataclass of its options.
        methods: By name.
        arguments: Of the command line, METHOD first.

    Raises:
        ValueError: There is no such method.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        known = list_methods(verb)
        width = max(10, *(len(method.name) + 2 for method in known))
        lines = [f"  {method.name:<{width}}{method.summary}" for method in known]
        usage = [f"usage: bdfast {verb} METHOD {operands} [OPTIONS]", "", *lines, ""]
        sys.stdout.write("\n".join([*usage, f"Options: bdfast {verb} METHOD --help\n"]))
        return None
    if name not in methods:
        raise ValueError(f"expected a method ({', '.join(methods)}), got {name!r}; {nearest(name, methods)}")
    options = methods[name]
    return tyro.cli(
        tuple[Annotated[command, Flat], Annotated[options, Flat]],  # type: ignore[valid-type]
        prog=f"bdfast {verb} {name}",
        args=rest,
        description=cleandoc(options.__doc__ or "").split("\n\nAttributes:")[0],
        config=(tyro.conf.OmitArgPrefixes,),
    )
