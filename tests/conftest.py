import os
from collections.abc import Callable, Iterator

import pytest

from bdfast.ops.backends import ORDER, backends, use_backend

# What must not be missing: backends, "cuda-build", "emulator", "gpu". Set where they are known to be there.
REQUIRED = os.environ.get("BDFAST_REQUIRE", "").replace(",", " ").split()


@pytest.fixture(scope="session")
def skip_without() -> Callable[[str, str | None], None]:
    """Skips the test for a reason, if there is one; fails it where that thing is required."""

    def skip(name: str, reason: str | None) -> None:
        if reason:
            report = pytest.fail if name in REQUIRED else pytest.skip
            report(f"{name}: {reason}")

    return skip


@pytest.fixture(params=ORDER["cpu"])
def backend(request: pytest.FixtureRequest, skip_without: Callable) -> Iterator[str]:
    """Runs the test under every backend for CPU tensors."""
    skip_without(request.param, backends()[request.param].reason)
    with use_backend(request.param):
        yield request.param
