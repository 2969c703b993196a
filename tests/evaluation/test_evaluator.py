import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.evaluation.evaluator import default_forward
from bdfast.training.batchnorm import batchnorms, kept_statistics, recalibrate


class Lookup(nn.Module):
    """Predicts the class that its input says: tests know every prediction in advance."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x.flatten(1)[:, 0].long()]


def says(predictions: list[int], *columns: list[int]) -> TensorDataset:
    return TensorDataset(torch.tensor(predictions).view(-1, 1).float(), *map(torch.tensor, columns))


def test_acc_asr_and_ra_are_counted():
    clean = says([0, 1, 2, 3, 0], [0, 1, 2, 0, 1])
    triggered = says([0, 0, 0, 2], [0, 0, 0, 0], [1, 2, 3, 2])
    metrics = bdfast.evaluate(Lookup(), clean, triggered)
    assert metrics.acc == pytest.approx(0.6)
    assert metrics.asr == pytest.approx(0.75)
    assert metrics.ra == pytest.approx(0.25)
    assert metrics.der is None


@pytest.mark.parametrize(
    ("after", "der"),
    [
        # ACC and ASR of the public RNP log on BadNets, and the DER that its formula gives.
        ((0.9347, 0.9986), 0.501),
        ((0.9277, 0.0172), 0.988),
        ((0.8167, 0.0011), 0.941),
        ((0.2519, 0.0000), 0.659),
    ],
)
def test_der_of_a_published_log(after, der):
    before = bdfast.Metrics(0.9340, 1.0, 0.0)
    assert bdfast.Metrics(*after).against(before).der == pytest.approx(der, abs=5e-4)


def test_der_and_rir_clip_gains():
    worse = bdfast.Metrics(0.95, 1.0, 0.0).against(bdfast.Metrics(0.90, 0.8, 0.3))
    assert (worse.der, worse.rir) == (0.5, 0.5)
    assert bdfast.Metrics(0.10, 0.0).against(bdfast.Metrics(0.93, 0.99)).der == pytest.approx(0.58)
    assert bdfast.Metrics(0.9).against(bdfast.Metrics(0.9, 1.0, 0.0)).der is None


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2)).train()
    model[2].eval()
    data = TensorDataset(torch.randn(50, 2), torch.zeros(50, dtype=torch.long))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bdfast.evaluate(model, data, recalibrate_on=data)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recalibration_estimates_the_plain_mean_and_variance():
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    x = torch.randn(40, 3) * 2 + 5
    data = Batches(TensorDataset(x, torch.zeros(40)), device="cpu", batch_size=40)
    recalibrate(model, data.ordered(), default_forward)
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    torch.testing.assert_close(model[0].running_var, x.var(0))
    assert model[0].momentum == 0.1
    assert not model[0].training


def test_evaluation_with_recalibration_judges_the_recalibrated_model():
    # Its stale statistics put everything into class 0; the true ones split the data in the middle.
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[1].bias.zero_()
    x = torch.linspace(-9, -7, 20).view(-1, 1)
    data = TensorDataset(x, (x.squeeze(1) > -8).long())
    assert bdfast.evaluate(model, data).acc == 0.5
    assert bdfast.evaluate(model, data, recalibrate_on=data).acc == 1.0


def test_kept_statistics_leave_no_trace_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = [buffer.clone() for buffer in model.buffers()]

    def fail() -> None:
        with kept_statistics(model):
            model(torch.randn(8, 2))
            raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"):
        fail()
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    assert len(batchnorms(model)) == 1


@pytest.mark.parametrize(
    ("clean", "triggered", "message"),
    [
        (says([0, 1], [0, 9]), None, r"clean: batch 0: expected labels 0..3, .* got 0..9"),
        (says([0], [-1]), None, "expected labels 0..3"),
        (says([0], [0], [0]), None, r"clean: batch 0: expected 1 label\(s\)"),
        (says([0], [0]), says([0], [0]), r"triggered: batch 0: expected 2 label\(s\)"),
        (
            says([7], [0]),
            None,
            r"clean: batch 0: expected input that the model takes, got \[1, 1\] torch.float32",
        ),
    ],
)
def test_wrong_data_is_explained(clean, triggered, message):
    class Strict(Lookup):
        def forward(self, x):
            if x.max() > 3:
                raise RuntimeError("shape mismatch")
            return super().forward(x)

    with pytest.raises(ValueError, match=message):
        bdfast.evaluate(Strict(), clean, triggered)


def test_nan_and_strange_logits_are_explained():
    model = Lookup()
    with torch.no_grad():
        model.table[1, 1] = float("nan")
    with pytest.raises(ValueError, match="expected finite logits, got NaN"):
        bdfast.evaluate(model, says([1], [1]))
    with pytest.raises(ValueError, match=r"expected labels \[1, 4\] for logits \[1, 4, 1\], got \[1\]"):
        bdfast.evaluate(Lookup(), says([1], [1]), forward=lambda model, batch: (model(batch[0])[..., None], batch[1]))


def test_a_model_without_parameters_has_no_device():
    with pytest.raises(ValueError, match="model: expected parameters on one device, got no parameters at all"):
        bdfast.evaluate(nn.Identity(), says([0], [0]))


def test_evaluator_reads_the_data_once():
    data = says([0, 1, 2], [0, 1, 1])
    reads = []
    read = TensorDataset.__getitem__

    class Counting(TensorDataset):
        def __getitem__(self, index):
            reads.append(index)
            return read(self, index)

    judge = bdfast.Evaluator(Counting(*data.tensors))
    assert judge(Lookup()).acc == judge(Lookup()).acc == pytest.approx(2 / 3)
    assert len(reads) == 3
