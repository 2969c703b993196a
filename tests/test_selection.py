import pytest

from bdfast.selection import strongest_within

LADDER = (0.05, 0.1, 0.2, 0.3, 0.5, 0.9)


@pytest.mark.parametrize("breaks_at", [*LADDER, 2.0])
def test_finds_the_last_setting_within_the_budget(breaks_at):
    probed = []

    def probe(strength):
        probed.append(strength)
        return 0.9 if strength < breaks_at else 0.5

    choice = strongest_within(LADDER, probe, baseline=0.91, max_accuracy_drop=0.02)
    within = [strength for strength in LADDER if strength < breaks_at]
    assert choice.strength == (within[-1] if within else LADDER[0])
    assert choice.probes == {strength: probe(strength) for strength in choice.probes}
    assert len(choice.probes) <= 3
    assert choice.floor == pytest.approx(0.89)


def test_exactly_on_the_budget_is_within_it():
    assert strongest_within([0.1, 0.2], lambda _: 0.75, baseline=1.0, max_accuracy_drop=0.25).strength == 0.2
