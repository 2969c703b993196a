"""Tables and the heat map."""

import re

import pytest

from bdfast.matrix.heat_map import colours, heat_map
from bdfast.matrix.tables import Spread, markdown, tables


def record(attack="badnets", defense="ft", seed=0, asr=0.5, acc=0.9, before=1.0, **changes):
    return {
        "id": f"{attack}-{defense}-{seed}",
        "split": "tune",
        "network": {"name": "net", "kind": "speck", "options": {}},
        "data": "digits",
        "attack": {"name": attack, "kind": attack, "options": {}},
        "clean": {"name": "5 %", "share": 0.05},
        "defense": {"name": defense, "kind": defense, "options": {}},
        "seed": seed,
        "versions": {"bdfast": "0.1.0", "torch": "2.14"},
        "network_digest": f"{attack}-{seed}",
        "before": {"acc": 0.95, "asr": before},
        "after": {"acc": acc, "asr": asr},
        **changes,
    }


RECORDS = [
    record(seed=0, asr=0.1),
    record(seed=1, asr=0.4, before=0.9, acc=0.96),
    record(defense="none", asr=1.0, acc=0.95),
    record(attack="none", asr=None, before=None, acc=0.94),
    {**record(attack="blended|x", seed=2), "error": {"type": "ValueError", "message": "no"}},
]


def test_markdown_says_how_many_runs_a_number_has():
    text = markdown(RECORDS)
    assert text.startswith("5 runs; seeds: 0, 1, 2. Each number is the mean of n runs")
    assert "Runs that ended in an error: 1." in text
    lines = text.splitlines()
    assert "| network | data | attack | clean | before | ft |" in lines
    assert "| net | digits | badnets | 5 % | 95.0 (90.0 to 100.0, n=2) | 25.0 (10.0 to 40.0, n=2) |" in lines
    assert "| net | digits | none | 5 % | \u2013 | \u2013 |" in lines
    assert "| net | digits | blended\\|x | 5 % | \u2013 | 1 failed |" in lines
    assert "| net | digits | badnets | 5 % | 95.0 (95.0 to 95.0, n=2) | 2.0 (-1.0 to 5.0, n=2) |" in lines
    assert "| net | digits | none | 5 % | 95.0 (n=1) | 1.0 (n=1) |" in lines


def test_other_groups():
    asr, loss = tables(RECORDS, ["split", "seed"])
    assert asr.columns == ("before", "0", "1", "2")
    ((names, spreads),) = asr.rows
    assert names == ("tune",)
    assert spreads[1].values == (10.0, 100.0)
    assert len(loss.rows) == 1


def test_entries_of_one_name_that_differ_are_kept_apart():
    other = record(seed=1, asr=0.7)
    other["defense"] = {**other["defense"], "options": {"lr": 1}}
    asr, _ = tables([RECORDS[0], other])
    assert asr.columns == ("before", "ft", "ft")
    assert [spread.values for spread in asr.rows[0][1][1:]] in ([(10.0,), (70.0,)], [(70.0,), (10.0,)])


def test_a_spread_without_values():
    assert str(Spread()) == "\u2013"
    assert str(Spread((-0.01,), failed=2)) == "0.0 (n=1), 2 failed"


@pytest.mark.parametrize("by", [["attack"], ["attack", "attack"], ["atack", "defense"]])
def test_groups_that_are_none(by):
    with pytest.raises(ValueError, match="by: expected"):
        tables(RECORDS, by)


def test_the_heat_map_is_a_page_of_its_own():
    page = heat_map(RECORDS, title="A <b> title")
    assert "A &lt;b&gt; title" in page
    assert not re.search(r"(src|href)=|<script|@import|url\(", page)
    assert "25.0" in page
    assert "10.0 to 40.0" in page
    assert "ACC \u22122.0 · n=2" in page
    assert "1 failed" in page
    assert page.count("<tr>") == 4


def test_colours_go_from_white_to_vermilion():
    assert colours(0) == "background: rgb(255, 255, 255)"
    assert colours(100) == colours(130) == "background: rgb(232, 120, 46)"


def test_small_text_can_be_read_on_every_colour():
    def luminance(rgb):
        shares = [value / 255 for value in rgb]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = luminance((0x1F, 0x29, 0x33))
    for percent in range(0, 101, 5):
        background = luminance([int(x) for x in re.findall(r"\d+", colours(percent))])
        assert (background + 0.05) / (ink + 0.05) > 4.5
