"""What a black box may answer, and what is refused."""

import pytest
import torch
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.detectors.b3d import B3D
from bdfast.detectors.black_box_patch import asked
from bdfast.training import Run

COUNT, CLASSES = 60, 4
IMAGES = torch.linspace(-2, 2, COUNT * 16).view(COUNT, 1, 4, 4)
LOGITS = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(0))


def probabilities(images: torch.Tensor) -> torch.Tensor:
    return (3 * LOGITS[: len(images)]).softmax(1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda p: p.log(),
            r"tensor \[60, 4\] with values from -[\d.]+ to -[\d.e-]+, where the first row adds up to -",
        ),
        (lambda p: 0.2 + 0.5 * p, r"tensor \[60, 4\] with values from 0\.2\d* to 0\.\d+, where .* adds up to 1\.3;"),
        (lambda p: p * torch.nan, r"tensor \[60, 4\] with values from nan"),
        (lambda p: p.argmax(1), r"tensor \[60\]"),
        (lambda p: p[:1], r"tensor \[1, 4\]"),
        (lambda p: p[:, :0], r"tensor \[60, 0\]"),
        (lambda p: p.numpy(), "ndarray"),
        (lambda p: p if len(p) > 8 else p.flatten(), r"for B = 8 images, got a tensor \[32\]"),
    ],
)
def test_what_is_no_probability_is_refused(answer, message):
    data = Batches(TensorDataset(IMAGES, torch.arange(COUNT) % CLASSES), device="cpu", batch_size=COUNT)
    with pytest.raises(ValueError, match=rf"^model: expected probabilities \[B, K\].*{message}.*pass softmax\(logits"):
        B3D(steps=1, probes=2, images=4).query(lambda x: answer(probabilities(x)), data, Run())


@pytest.mark.parametrize("answer", [lambda p: p.round(decimals=2), lambda p: p.bfloat16(), lambda p: p > 0.5])
def test_probabilities_may_be_rounded_and_of_any_dtype(answer):
    sure = (20 * LOGITS).softmax(1)
    sure[:] = sure.argmax(1, keepdim=True) == torch.arange(CLASSES)
    losses, count = asked(lambda x: answer(0.98 * sure[: len(x)] + 0.005), IMAGES, (-2.0, 2.0))
    values, led = losses((IMAGES[:9] + 2) / 4, sure[:9].argmax(1))
    assert count == CLASSES
    assert values.dtype == torch.float32
    assert float(values.max()) < 0.03
    assert bool(led.all())


def test_answers_come_to_the_device_and_the_dtype_of_the_images():
    seen = []

    def answers(images: torch.Tensor) -> torch.Tensor:
        seen.append((images.dtype, float(images.max()) if images.device.type == "cpu" else None))
        return probabilities(images)

    losses, _ = asked(answers, IMAGES.half(), (-2.0, 2.0))
    unit, labels = (IMAGES[:5].double() + 2) / 8, torch.zeros(5, dtype=torch.long)
    assert losses(unit, labels)[0].dtype == torch.float64
    values, led = losses(unit.to("meta"), labels.to("meta"))
    assert (values.device.type, led.device.type) == ("meta", "meta")
    assert seen == [(torch.float16, 2.0), (torch.float16, float((4 * unit.max() - 2).half())), (torch.float16, None)]
