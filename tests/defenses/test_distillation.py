import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast.defenses.distillation import TEMPERATURE, DistillationLoss
from bdfast.training import Run


@pytest.fixture
def scene():
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)) for _ in range(2))
    batch = torch.rand(8, 3, 2, 2), torch.randint(0, 3, (8,))
    return teacher, model, batch


def test_is_the_mean_of_both_losses(scene):
    teacher, model, batch = scene
    loss = DistillationLoss(Run(amp=False), teacher=teacher, distill=0.7, overlay=0)
    result = loss(model, loss.prepare(batch))
    logits, answers = model(batch[0]), teacher.eval()(batch[0])
    softened = F.kl_div(
        (logits / TEMPERATURE).log_softmax(1), (answers / TEMPERATURE).softmax(1), reduction="batchmean"
    )
    expected = 0.3 * F.cross_entropy(logits, batch[1]) + 0.7 * TEMPERATURE**2 * softened
    torch.testing.assert_close(result.loss, expected)


def test_alone_the_labels_count(scene):
    teacher, model, batch = scene
    loss = DistillationLoss(Run(amp=False), teacher=teacher, distill=0, overlay=0)
    prepared = loss.prepare(batch)
    assert prepared.kept is None
    torch.testing.assert_close(loss(model, prepared).loss, F.cross_entropy(model(batch[0]), batch[1]))


def test_the_teacher_is_only_read_and_sees_no_overlay(scene):
    teacher, _, batch = scene
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    prepared = DistillationLoss(Run(amp=False), teacher=teacher.train(), distill=0.5, overlay=0.4).prepare(batch)
    assert torch.equal(seen[0], batch[0])
    assert not torch.equal(prepared.batch[0], batch[0])
    assert not prepared.kept.requires_grad
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_batches_of_another_kind_go_to_their_forward(scene):
    _, model, (images, labels) = scene
    run = Run(amp=False, forward=lambda net, batch: (net(batch["pixels"]), batch["label"]))
    loss = DistillationLoss(run, teacher=model, distill=0.5, overlay=0.4)
    prepared = loss.prepare({"pixels": images, "label": labels})
    assert prepared.batch["pixels"] is images
    assert loss(model, prepared).loss.isfinite()
