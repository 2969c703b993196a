import pytest
from emulated import HERE, Emulated, compile_with_emulator, missing


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "emulator":
            item.add_marker(pytest.mark.slow)
            if "emulated" in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group("emulated kernels"))


@pytest.fixture(scope="session", autouse=True)
def emulator_is_here(skip_without) -> None:
    skip_without("emulator", missing())


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    """The CUDA kernels, compiled for the CPU."""
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    compile_with_emulator(HERE / "harness.cpp", library)
    return Emulated(library)
