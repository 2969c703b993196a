"""The `bdfast` command. Every option comes from the dataclass that the Python API takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train a backdoored network on Fashion-MNIST, clean it, write a report",
    "purify": "remove a backdoor from a trained network: `bdfast purify METHOD ...`",
    "evaluate": "measure ACC, and ASR and RA under an attack",
    "doctor": "show versions and which kernels can run here",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 and one message when something that the user gave is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    if command in ("-h", "--help"):
        _usage()
    elif command == "--version":
        from bdfast import __version__

        sys.stdout.write(f"bdfast {__version__}\n")
    elif command in COMMANDS:
        _run(command, rest)
    else:
        from bdfast.names import nearest

        advice = nearest(command, COMMANDS)
        sys.stderr.write(f"bdfast: expected one of {', '.join(COMMANDS)}, got {command!r}; {advice}\n")
        sys.exit(2)


def _usage() -> None:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    sys.stdout.write("\n".join(["usage: bdfast COMMAND [OPTIONS]", "", *lines, "", "Options: bdfast COMMAND --help\n"]))


def _run(command: str, arguments: list[str]) -> None:
    # Each command imports what it needs, so that `bdfast --help` answers at once.
    from importlib import import_module

    module = import_module(f"bdfast.cli.{command}")
    try:
        module.main(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        sys.stderr.write(f"bdfast {command}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nbdfast {command}: interrupted\n")
        sys.exit(130)
