import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def triton_is_there(skip_without):
    found = importlib.util.find_spec("triton")
    skip_without("triton", None if found else "it is not installed; it comes with the CUDA builds of torch")
