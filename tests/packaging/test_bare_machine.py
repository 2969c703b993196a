"""`bdfast doctor` of an installation without compiler, nvcc and Triton."""

import json
import shutil
import subprocess

import pytest
from building import clean_environment, virtual_environment

from bdfast.cli.native_build import REBUILD


@pytest.mark.slow
def test_doctor_works_where_nothing_is_there(build, tree, once, tmp_path):
    built = build(tree, CXX="no-such-compiler")
    shutil.unpack_archive(built.wheel, tmp_path / "unpacked", "zip")
    python = once("environment", virtual_environment) / "bin" / "python"
    env = {
        **clean_environment(),
        "PATH": str(tmp_path),
        "PYTHONPATH": str(tmp_path / "unpacked"),
        "CUDA_HOME": "/nowhere",
    }
    command = [python, "-m", "bdfast", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cpu = json.loads(done.stdout)["backends"]["cpu"]
    assert not cpu["available"]
    assert cpu["missing"][0] == {"what": "a C++ compiler", "mend": "apt-get install g++"}
    assert REBUILD in cpu["missing"][-1]["mend"]
