from hypothesis import given
from hypothesis import strategies as st

from bdfast.training.budget import LEAST_BATCH, MOST_BATCH, budget


@given(updates=st.integers(1, 5000), samples=st.integers(1, 10**6))
def test_updates_come_out_about_as_asked(updates, samples):
    found = budget(updates, samples)
    in_epoch = -(-samples // found.batch_size)
    assert LEAST_BATCH <= found.batch_size <= MOST_BATCH
    assert found.epochs >= 1
    if samples <= updates * MOST_BATCH:
        assert updates / 2 <= found.epochs * in_epoch <= 2 * updates + 1
    else:
        assert found.epochs == 1


def test_examples():
    assert vars(budget(40, 450)) == {"epochs": 10, "batch_size": 128}
    assert vars(budget(40, 75)) == {"epochs": 40, "batch_size": 128}
    assert vars(budget(10, 2250)) == {"epochs": 1, "batch_size": 225}
    assert vars(budget(40, 10**6)) == {"epochs": 1, "batch_size": 256}
