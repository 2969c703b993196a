"""Runs of a grid: records, networks that are trained once, errors, and a second run."""

import fcntl
import json
from dataclasses import dataclass, replace

import pytest
import torch

import bdfast
from bdfast.attacks import PreparedAttack
from bdfast.defenses import Outcome
from bdfast.io.checkpoints import read_description
from bdfast.matrix import check_grid, measuring, networks, parse_grid, read_records, run_grid
from bdfast.matrix.networks import NetworkStore, training_of
from bdfast.models import ModelSpec


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_records_have_all_that_one_has_to_know(small, tmp_path):
    summary = run_grid(small, tmp_path, threads=1)
    assert (summary.measured, summary.failed, summary.skipped) == (8, 0, 0)
    assert names(tmp_path) == [".lock", "networks", "records"]
    records = read_records(tmp_path)
    assert {record["id"] for record in records} == {cell.id for cell in small.cells}
    record = next(x for x in records if x["attack"]["kind"] == "badnets" and x["defense"]["kind"] == "ft")
    assert record["attack"]["options"].items() >= {"target": 3, "poison_rate": 0.1, "size": 3, "margin": 0}.items()
    assert record["network"]["lr"] == 0.02
    assert (record["epochs"], record["data"], record["seed"]) == (1, "digits", 0)
    assert record["defense"]["options"]["epochs"] == record["options"]["epochs"] == 1
    assert record["defense"]["settings"] == {"amp": False}
    assert record["precision"] == "as the weights"
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["processor"]
    assert record["machine"]["threads"] == 1
    assert record["updates"] == 1  # one epoch of at most 150 images
    assert record["seconds"]["training"] > 0
    assert record["seconds"]["purifying"] > 0
    assert record["peak_memory_mib"] > 50
    assert record["verdict"] is None
    assert set(record["before"]) == set(record["after"]) == {"acc", "asr", "ra"}
    assert 0 <= record["der"] <= 1
    sizes = {record["clean"]["name"]: record["clean_images"] for record in records}
    assert sizes == {"10 %": 150, "5 a class": 50}
    # One that never saw a trigger is judged with one all the same.
    clean = [record for record in records if record["attack"]["kind"] == "none"]
    assert all(record["before"]["asr"] is not None for record in clean)
    assert len({record["network_digest"] for record in clean}) == 1


def test_a_defense_that_needs_no_images_gets_none(change, tmp_path):
    lines = change("defenses", "defenses: [none, {defense: clp, u: 1}]").replace(
        "clean: [0.1, {per_class: 5}]", "clean: [none]"
    )
    summary = run_grid(parse_grid(lines), tmp_path, threads=1)
    assert (summary.measured, summary.failed) == (4, 0)
    record = next(x for x in read_records(tmp_path) if x["defense"]["kind"] == "clp")
    assert (record["clean"], record["clean_images"]) == ({"name": "none", "share": 0.0}, 0)
    assert record["options"]["u"] == 1
    assert record["verdict"] is None


def test_the_figures_are_those_of_a_purification_by_hand(small, tmp_path):
    run_grid(replace(small, cells=small.cells[:2]), tmp_path, threads=1)
    record = next(record for record in read_records(tmp_path) if record["defense"]["kind"] == "ft")
    path = tmp_path / "networks" / f"{record['network_digest']}.safetensors"
    spec = ModelSpec.from_json(read_description(path))
    assert (spec.arch, spec.num_classes, spec.in_channels) == ("speck", 10, 1)
    model = bdfast.io.load_into(spec.build(), path)
    source = bdfast.data.sources.digits_source()
    clean = source.train.subset(networks.order(1500, 0)[1])
    triggered = bdfast.Triggered(source.test, bdfast.BadNets(target=3))
    result = bdfast.purify(model, clean, method="ft", epochs=1, lr=0.02, amp=False)
    before = bdfast.evaluate(model, source.test, triggered)
    after = bdfast.evaluate(result.model, source.test, triggered, baseline=before)
    assert (record["before"]["acc"], record["before"]["asr"]) == (before.acc, before.asr)
    assert (record["after"]["acc"], record["after"]["asr"], record["der"]) == (after.acc, after.asr, after.der)


