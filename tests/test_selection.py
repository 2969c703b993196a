import pytest

from bdfast.selection import strongest_within

LADDER = (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)


@pytest.mark.parametrize("breaks_at", [*LADDER[1:], 2.0])
def test_finds_the_last_setting_within_the_budget(breaks_at):
    def probe(strength):
        return 0.9 if strength < breaks_at else 0.5

    choice = strongest_within(LADDER, probe, max_accuracy_drop=0.02)
    assert choice.strength == [strength for strength in LADDER if strength < breaks_at][-1]
    assert choice.probes == {strength: probe(strength) for strength in choice.probes}
    assert len(choice.probes) <= 4
    assert choice.floor == pytest.approx(0.88)


def test_exactly_on_the_budget_is_within_it():
    assert strongest_within([0.1, 0.2], {0.1: 1.0, 0.2: 0.75}.get, max_accuracy_drop=0.25).strength == 0.2


def test_where_every_other_setting_costs_too_much_the_weakest_is_taken():
    assert strongest_within(LADDER, lambda n: 1 - n, max_accuracy_drop=0.01).strength == 0.05
