import subprocess
import sys

import pytest

import bdfast


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = """
        import sys, torch
        before = set(sys.modules)
        import bdfast
        added = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(added - {"bdfast"}))
    """
    added = in_fresh_python("\n".join(line.strip() for line in code.splitlines()))
    heavy = {"triton", "matplotlib", "torchvision", "tyro", "rich", "jinja2", "sklearn", "PIL"}
    assert not heavy & set(eval(added))


def test_every_public_name_is_there():
    for name in bdfast.__all__:
        assert getattr(bdfast, name) is not None
    assert set(bdfast.__all__) <= set(dir(bdfast))
    with pytest.raises(AttributeError, match=r"attribute.*purfy"):
        _ = bdfast.purfy


def test_ops_register_once_even_when_imported_by_name():
    in_fresh_python("import bdfast.ops, bdfast; bdfast.ops.neuron_norms_op; import bdfast.defenses.purification")


def test_kernels_are_no_top_level_package(tmp_path):
    code = "from importlib.util import find_spec as f; print(f('kernels'), bool(f('bdfast.kernels')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["None", "True"]


def test_list_methods():
    names = {(method.verb, method.name) for method in bdfast.list_methods()}
    assert {("poison", "badnets"), ("poison", "blended"), ("purify", "tsbd")} <= names
    (tsbd,) = [method for method in bdfast.list_methods("purify") if method.name == "tsbd"]
    assert tsbd.options["m"] == 0.7
    assert "NeurIPS 2024" in tsbd.summary
    with pytest.raises(ValueError, match=r"verb: expected one of poison, .*, got 'purge'; did you mean 'purify'"):
        bdfast.list_methods("purge")
