"""`bdfast matrix` at the command line; what it computes is tested in tests/matrix."""

import pytest

from bdfast.cli import main

GRID = """
epochs: 1
networks: [{arch: preact_resnet18, width: 2}]
data: [digits]
attacks: [badnets]
clean: [0.02]
defenses: [none, {defense: ft, epochs: 1, lr: 0.01, momentum: %s}]
seeds: [0]
"""


def test_run_and_show(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(GRID % 0.5)
    output = str(tmp_path / "out")
    main(["matrix", "run", str(tmp_path / "grid.yaml"), "--output", output])
    assert "2 cells measured, 0 failed, 0 had a record" in capsys.readouterr().err
    main(["matrix", "run", str(tmp_path / "grid.yaml"), "--output", output, "--quiet"])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    main(["matrix", "show", output])
    assert "### Attack success rate" in capsys.readouterr().out
    main(
        [
            "matrix",
            "show",
            output,
            "--by",
            "attack,defense",
            "--html",
            f"{output}/a.html",
            "--markdown",
            f"{output}/a.md",
        ]
    )
    assert capsys.readouterr().out == ""
    assert "<table>" in (tmp_path / "out" / "a.html").read_text()
    assert "| attack | before | ft epochs=1 lr=0.01 momentum=0.5 |" in (tmp_path / "out" / "a.md").read_text()


def test_cells_that_fail_are_told_at_the_end(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("conv1.weight: NaN.")

    monkeypatch.setattr("bdfast.matrix.measuring.purify", fail)
    (tmp_path / "grid.yaml").write_text(GRID % 0.5)
    with pytest.raises(SystemExit) as stopped:
        main(["matrix", "run", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out"), "--quiet"])
    assert stopped.value.code == 2
    assert "1 cells failed, the first with FloatingPointError: conv1.weight: NaN." in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bdfast.matrix.measuring.purify", interrupt)
    (tmp_path / "grid.yaml").write_text(GRID % 0.5)
    with pytest.raises(SystemExit) as stopped:
        main(["matrix", "run", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out"), "--quiet"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nbdfast matrix: interrupted\n"
    assert len(list((tmp_path / "out" / "records").iterdir())) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help(arguments, capsys):
    main(["matrix", *arguments])
    assert "usage: bdfast matrix run GRID --output DIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "expected one of run, show, got 'rum'; did you mean 'run'?"),
        (["run", "no.yaml", "--output", "out"], "grid: expected a YAML file, found no no.yaml"),
        (["show", "nowhere"], "records: expected the output folder of bdfast matrix run, found no records in nowhere"),
    ],
)
def test_wrong_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["matrix", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_grid_is_one_line(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(GRID % 1.5)
    with pytest.raises(SystemExit):
        main(["matrix", "run", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.startswith(
        "bdfast matrix: grid.yaml, line 7, defenses[1]: momentum: expected a share in [0, 1], got 1.5"
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
