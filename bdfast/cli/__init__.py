"""The `bdfast` command. Every option comes from the dataclass that the Python API takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train a backdoored network on Fashion-MNIST, clean it, write a report",
    "detect": "say whether a network looks backdoored: `bdfast detect METHOD ...`",
    "purify": "remove a backdoor from a trained network: `bdfast purify METHOD ...`",
    "suppress": "train a network on data that may be poisoned: `bdfast suppress METHOD ...`",
    "audit": "say whether the safety of a purified network is only superficial",
    "evaluate": "measure ACC, and ASR and RA under an attack",
    "matrix": "measure a grid of networks, attacks and defenses: `bdfast matrix run GRID ...`",
    "doctor": "show versions, which kernels can run here, and how to get those that cannot",
}
IMPORT = "--import"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 and one message when something that the user gave is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    imported = []
    while given[:1] == [IMPORT] and len(given) > 1:
        imported.append(given[1])
        del given[:2]
    command, rest = (given[0], given[1:]) if given else ("--help", [])
    if command in ("-h", "--help"):
        _usage()
    elif command == "--version":
        from bdfast import __version__

        sys.stdout.write(f"bdfast {__version__}\n")
    elif command in COMMANDS:
        _run(command, rest, imported)
    else:
        from bdfast.errors import nearest

        advice = nearest(command, COMMANDS)
        sys.stderr.write(f"bdfast: expected one of {', '.join(COMMANDS)}, got {command!r}; {advice}\n")
        sys.exit(2)


def _usage() -> None:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    usage = [f"usage: bdfast [{IMPORT} FILE.py|MODULE] COMMAND [OPTIONS]", "", *lines, ""]
    ending = [
        "Options: bdfast COMMAND --help",
        f"{IMPORT} runs Python code of yours first, which may register methods (`bdfast.register`), networks",
        "(`bdfast.models.register_model`) or data (`bdfast.register_data`).",
    ]
    sys.stdout.write("\n".join([*usage, *ending, ""]))


def _run(command: str, arguments: list[str], imported: list[str]) -> None:
    # Each command imports what it needs, so that `bdfast --help` answers at once.
    from importlib import import_module

    try:
        if imported:
            from bdfast.cli.plugins import import_all

            import_all(imported)
        module = import_module(f"bdfast.cli.{command}_command")
        if command == "matrix":  # its workers have to import the same
            module.main(arguments, imported)
        else:
            module.main(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        sys.stderr.write(f"bdfast {command}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nbdfast {command}: interrupted\n")
        sys.exit(130)
