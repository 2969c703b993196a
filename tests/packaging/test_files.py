"""What is in the sdist and in the wheel: all of the tree that belongs there, and nothing else."""

import tarfile
from pathlib import PurePosixPath

import pytest
from building import listed

from bdfast.cli import native_build

pytestmark = pytest.mark.slow

BESIDE_THE_PACKAGES = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
}


def in_wheel(name: str) -> str:
    """Where a file of the tree is installed."""
    return f"bdfast/{name}" if name.startswith("kernels/") else name


def difference(there: set[str], expected: set[str]) -> tuple[list[str], list[str]]:
    """What is missing, and what is too much."""
    return sorted(expected - there), sorted(there - expected)


def test_wheel_has_every_file_of_the_packages_and_no_other(built):
    files = {name for name in built.names if ".dist-info/" not in name and name not in built.binaries}
    assert difference(files, {in_wheel(name) for name in listed("bdfast", "kernels")}) == ([], [])
    assert {"bdfast/py.typed", "bdfast/__init__.pyi", "bdfast/report/report.html.j2"} <= files


def test_wheel_has_the_extension_where_it_can_be_built(built):
    can_be_built = native_build.for_native() == []
    assert [PurePosixPath(name).name.split(".")[0] for name in built.binaries] == ["_C"] * can_be_built
    assert built.wheel.name.endswith("-any.whl") is not can_be_built
    if can_be_built:
        assert not [line for line in built.lines if "native" in line]


def test_wheel_brings_the_command(built):
    info = [name for name in built.names if ".dist-info/" in name]
    assert {PurePosixPath(name).parts[0] for name in info} == {"-".join(built.wheel.name.split("-")[:2]) + ".dist-info"}
    names = {PurePosixPath(name).name for name in info}
    assert names == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "LICENSE", "top_level.txt"}


def test_sdist_has_what_a_build_takes_and_no_other(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    files = {name for name in names if ".egg-info/" not in name}
    assert difference(files, {*listed("bdfast", "kernels", "csrc"), *BESIDE_THE_PACKAGES}) == ([], [])
    assert {"csrc/lists.h", "csrc/cuda/element.cuh", "kernels/__init__.py"} <= files
