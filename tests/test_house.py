"""Names and sizes of files; the order of the packages is held by `make lint` (import-linter)."""

import ast
import importlib
import pkgutil
import re
import subprocess
import textwrap
from collections import Counter
from pathlib import Path

import pytest

import bdfast

ROOT = Path(__file__).parent.parent
MOST_LINES = {".py": 300, ".cpp": 400, ".h": 400, ".cu": 400, ".cuh": 400}
SAME_EVERYWHERE = {"__init__", "__main__", "base"}  # `base`: what all methods of a verb share
VERBS = {"run", "fit", "train", "evaluate", "purify", "detect", "audit", "poison", "perturb", "augment", "scan", "load"}


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(bdfast.__path__, "bdfast.")]
    return [name for name in names if not name.startswith("bdfast.kernels") and name != "bdfast._C"]


def test_files_are_short():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files()
        if path.suffix in MOST_LINES
    }
    assert {name: count for name, count in lines.items() if count > MOST_LINES[Path(name).suffix]} == {}


def test_no_two_packages_share_the_name_of_a_module():
    names = Counter(name.rpartition(".")[2] for name in modules())
    assert {name for name, count in names.items() if count > 1} <= SAME_EVERYWHERE


def test_no_module_is_called_by_a_plain_verb():
    assert {name for name in modules() if name.rpartition(".")[2] in VERBS} == set()


def test_no_module_has_the_name_of_what_its_package_exports():
    for name in ("bdfast", *modules()):
        package = importlib.import_module(name)
        if not hasattr(package, "__path__"):
            continue
        inside = {module.name for module in pkgutil.iter_modules(package.__path__)}
        exported = {x for x in getattr(package, "__all__", ()) if not hasattr(getattr(package, x), "__path__")}
        assert inside & exported == set(), name


def test_raises_has_one_style():
    """`Raises:` lists one error a line: its name, a colon, and sentences that say when."""
    for path in (ROOT / "bdfast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not (text := ast.get_docstring(node)):
                continue
            section = text.partition("Raises:\n")[2].partition("\n\n")[0]
            entries = re.split(r"\n(?=\S)", textwrap.dedent(section)) if section else []
            for entry in entries:
                assert re.fullmatch(r"[A-Z]\w+: \S.*\.\s*", entry, re.DOTALL), f"{path.name}, {node.name}: {entry}"
