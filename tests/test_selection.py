"""The rule that chooses how hard to purify, with a judge that knows what each learning rate does."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bdfast.selection import LOWER, RETRIES, Judge, Reached, climb
from bdfast.training import Run

IMAGES = 200
GIVEN, PREPARED = -1.0, -2.0


RUINED = (0.0, 0.1)
"""What rates do that no test speaks of."""


class Judged:
    """A model whose only weight is the last rate that it was trained at, and a judge that looks it up."""

    def __init__(self, outcomes, *, targets=(3,), diverges=(), clear=True):
        self.model = nn.Linear(1, 1, bias=False)
        self.outcomes, self.targets, self.diverges = outcomes, list(targets), diverges
        self.clear = clear and bool(targets)
        self.before = self.reached(1.0 if targets else 0.0, 0.9)
        self.run, self.tried = Run(), []
        nn.init.constant_(self.model.weight, PREPARED)

    def reached(self, residual, accuracy):
        return Reached(residual, torch.arange(IMAGES) < round(accuracy * IMAGES))

    def __call__(self, model):
        return self.reached(*self.outcomes.get(round(model.weight.item(), 6), RUINED))

    def floor(self, reached, drop):
        return self.before.accuracy - drop

    def warnings(self, reached, drop):
        return [f"{reached.accuracy:.2f}"]

    def train(self, rate):
        self.tried.append(rate)
        nn.init.constant_(self.model.weight, rate)
        if rate in self.diverges:
            raise FloatingPointError("a gradient became NaN")

    def climb(self, ladder, drop=0.03):
        return climb(ladder, self.train, self.model, self, self.run, max_accuracy_drop=drop)

    @property
    def left_at(self):
        return round(self.model.weight.item(), 6)


def test_the_weakest_step_that_removes_the_backdoor_is_taken():
    judged = Judged({0.01: (0.9, 0.9), 0.03: (0.02, 0.89), 0.1: (0.0, 0.85)})
    choice = judged.climb([0.01, 0.03, 0.1])
    assert (choice.strength, choice.reached.residual) == (0.03, 0.02)
    assert judged.tried == [0.01, 0.03]
    assert judged.left_at == 0.03
    assert [(row.value, row.chosen) for row in judged.run.history] == [(0.01, False), (0.03, True)]


def test_where_accuracy_falls_first_the_least_bad_step_is_taken():
    judged = Judged({0.01: (0.5, 0.89), 0.03: (0.2, 0.88), 0.1: (0.1, 0.5), 0.3: (0.0, 0.1)})
    choice = judged.climb([0.01, 0.03, 0.1, 0.3])
    assert choice.strength == 0.03
    assert judged.tried == [0.01, 0.03, 0.1]  # below the floor: no further step
    assert judged.left_at == 0.03


def test_a_ruined_network_is_never_taken_for_its_residual():
    judged = Judged({0.01: (0.95, 0.9), 0.03: (0.0, 0.1)})
    assert judged.climb([0.01, 0.03]).strength == 0.01


def test_a_little_below_the_floor_is_better_than_the_backdoor():
    judged = Judged({0.01: (0.95, 0.9), 0.03: (0.0, 0.82)})
    assert judged.climb([0.01, 0.03]).strength == 0.03


def test_a_stronger_step_has_to_be_worth_it():
    judged = Judged({0.01: (0.20, 0.9), 0.03: (0.19, 0.9), 0.1: (0.185, 0.9)})
    assert judged.climb([0.01, 0.03, 0.1]).strength == 0.01
    assert judged.tried == [0.01, 0.03, 0.1]


def test_without_a_suspect_the_strongest_step_within_the_budget_is_taken():
    judged = Judged({0.01: (0.0, 0.9), 0.03: (0.0, 0.88), 0.1: (0.0, 0.8), 0.3: (0.0, 0.9)}, targets=())
    assert judged.climb([0.01, 0.03, 0.1, 0.3]).strength == 0.03
    assert judged.left_at == 0.03


def test_without_a_suspect_a_model_that_cannot_bear_it_is_left_as_it_was():
    judged = Judged({0.01: (0.0, 0.5), 0.03: (0.0, 0.4)}, targets=())
    choice = judged.climb([0.01, 0.03])
    assert choice.strength is None
    assert choice.reached is judged.before
    assert not any(row.chosen for row in judged.run.history)


def test_where_no_suspect_is_clear_nothing_is_taken_that_costs_more_than_it_removes():
    outcomes = {0.01: (0.2, 0.5), 0.03: (0.1, 0.4)}
    judged = Judged(outcomes, clear=False)
    assert judged.climb([0.01, 0.03]).strength is None
    assert not any(row.chosen for row in judged.run.history)
    assert Judged({0.01: (0.2, 0.8)}, clear=False).climb([0.01]).strength == 0.01  # below the floor, and worth it


def test_where_no_suspect_is_clear_the_weakest_step_that_is_enough_is_taken():
    assert Judged({0.01: (0.02, 0.9), 0.03: (0.0, 0.89)}, clear=False).climb([0.01, 0.03]).strength == 0.01
    assert Judged({0.01: (0.5, 0.9), 0.03: (0.02, 0.89)}, clear=False).climb([0.01, 0.03]).strength == 0.03
    assert Judged({0.01: (0.5, 0.9), 0.03: (0.49, 0.89)}, clear=False).climb([0.01, 0.03]).strength == 0.01


def test_a_first_step_below_the_floor_may_recover():
    """Zeroing weights costs accuracy that training gives back."""
    for targets in ((), (3,)):
        judged = Judged({0.01: (0.0, 0.5), 0.03: (0.0, 0.89)}, targets=targets)
        assert judged.climb([0.01, 0.03]).strength == 0.03


def test_a_first_step_that_diverges_is_tried_again_lower():
    lower = round(0.1 * LOWER, 6)
    judged = Judged({lower: (0.01, 0.9)}, diverges=(0.1,))
    assert judged.climb([0.1, 0.3]).strength == pytest.approx(lower)
    assert judged.left_at == lower


def test_rates_that_the_network_does_not_bear_are_lowered():
    for targets in ((), (3,)):
        judged = Judged({0.01: (0.0, 0.5), 0.0025: (0.02, 0.89)}, targets=targets)
        assert judged.climb([0.01, 0.03] if targets else [0.01]).strength == 0.0025
        assert judged.tried == ([0.01, 0.03, 0.0025] if targets else [0.01, 0.0025])
        assert judged.left_at == 0.0025


def test_a_lower_rate_starts_from_what_the_method_has_prepared():
    judged, starts = Judged({}), []
    train = judged.train

    def noting(rate):
        starts.append(judged.left_at)
        train(rate)

    judged.train = noting
    judged.climb([0.01, 0.03])
    assert starts[::2] == [PREPARED] * (RETRIES + 1)
    assert starts[1::2] == pytest.approx(judged.tried[::2], abs=1e-6)


def test_where_no_rate_is_borne_the_step_that_costs_least_is_taken_and_else_none():
    assert Judged({0.01: (0.1, 0.82)}).climb([0.01]).strength == 0.01
    judged = Judged({})
    choice = judged.climb([0.01, 0.03])
    assert (choice.strength, choice.reached.residual) == (None, 1.0)
    assert not any(row.chosen for row in judged.run.history)


def test_other_strengths_than_rates_are_not_lowered():
    judged = Judged({})
    climb([0.01], judged.train, judged.model, judged, judged.run, max_accuracy_drop=0.03, option="share")
    assert judged.tried == [0.01]


def test_a_step_that_diverges_later_is_undone():
    judged = Judged({0.1: (0.3, 0.9)}, diverges=(0.3,))
    assert judged.climb([0.1, 0.3, 0.5]).strength == 0.1
    assert judged.left_at == 0.1
    assert judged.tried == [0.1, 0.3]


def test_training_that_always_diverges_is_an_error_that_says_what_was_tried():
    judged = Judged({}, diverges=[0.1 * LOWER**power for power in range(RETRIES + 1)])
    with pytest.raises(FloatingPointError, match=r"lr: expected a learning rate .* got none among 0.1, 0.025, .* NaN"):
        judged.climb([0.1])
    assert judged.left_at == PREPARED


def test_the_floor_allows_for_what_chance_changes(trained_pair):
    judge, same, other = trained_pair
    assert judge.floor(same, 0.03) == pytest.approx(judge.before.accuracy - 0.03)
    changed = int((other.right != judge.before.right).sum())
    assert judge.floor(other, 0.03) == pytest.approx(judge.before.accuracy - 0.03 - changed**0.5 / IMAGES)


def test_a_step_that_is_taken_is_spoken_against():
    judged = Judged({0.01: (0.5, 0.89), 0.03: (0.02, 0.88)})
    judged.climb([0.01, 0.03])
    assert judged.run.warnings == ["0.88"]
    judged = Judged({0.01: (0.0, 0.5)}, targets=())
    judged.climb([0.01])
    assert judged.run.warnings == []


@pytest.mark.parametrize(
    ("images", "lost", "changed", "said"),
    [
        (1000, 20, 0, ""),
        (1000, 40, 0, "max_accuracy_drop: expected a held-out accuracy of 87.0% or more after purification, got 86.0%"),
        (99, 0, 0, "a loss of 3 points of accuracy, got 99 held-out ones, on which 3 points more"),
        (101, 0, 0, ""),  # at most 3 / 101
        (150, 3, 2, ""),  # twice the root of five in 150
        (150, 3, 4, "got 150 held-out ones, on which 3.5 points more"),
    ],
)
def test_a_loss_above_the_budget_is_said_and_one_that_so_few_images_cannot_tell(images, lost, changed, said):
    before = torch.arange(images) < round(0.9 * images)
    after = before.clone()
    after[:lost] = False
    after[lost : lost + changed // 2] = False
    after[images - changed // 2 :] = True
    found = Judge.warnings(SimpleNamespace(before=Reached(1.0, before)), Reached(0.0, after), 0.03)
    assert len(found) == bool(said)
    assert not said or said in found[0]


@pytest.fixture
def trained_pair():
    right = torch.arange(IMAGES) < 180
    judge = SimpleNamespace(before=Reached(1.0, right))
    judge.floor = lambda reached, drop: Judge.floor(judge, reached, drop)
    return judge, Reached(0.0, right.clone()), Reached(0.0, right.roll(4))
