"""Sparse gradients, and sparse parameters."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast.ops.finite import check_finite_gradients
from bdfast.optim import PAM, SAM, GradientNorm

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
METHODS = pytest.mark.parametrize("name", ["sam", "asam", "gsam", "gradient norm", "pam"])


def make(name: str, params, reference=None, base=torch.optim.SGD, **options):
    params = list(params)
    if name == "gradient norm":
        return GradientNorm(params, base, rho=0.1, alpha=0.7, **options)
    if name == "pam":
        reference = [param.detach() + 0.1 for param in params] if reference is None else reference
        return PAM(params, base, reference=reference, rho=0.3, **options)
    gap = 0.3 if name == "gsam" else 0.0
    return SAM(params, base, rho=0.1, adaptive=name == "asam", surrogate_gap=gap, **options)


def take(optimizer, backward) -> None:
    optimizer.zero_grad()
    if optimizer.needs_gradient:
        backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step(zero_grad=True)


class Bag(nn.Module):
    """An embedding, sparse or not, below a linear layer."""

    def __init__(self, sparse: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.EmbeddingBag(9, 5, sparse=sparse, mode="sum", dtype=dtype)
        self.other = nn.Embedding(7, 5, sparse=sparse, padding_idx=2, dtype=dtype)
        self.out = nn.Linear(5, 3, dtype=dtype)

    def backward(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(9, (4, 3), generator=generator)  # some of them twice: entries to be added up
        labels = torch.randint(3, (4,), generator=generator)
        logits = self.out(self.words(tokens) + self.other(tokens[:, 0] % 7))
        (scale * F.cross_entropy(logits, labels)).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@METHODS
def test_sparse_gradients_are_like_dense_ones(name, base, dtype):
    options = SGD if base is torch.optim.SGD else {"lr": 0.01}
    ends = []
    for sparse in (False, True):
        model = Bag(sparse, dtype)
        optimizer = make(name, model.parameters(), base=base, **options)
        for seed in range(4):
            take(optimizer, partial(model.backward, seed))
        ends.append([param.detach() for param in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sparse_adam_gets_sparse_gradients():
    models = [Bag(True, torch.float64) for _ in range(2)]
    params = [[x for x in model.parameters() if x.ndim == 2 and x.shape[1] == 5 and len(x) > 3] for model in models]
    optimizer = SAM(params[0], torch.optim.SparseAdam, rho=0.0, lr=0.01)
    plain = torch.optim.SparseAdam(params[1], lr=0.01)
    for seed in range(3):
        take(optimizer, partial(models[0].backward, seed))
        plain.zero_grad()
        models[1].backward(seed)
        plain.step()
    for a, b in zip(*params, strict=True):
        torch.testing.assert_close(a, b)


@METHODS
def test_sparse_gradients_under_a_scaler(name):
    ends = []
    for scale in (1.0, 256.0):
        model = Bag(True, torch.float32)
        optimizer = make(name, model.parameters(), **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for seed in range(3):
            optimizer.zero_grad()
            if optimizer.needs_gradient:
                model.backward(seed, scale)
            optimizer.first_step(zero_grad=True, scaled=True)
            scaler.scale(torch.ones(()))  # makes it known to the scaler
            model.backward(seed, scale)
            scaler.step(optimizer)
            scaler.update()
        ends.append([param.detach() for param in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sparse_gradient_that_is_not_finite_is_named(value):
    model = Bag(True, torch.float32)
    model.backward(0)
    check_finite_gradients(model.named_parameters())
    model.words.weight.grad._values()[1, 2] = value
    with pytest.raises(FloatingPointError, match=r"words\.weight: expected a finite gradient"):
        check_finite_gradients(model.named_parameters())
    optimizer = SAM(model.named_parameters(), torch.optim.SGD, lr=0.1)
    before = model.words.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"words\.weight: expected a finite gradient"):
        optimizer.first_step()
    assert torch.equal(model.words.weight, before)


@METHODS
def test_a_sparse_parameter_moves_like_a_dense_one(name):
    """torch.optim.SGD takes them; entries that are zero stay entries, or they could not be trained any more."""
    indices = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 2]])
    values = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    x = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return ((torch.sparse.mm(w, x) if w.is_sparse else w @ x) - 1).square().sum()

    ends = []
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse = torch.sparse_coo_tensor(indices, values, (3, 3)).coalesce()
        mask = torch.sparse_coo_tensor(indices, torch.ones(4, dtype=torch.float64), (3, 3)).to_dense()
        for param in (nn.Parameter(sparse), nn.Parameter(sparse.to_dense())):
            reference = [(param.detach().to_dense() + 0.1 * mask)]
            optimizer = make(name, [param], reference, lr=0.02, momentum=0.9)
            for _ in range(3):
                take(optimizer, lambda param=param: loss(param if param.is_sparse else param * mask).backward())
            ends.append(param.detach())
        torch.testing.assert_close(ends[0].to_dense(), ends[1])
        assert ends[0].coalesce().indices().tolist() == indices.tolist()
