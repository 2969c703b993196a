import threading

import pytest
import torch

from bdfast import ops
from bdfast.ops import backends, reference
from bdfast.ops.backends import BackendUnavailable, use_backend


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("BDFAST_BACKEND", raising=False)


@pytest.fixture
def loaders(monkeypatch):
    """The table of loaders, to be changed by the test; nothing of it is remembered."""
    table = dict(backends._LOADERS)
    monkeypatch.setattr(backends, "_LOADERS", table)
    backends._load.cache_clear()
    yield table
    backends._load.cache_clear()


def spy(calls, name):
    def norms(xs, refs, ord):
        calls.append(name)
        return reference.neuron_norms(xs, refs, ord)

    return lambda: {"neuron_norms": norms}


def test_status_of_all():
    status = backends.backends()
    assert set(status) == {"cpu", "cuda", "triton", "torch"}
    assert status["torch"].available
    if not torch.cuda.is_available():
        for name in ("cuda", "triton"):
            assert not status[name].available
            assert status[name].reason.startswith(("torch finds no GPU", "this build has no CUDA", "Triton is not"))


def test_first_available_in_order_runs(loaders):
    calls = []
    loaders["cpu"] = spy(calls, "cpu")
    loaders["torch"] = spy(calls, "torch")
    ops.neuron_norms([torch.ones(1)])
    assert calls == ["cpu"]


def test_failure_keeps_its_reason_and_the_next_one_runs(loaders):
    calls, attempts = [], []

    def fail():
        attempts.append(1)
        raise BackendUnavailable("the disk is on fire")

    loaders["cpu"] = fail
    loaders["torch"] = spy(calls, "torch")
    ops.neuron_norms([torch.ones(1)])
    ops.neuron_norms([torch.ones(1)])
    assert calls == ["torch", "torch"]
    assert attempts == [1]
    assert backends.backends()["cpu"] == backends.BackendStatus(False, "the disk is on fire")
    with pytest.raises(BackendUnavailable, match="'cpu' is not available: the disk is on fire"), use_backend("cpu"):
        pytest.fail("entered")


def test_missing_extension_is_explained(loaders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bdfast._C", None)
    status = backends.backends()["cpu"]
    assert not status.available
    assert "the native kernels do not load" in status.reason
    assert "pip install" in status.reason
    assert ops.neuron_norms([torch.ones(2, 3)]).tolist() == [3, 3]


def test_a_backend_may_lack_an_op(loaders):
    loaders["cpu"] = spy([], "cpu")
    params = [torch.ones(2)]
    ops.scale_neurons_(params, torch.zeros(2))
    assert params[0].tolist() == [0, 0]
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match="'cpu' is forced, but does not have this op"):
        ops.scale_neurons_(params, torch.zeros(2))


def test_use_backend_nests_and_ends(loaders):
    calls = []
    loaders["cpu"] = spy(calls, "cpu")
    loaders["torch"] = spy(calls, "torch")
    x = [torch.ones(1)]
    with use_backend("torch"):
        ops.neuron_norms(x)
        with use_backend("cpu"):
            ops.neuron_norms(x)
        ops.neuron_norms(x)
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    ops.neuron_norms(x)
    assert calls == ["torch", "cpu", "torch", "cpu"]


def test_use_backend_holds_for_its_thread_only(loaders):
    calls = []
    loaders["cpu"] = spy(calls, "cpu")
    loaders["torch"] = spy(calls, "torch")
    with use_backend("torch"):
        thread = threading.Thread(target=ops.neuron_norms, args=([torch.ones(1)],))
        thread.start()
        thread.join()
    assert calls == ["cpu"]


def test_environment_variable(loaders, monkeypatch):
    calls = []
    loaders["cpu"] = spy(calls, "cpu")
    loaders["torch"] = spy(calls, "torch")
    monkeypatch.setenv("BDFAST_BACKEND", "torch")
    ops.neuron_norms([torch.ones(1)])
    with use_backend("cpu"):
        ops.neuron_norms([torch.ones(1)])
    monkeypatch.setenv("BDFAST_BACKEND", "")
    ops.neuron_norms([torch.ones(1)])
    assert calls == ["torch", "cpu", "cpu"]


def test_unknown_names(monkeypatch):
    message = "expected one of the backends cpu, torch, cuda, triton, got 'troch'; did you mean 'torch'"
    with pytest.raises(ValueError, match=f"use_backend: {message}"), use_backend("troch"):
        pytest.fail("entered")
    monkeypatch.setenv("BDFAST_BACKEND", "troch")
    with pytest.raises(ValueError, match=f"BDFAST_BACKEND: {message}"):
        ops.neuron_norms([torch.ones(1)])


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_forcing_what_cannot_run_here(name, monkeypatch):
    with (
        pytest.raises(BackendUnavailable, match=f"use_backend: backend '{name}' is not available: "),
        use_backend(name),
    ):
        pytest.fail("entered")
    monkeypatch.setenv("BDFAST_BACKEND", name)
    with pytest.raises(BackendUnavailable, match="BDFAST_BACKEND"):
        ops.neuron_norms([torch.ones(1)])


def test_forcing_one_for_another_device(loaders):
    loaders["triton"] = spy([], "triton")
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match=r"expected one of the backends cpu, torch for .*, got 'triton'"),
    ):
        ops.neuron_norms([torch.ones(1)])


def test_float64_goes_to_torch_under_every_backend(loaders):
    calls = []
    loaders["cpu"] = spy(calls, "cpu")
    loaders["torch"] = spy(calls, "torch")
    ops.neuron_norms([torch.ones(1, dtype=torch.float64)])
    with use_backend("cpu"):
        ops.neuron_norms([torch.ones(1, dtype=torch.float64)])
    assert calls == ["torch", "torch"]


def test_other_devices_have_torch():
    assert backends.select("neuron_norms", torch.ones(1, device="meta")) is reference.neuron_norms
