"""Grid files: what they give, and what is refused with its line."""

import random

import pytest

import bdfast
from bdfast.matrix import GridError, parse_grid, read_grid
from bdfast.matrix.cells import AXES
from bdfast.matrix.images_by_name import DataFacts
from bdfast.matrix.networks import training_of

BLOCK = """
networks: [speck]
data: [digits]
attacks: [badnets, {attack: blended, alpha: 0.1, name: faint}]
clean: [0.05, 0.01, {per_class: 10}]
defenses: [none, ft, {defense: ft, epochs: 3, name: short}]
seeds: [0, 1]
"""


def test_every_combination_is_a_cell():
    grid = parse_grid(BLOCK)
    assert len(grid.cells) == 2 * 3 * 3 * 2
    assert len({cell.id for cell in grid.cells}) == len(grid.cells)
    cell = grid.cells[-1]
    assert [str(getattr(getattr(cell, axis), "name", getattr(cell, axis))) for axis in AXES] == [
        "speck",
        "digits",
        "faint",
        "10 a class",
        "short",
        "1",
    ]
    assert cell.attack.options.items() >= {"target": 0, "poison_rate": 0.1, "alpha": 0.1, "pattern_seed": 0}.items()
    assert str(cell) == "speck | digits | faint | 10 a class | short | seed 1"
    assert cell.id.startswith("speck_digits_blended_10-a-class_ft_1_")


def test_the_same_content_has_the_same_id():
    one = parse_grid(BLOCK).cells
    other = BLOCK.replace("[badnets", "[{attack: badnets, target: 0, poison_rate: 1e-1, name: usual}")
    two = parse_grid(other + "split: confirm").cells
    assert [cell.id for cell in one] == [cell.id for cell in two]
    assert {cell.split for cell in two} == {"confirm"}
    assert {cell.id for cell in one}.isdisjoint(cell.id for cell in parse_grid(BLOCK + "epochs: 2").cells)

    inside = parse_grid(BLOCK.replace("networks: [speck]", "networks: [{arch: speck, epochs: 2}]")).cells
    assert [cell.id for cell in inside] == [cell.id for cell in parse_grid(BLOCK + "epochs: 2").cells]


def test_excluded_cells_are_left_out():
    exclude = "exclude: [{attack: faint, seed: 1}, {defense: [short, none], clean: {per_class: 10}}, {attack: badnets}]"
    cells = parse_grid(BLOCK + exclude).cells
    kept = {(cell.attack.name, cell.clean.name, cell.defense.name, cell.seed) for cell in cells}
    assert kept == {
        *(("faint", clean, defense, 0) for clean in ("5 %", "1 %") for defense in ("none", "ft", "short")),
        ("faint", "10 a class", "ft", 0),
    }
    by_kind = parse_grid(BLOCK + "exclude: [{defense: ft}]").cells
    assert {cell.defense.name for cell in by_kind} == {"none"}


def test_cases_by_hand_beside_a_product():
    text = """
    grids:
      - networks: [speck]
        data: [digits]
        attacks: [badnets]
        clean: [0.05]
        defenses: &all [ft, none]
        seeds: [0]
      - cases:
          - {network: &net {arch: speck, lr: 1e-2}, data: digits, attack: none, clean: 0.01, split: tune}
          - {network: *net, data: digits, attack: {attack: none, trigger: blended}, clean: 0.01}
        split: confirm
        defenses: *all
        seeds: [0, 3]
    """
    cells = parse_grid(text).cells
    assert [cell.split for cell in cells] == [None] * 2 + ["tune"] * 4 + ["confirm"] * 4
    assert cells[2].network.lr == 0.01
    assert [cell.attack.name for cell in cells[2::4]] == ["none", "none, judged by blended"]
    assert cells[2].attack.judge(10) is None
    assert cells[6].attack.attack(10) is None
    assert isinstance(cells[6].attack.judge(10), bdfast.Blended)


def test_all_to_all_is_written_out_once_the_classes_are_known():
    text = BLOCK.replace("[badnets", "[{attack: badnets, targets: all-to-all}, {attack: badnets, targets: [1, 1]}")
    first, second = (parse_grid(text).cells[index].attack for index in (0, 18))
    assert first.name == "badnets targets=all-to-all"
    assert first.attack(4).targets == (1, 2, 3, 0)
    assert second.attack(4).targets == (1, 1)


def test_the_trigger_of_an_attack_is_no_option():
    with pytest.raises(GridError, match=r"attacks\[0\].state: expected a key of .*, got 'state'"):
        parse_grid(BLOCK.replace("[badnets", "[{attack: lf, state: 3}"))