def test_a_network_is_trained_once_and_known_by_its_content(small, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(networks, "_planted", lambda *a, f=networks._planted: trained.append(a[0].attack.name) or f(*a))
    run_grid(replace(small, cells=small.cells[:1]), tmp_path)
    assert trained == ["badnets target=3"]
    run_grid(small, tmp_path)
    assert trained == ["badnets target=3", "none, judged by badnets"]
    # Another trigger to judge with, another name and another defense need no other network; another rate does.
    text = """
    epochs: 1
    networks: [{arch: speck, lr: 0.02, name: mine}]
    data: [digits]
    attacks: [none, {attack: none, trigger: blended}, {attack: badnets, target: 3, name: three}]
    clean: [0.02]
    defenses: [none]
    seeds: [0]
    """
    run_grid(parse_grid(text), tmp_path)
    assert len(trained) == 2
    run_grid(parse_grid(text.replace("0.02, name", "0.03, name").replace("[none, ", "[none] # ")), tmp_path)
    assert trained[2:] == ["none"]
    alone = [record for record in read_records(tmp_path) if record["attack"]["name"] == "none"]
    assert all(record["after"]["asr"] is None and record["der"] is None for record in alone)


def register_frail():
    @bdfast.register("purify", "frail")
    @dataclass(frozen=True)
    class Frail(bdfast.defenses.Defense):
        """Fails.

        Attributes:
            strong: Does not.
        """

        strong: bool = False

        def run(self, model, clean, run):
            if not self.strong and not RELIEVED:
                raise ArithmeticError("no more")
            return Outcome(found={"target": 3})

    return Frail


RELIEVED: list[bool] = []


def test_a_cell_that_fails_does_not_stop_the_others(change, tmp_path):
    register_frail()
    grid = parse_grid(change("defenses", "defenses: [frail, {defense: frail, strong: true}]"))
    summary = run_grid(grid, tmp_path)
    assert (summary.measured, summary.failed) == (4, 4)
    records = read_records(tmp_path)
    failed = [record for record in records if "error" in record]
    assert len(records) == 8
    assert {record["defense"]["options"]["strong"] for record in failed} == {False}
    error = failed[0]["error"]
    assert (error["type"], error["message"], error["during"]) == ("ArithmeticError", "no more", "purifying")
    assert "in run" in error["traceback"]
    assert failed[0]["attack"]
    assert "work" not in names(tmp_path)
    assert next(record for record in records if "error" not in record)["found"] == {"target": 3}

    assert run_grid(grid, tmp_path).skipped == 8
    RELIEVED.append(True)
    try:
        summary = run_grid(grid, tmp_path, retry=True)
    finally:
        RELIEVED.clear()
    assert (summary.measured, summary.failed, summary.skipped) == (4, 0, 4)
    assert not [record for record in read_records(tmp_path) if "error" in record]


def test_a_network_that_cannot_be_trained_fails_its_cells_only(small, tmp_path, monkeypatch):
    def planted(training, *rest, f=networks._planted):
        if training.attack.kind == "badnets":
            raise FloatingPointError("conv1.weight: NaN")
        return f(training, *rest)

    monkeypatch.setattr(networks, "_planted", planted)
    summary = run_grid(small, tmp_path)
    assert (summary.measured, summary.failed) == (4, 4)
    errors = [record["error"] for record in read_records(tmp_path) if "error" in record]
    assert {(error["type"], error["during"]) for error in errors} == {("FloatingPointError", "training")}


def test_a_second_run_measures_what_is_missing(small, tmp_path, monkeypatch, comparable):
    run_grid(small, tmp_path)
    expected = comparable(tmp_path)
    gone = sorted((tmp_path / "records").iterdir())[2]
    gone.unlink()
    half = tmp_path / "records" / f".{gone.name}.{'0' * 32}"
    half.write_text("{")
    (tmp_path / "work" / expected[0]["id"]).mkdir(parents=True)
    measured = []
    monkeypatch.setattr(
        measuring.Workshop,
        "measure",
        lambda own, cell, f=measuring.Workshop.measure: measured.append(cell.id) or f(own, cell),
    )
    assert run_grid(small, tmp_path).skipped == 7
    assert measured == [gone.stem]
    assert comparable(tmp_path) == expected
    assert names(tmp_path) == [".lock", "networks", "records"]
    assert not half.exists()


def test_a_cell_goes_on_from_its_checkpoints(small, tmp_path, monkeypatch, comparable):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    grid = replace(small, cells=small.cells[1:2])
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "write_record", stop)
        with pytest.raises(Stop):
            run_grid(grid, tmp_path)
    (work,) = (tmp_path / "work").iterdir()
    assert list(work.iterdir())
    run_grid(grid, tmp_path)
    run_grid(grid, tmp_path / "other")
    assert comparable(tmp_path) == comparable(tmp_path / "other")


def test_warnings_of_a_cell_are_in_its_record(small, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "fit", lambda model, *_, **__: None)  # a network at chance
    monkeypatch.setattr("bdfast.scenario.fit", lambda model, *_, **__: None)
    run_grid(replace(small, cells=small.cells[:2]), tmp_path)
    none, ft = sorted(read_records(tmp_path), key=lambda record: record["defense"]["kind"] == "ft")
    assert none["warnings"] == []
    assert len(ft["warnings"]) == 1
    assert "better than chance" in ft["warnings"][0]


def test_one_run_at_a_time(small, tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="output: expected a folder for this run alone"):
            run_grid(small, tmp_path)


@pytest.mark.parametrize("given", [{"workers": 0}, {"threads": 0}])
def test_numbers_above_zero(small, tmp_path, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}: expected 1 or more, got 0"):
        run_grid(small, tmp_path, **given)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "id": "x"}', '{"format": 1}'])
def test_what_is_no_record_is_named(small, tmp_path, content):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"records: expected .* in .*x.json"):
        run_grid(small, tmp_path)


def test_an_attack_may_need_a_clean_network_first(change, tmp_path):
    @bdfast.register("poison", "made")
    @dataclass(frozen=True)
    class Made(PreparedAttack):
        """Its trigger is a pattern that it takes from a network."""

        def prepare(self, network, data, *, seed=0):
            assert len(data) == 1350
            return {"pattern": next(network.parameters()).detach().abs().mean().clamp(0, 1)}

        def __call__(self, images):
            return images.lerp(self.found("pattern").expand_as(images), 0.5)

    grid = parse_grid(change("attacks", "attacks: [made]"))
    assert run_grid(grid, tmp_path).measured == 4
    files = names(tmp_path / "networks")
    assert len([name for name in files if name.endswith(".json")]) == 2  # its own, and the clean one
    assert len([name for name in files if name.endswith(".trigger.safetensors")]) == 1
    facts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "networks").glob("*.json")}
    assert sorted(entry["attack"]["kind"] for entry in facts.values()) == ["made", "none"]
    (record, *_) = read_records(tmp_path)
    assert record["before"]["asr"] is not None
    store = NetworkStore(tmp_path / "networks")
    assert store.has(record["network_digest"])
    assert training_of(grid.cells[0], check_grid(grid)["digits"]).digest == record["network_digest"]
