"""Small networks with and without a backdoor, and images for them."""

import pytest
from audit_cases import ATTACK, CLASSES, network, pictures, trained

import bdfast
from bdfast.attacks import poisoned


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """The published width takes seconds in float64."""
    monkeypatch.setattr("bdfast.audits.perturbation_network.HIDDEN", 32)


@pytest.fixture(scope="session")
def clean():
    """The defender's."""
    return pictures(80, seed=1)


@pytest.fixture(scope="session")
def shown():
    """The triggered test set."""
    return bdfast.Triggered(pictures(60, seed=2), ATTACK)


@pytest.fixture(scope="session")
def planted(shown):
    """A network with a working backdoor."""
    model = trained(network(), poisoned(pictures(160, seed=0), ATTACK))
    found = bdfast.evaluate(model, shown.data, shown)
    assert found.acc > 0.9
    assert found.asr > 0.95
    return model


@pytest.fixture(scope="session")
def innocent(shown):
    """One without."""
    model = trained(network(seed=1), pictures(160, seed=0))
    found = bdfast.evaluate(model, shown.data, shown)
    assert found.acc > 0.9
    assert found.asr < 1 / CLASSES
    return model