@pytest.mark.parametrize(
    ("given", "normalisation"),
    [
        ("", ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))),
        (", mean: 0.5, std: 1", ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))),
        (", mean: [0, 0.5, 1], std: [1, 2, 3]", ((0.0, 0.5, 1.0), (1.0, 2.0, 3.0))),
    ],
)
def test_normalisation_is_that_of_the_images_or_of_the_network(given, normalisation):
    facts = DataFacts("mine", "", (3, 8, 8), 1, 10, (), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    cell = parse_grid(BLOCK.replace("networks: [speck", f"networks: [{{arch: speck{given}}}", 1)).cells[0]
    spec = training_of(cell, facts).spec
    assert (spec.mean, spec.std) == normalisation


@pytest.mark.parametrize(
    ("key", "line", "message"),
    [
        ("seeds", "sedes: [0]", "small.yaml, line 8, sedes: expected a key of .*, got 'sedes'; did you mean 'seeds'?"),
        ("seeds", "seeds: []", r"line 8, seeds: expected a list with at least one entry, got \[\]"),
        ("seeds", "seeds: 3", "line 8, seeds: expected a list with at least one entry, got 3"),
        ("seeds", "seeds: [0, -1]", r"seeds\[1\]: expected a whole number, 0 or more, got -1"),
        ("seeds", "seeds: [0, 0]", r"seeds\[1\]: expected every entry once, got that of seeds\[0\]"),
        ("seeds", "# none", "line 2: expected seeds, got none"),
        ("epochs", "epochs: 0", "line 2, epochs: expected a whole number of epochs, 1 or more, got 0"),
        ("epochs", "split: [tunes]", "split: expected one of tune, confirm"),
        ("epochs", "split: tunes", "split: expected one of tune, confirm, got 'tunes'; did you mean 'tune'"),
        ("epochs", "epochs: &e {a: *e}", "grid|epochs"),
        ("networks", "networks: [spek]", r"networks\[0\].arch: expected one of .*, got 'spek'; did you mean 'speck'"),
        ("networks", "networks: [7]", r"line 3, networks\[0\]: expected a mapping"),
        ("networks", "networks: [{arch: speck, lr: 0}]", r"\[0\].lr: expected a number above zero, got 0"),
        ("networks", "networks: [{arch: speck, lr: true}]", r"\[0\].lr: expected a number above zero, got True"),
        ("networks", "networks: [{arch: speck, epochs: 1.5}]", r"\[0\].epochs: expected a whole number of epochs"),
        ("networks", "networks: [{arch: speck, width: wide}]", r"\[0\].width: expected a whole number.*, got 'wide'"),
        ("networks", "networks: [{arch: speck, std: 0.5}]", r"\[0\]: expected mean and std together, std above zero"),
        ("networks", "networks: [{arch: speck, mean: 0, std: 0}]", r"std above zero, got \(0.0,\) and \(0.0,\)"),
        ("networks", "networks: [{arch: speck, widht: 3}]", r"\[0\].widht: expected .*; did you mean 'width'"),
        ("networks", "networks: [{arch: speck, num_classes: 3}]", r"\[0\].num_classes: expected a key of"),
        ("networks", "networks: [{arch: speck, name: ''}]", r"\[0\].name: expected a text, got ''"),
        (
            "data",
            "data: [digit]",
            r"data\[0\]: expected one of fashion-mnist, .*, got 'digit'; did you mean 'digits'",
        ),
        ("data", "data: [3]", r"data\[0\]: expected one of fashion-mnist, .*, got 3"),
        (
            "attacks",
            "attacks: [badnet]",
            r"attacks\[0\].attack: expected one of .*, got 'badnet'; did you mean 'badnets'",
        ),
        ("attacks", "attacks: [{target: 3}]", r"attacks\[0\]: expected the name of a method or {attack: NAME, ...}"),
        ("attacks", "attacks: [null]", r"attacks\[0\]: expected the name of a method .*, got None"),
        ("attacks", "attacks: [{attack: badnets, size: big}]", r"size: expected a whole number, got 'big'"),
        ("attacks", "attacks: [{attack: badnets, poison_rate: 2}]", r"attacks\[0\]: poison_rate: expected a fraction"),
        ("attacks", "attacks: [{attack: badnets, alpha: 1}]", r"attacks\[0\].alpha: expected a key of target"),
        ("attacks", "attacks: [{attack: none, target: 1}]", r"attacks\[0\].target: expected a key of trigger"),
        ("attacks", "attacks: [{attack: none, trigger: none}]", r"trigger: expected an attack, got none"),
        ("attacks", "attacks: [badnets, {attack: badnets, target: 0}]", r"got that of attacks\[0\]"),
        (
            "attacks",
            "attacks: [{attack: badnets, name: a}, {attack: blended, name: a}]",
            "expected a name for one attack only, got 'a' for two",
        ),
        (
            "clean",
            "clean: [0]",
            r"clean\[0\]: expected a share of the training images above 0 and at most 0.1, .* got 0",
        ),
        ("clean", "clean: [1.5]", r"clean\[0\]: expected a share .* got 1.5"),
        ("clean", "clean: [0.2]", r"clean\[0\]: expected a share .* at most 0.1, .* got 0.2"),
        ("clean", "clean: [5 %]", r"clean\[0\]: expected a share .* got '5 %'"),
        ("clean", "clean: [{per_class: 0}]", r"per_class: expected a number of images, 1 or more, got 0"),
        ("clean", "clean: [{per_clas: 1}]", r"per_clas: expected a key of per_class"),
        ("defenses", "defenses: [tsdb]", r"defenses\[0\].defense: expected one of .*, got 'tsdb'; did you mean 'tsbd'"),
        (
            "defenses",
            "defenses: [{defense: ft, epoch: 3}]",
            r"\[0\].epoch: expected a key of .*; did you mean 'epochs'",
        ),
        ("defenses", "defenses: [{defense: ft, schedule: flat}]", "schedule: expected one of cosine, constant"),
        ("defenses", "defenses: [{defense: ft, lr: -1}]", r"defenses\[0\]: lr: expected a positive number, got -1"),
        (
            "defenses",
            "defenses: [{defense: ft, batch_size: 0}]",
            "batch_size: expected a whole number, 1 or more, got 0",
        ),
        ("defenses", "defenses: [{defense: ft, amp: maybe}]", "amp: expected true or false, got 'maybe'"),
        ("defenses", "defenses: [{defense: ft, patience: x}]", "patience: expected a whole number or null, got 'x'"),
        (
            "defenses",
            "defenses: [{defense: none, lr: 1}]",
            r"defenses\[0\].lr: expected a mapping|defenses\[0\].lr: expected a key",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(change, key, line, message):
    with pytest.raises(GridError, match=message):
        parse_grid(change(key, line), "small.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "g.yaml: expected a grid, got an empty file"),
        ("[1, 2]", r"g.yaml, line 1: expected a mapping with keys of networks, .*, got \[1, 2\]"),
        ("a: [", "g.yaml: expected YAML, got something else"),
        ("!!python/object/apply:os.getpid []", "g.yaml: expected YAML, got something else"),
        ("when: 2020-13-45", "g.yaml: expected YAML, got something else"),
        ("seeds: [0]\nseeds: [1]", "g.yaml, line 2: expected every key once, got 'seeds' again"),
        ("grids: []", "g.yaml, line 1, grids: expected a list"),
        ("grids: [1]\nseeds: [0]", "line 2, seeds: expected a key of grids"),
        ("cases: [{network: speck}]\ndefenses: [ft]\nseeds: [0]", r"line 1, cases\[0\]: expected data, got none"),
        ("cases: [{network: speck}]\nclean: [0.1]", "line 2, clean: expected a key of cases"),
    ],
)
def test_what_is_no_grid(text, message):
    with pytest.raises(GridError, match=message):
        parse_grid(text, "g.yaml")


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("{atack: badnets}", r"exclude\[0\].atack: expected a key of network, .*; did you mean 'attack'"),
        ("{attack: badnet}", r"exclude\[0\].attack: expected one of badnets, .*, got 'badnet'; did you mean"),
        ("{}", r"exclude\[0\]: expected keys of"),
        ("{seed: [0, 1]}", r"exclude: expected some cells to be left, got none"),
        ("{seed: 0}, {seed: 0}", r"exclude\[1\].seed: expected one of 1, got '0'"),
        ("{seed: 0, clean: 0.01}, {seed: 0, clean: 0.01}", r"exclude\[1\]: expected an entry that matches some"),
    ],
)
def test_exclusions_that_are_wrong(exclude, message):
    with pytest.raises(GridError, match=message):
        parse_grid(f"{BLOCK}exclude: [{exclude}]")


def test_a_cell_of_two_blocks_is_refused():
    block = "{networks: [speck], data: [digits], attacks: [badnets], clean: [0.05], defenses: [ft], seeds: [%s]}"
    text = f"grids:\n- {block % '0, 1'}\n- {block % '1'}"
    with pytest.raises(GridError, match=r"line 3, grids\[1\]: expected every cell once, got \(speck \| digits"):
        parse_grid(text)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="grid: expected a YAML file, found no"):
        read_grid(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe4")
    with pytest.raises(GridError, match=r"latin\.yaml: expected text in UTF-8"):
        read_grid(tmp_path / "latin.yaml")


def test_damaged_texts_end_in_one_kind_of_error(small):
    """Whatever a slip of the keyboard makes of a grid, it is a grid or a GridError."""
    chances = random.Random(0)
    for _ in range(300):
        letters = list(BLOCK)
        for _ in range(chances.randrange(1, 4)):
            letters[chances.randrange(len(letters))] = chances.choice("[]{}:, -\n0a&*!")
        try:
            parse_grid("".join(letters))
        except GridError:
            continue
