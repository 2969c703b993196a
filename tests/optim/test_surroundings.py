"""GradScaler, autocast, accumulation, torch.compile, channels-last, and two processes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast.optim import PAM, SAM, GradientNorm

METHODS = pytest.mark.parametrize("name", ["sam", "asam", "gsam", "tsbd", "pam"])


def make(name: str, model: nn.Module, reference: nn.Module | None = None):
    options = {"lr": 0.05, "momentum": 0.9}
    if name == "tsbd":
        return GradientNorm(model.parameters(), torch.optim.SGD, rho=0.05, alpha=0.7, scope="tensor", **options)
    if name == "pam":
        return PAM(model.parameters(), torch.optim.SGD, reference=reference.parameters(), rho=0.05, **options)
    gap = 0.3 if name == "gsam" else 0.0
    return SAM(model.parameters(), torch.optim.SGD, rho=0.05, adaptive=name == "asam", surrogate_gap=gap, **options)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def batch(count: int = 8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def train(model, optimizer, steps: int = 3, parts: int = 1, autocast: bool = False) -> torch.Tensor:
    x, y = batch()

    def gradients() -> None:
        for images, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(images)
            (F.cross_entropy(logits.float(), labels) / parts).backward()

    for _ in range(steps):
        optimizer.zero_grad()
        if optimizer.needs_gradient:
            gradients()
        optimizer.step(gradients)
    return weights(model)


def trained(name: str, **options) -> torch.Tensor:
    model = network()
    return train(model, make(name, model, network(1)), **options)


@METHODS
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    torch.testing.assert_close(trained(name, parts=4), trained(name), rtol=1e-4, atol=1e-6)


@METHODS
def test_under_autocast(name):
    torch.testing.assert_close(trained(name, autocast=True), trained(name), rtol=0.05, atol=0.01)


@METHODS
def test_channels_last(name):
    model = network().to(memory_format=torch.channels_last)
    optimizer = make(name, model, network(1))
    torch.testing.assert_close(train(model, optimizer), trained(name), rtol=1e-4, atol=1e-6)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@METHODS
def test_a_compiled_model(name):
    model = network()
    optimizer = make(name, model, network(1))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(train(compiled, optimizer), trained(name), rtol=1e-5, atol=1e-7)


@METHODS
def test_a_scaler_changes_nothing(name):
    model = network()
    optimizer = make(name, model, network(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        if optimizer.needs_gradient:
            scaler.scale(F.cross_entropy(model(x), y)).backward()
        optimizer.first_step(zero_grad=True, scaled=True)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weights(model), trained(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", ["first", "second", "both"])
@METHODS
def test_a_scaler_skips_what_overflows_and_the_weights_come_back(name, at):
    model = network()
    optimizer = make(name, model, network(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    before = weights(model)

    def gradients(which: str) -> None:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if at in (which, "both"):
            model[0].weight.grad[0] = float("inf")

    gradients("first")
    optimizer.first_step(zero_grad=True, scaled=True)
    if at == "second":
        assert not torch.equal(weights(model), before)
    optimizer.zero_grad()
    gradients("second")
    scaler.step(optimizer)
    scaler.update()
    if name == "pam" and at == "first":
        return  # it has one pass only, and that one was sound
    assert torch.equal(weights(model), before)
    if at != "first":
        assert scaler.get_scale() == 512.0


def test_gradients_of_one_scale_only_are_mixed():
    model = network()
    optimizer = make("tsbd", model)
    scaler = torch.amp.GradScaler("cpu")
    x, y = batch()
    before = weights(model)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    optimizer.first_step(scaled=True)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="expected gradients that are still scaled"):
        scaler.step(optimizer)
    assert torch.equal(weights(model), before)


TWO_PROCESSES = textwrap.dedent(
    """
    import gc, os, sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel
    sys.path.insert(0, sys.argv[1])
    from test_surroundings import make

    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()

    def run(rank, view):
        results = {}
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator))
                for _ in range(4)]
        for name in ("sam", "asam", "gsam", "tsbd", "pam"):
            model = network(0)  # BatchNorm in eval mode: frozen
            optimizer = make(name, model, network(1))
            forward = model
            if rank is not None:
                forward = DistributedDataParallel(model, gradient_as_bucket_view=view)
            for x, y in data:
                if rank is not None:
                    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
                gradients = lambda: F.cross_entropy(forward(x), y).backward()
                optimizer.zero_grad()
                if optimizer.needs_gradient:
                    gradients()
                optimizer.step(gradients)
            results[name] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        return results

    rank = int(sys.argv[2])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[3], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    alone = run(None, False)
    for view in (False, True):
        for name, together in run(rank, view).items():
            torch.testing.assert_close(together, alone[name], rtol=1e-5, atol=1e-6)
    # What holds the process group goes first, and neither rank leaves before the other has finished: a thread of gloo
    # that still runs when the interpreter ends would abort the process.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    print("same", flush=True)
    os._exit(0)
    """
)


@pytest.mark.slow
def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(TWO_PROCESSES)
    here = __file__.rpartition("/")[0]
    command = [sys.executable, str(script), here]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in (0, 1)
    ]
    for process in both:
        output = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, output[-4000:]
        assert output.strip().endswith("same")
