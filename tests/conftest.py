import os
from collections.abc import Iterator

import pytest

from bdfast.ops.backends import ORDER, backends, use_backend

# Backends whose absence is an error and not a skip; set where they are known to be built.
REQUIRED = os.environ.get("BDFAST_REQUIRE", "").replace(",", " ").split()


@pytest.fixture(params=ORDER["cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test under every backend for CPU tensors."""
    status = backends()[request.param]
    if not status.available:
        report = pytest.fail if request.param in REQUIRED else pytest.skip
        report(f"backend {request.param}: {status.reason}")
    with use_backend(request.param):
        yield request.param
