"""Unlearning that diverges is tried again at lower rates."""

import pytest
import torch

import bdfast
from bdfast.defenses import OTBRDefense
from bdfast.defenses.parts import ascent
from bdfast.selection import LOWER, RETRIES

METHODS = [
    ("tsbd", {"n": 0.2, "lr": 0.01, "epochs": 1}, 0.05),
    ("ulrl", {"lr": 0.01, "epochs": 1}, 0.05),
    ("rnp", {"threshold": 0.3, "recover_updates": 1}, 0.05),
    ("otbr", {"gamma": 0.1, "unlearn_steps": 2, "unlearn_batch": 4}, 1e-3),
]


@pytest.fixture
def diverging(monkeypatch):
    """Above this rate the first steps end in NaN; counts the attempts."""
    limit, rates = [0.0], []
    prepared = ascent._prepared

    def watched(*arguments):
        copy, step, optimizer = prepared(*arguments)

        def watched_step(batch):
            rate = optimizer.param_groups[0]["lr"]
            if rates[-1:] != [rate]:
                rates.append(rate)
            if rate > limit[0]:
                torch.nn.init.constant_(next(copy.parameters()), torch.nan)
                raise FloatingPointError("a gradient became NaN")
            return step(batch)

        return copy, watched_step, optimizer

    monkeypatch.setattr(ascent, "_prepared", watched)
    return limit, rates


@pytest.mark.parametrize(("method", "options", "lr"), METHODS)
def test_at_lower_rates(method, options, lr, trained, clean, diverging):
    limit, rates = diverging
    limit[0] = 1.01 * lr
    wanted = {"unlearn_lr": lr / LOWER} | ({} if method == "otbr" else {"unlearn_to": 0.8})
    result = bdfast.purify(trained, clean, method=method, batch_size=16, amp=False, **wanted, **options)
    assert rates == pytest.approx([lr / LOWER, lr])
    assert all(x.isfinite().all() for x in result.model.state_dict().values())


def test_the_last_one_raises(trained, diverging):
    rates = diverging[1]
    with pytest.raises(FloatingPointError, match="a gradient became NaN"):
        bdfast.purify(
            trained, None, method=OTBRDefense(gamma=0.1, image_shape=(1, 8, 8), unlearn_steps=1, unlearn_batch=4)
        )
    assert len(rates) == RETRIES + 1
    assert all(x.isfinite().all() for x in trained.state_dict().values())
