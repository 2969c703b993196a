"""`detect`: thresholds, black boxes, arguments that are wrong, and that the network stays as it was."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from corner_networks import CLASSES, Corner, columns
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.detectors import METHODS, BlackBox, Calibration, Detector, Finding


@dataclass(frozen=True)
class Lit(Detector):
    """How much the answer to the first label depends on a lit corner."""

    paper: ClassVar[str] = "nowhere"
    scored_by: ClassVar[str] = "logit"
    published_threshold: ClassVar[float | None] = 10.0

    factor: float = 1.0

    def run(self, model, clean, run):
        assert not model.training
        images = torch.zeros(1, 1, 8, 8)
        images[..., 6:, 6:] = 1
        logits = run.forward(model, (images, torch.zeros(1, dtype=torch.long)))[0].detach()
        return Finding(self.factor * float(logits.max()), (int(logits.argmax()),), {"logit": logits[0].tolist()})


@dataclass(frozen=True)
class Asking(BlackBox):
    """The same from probabilities alone."""

    scored_by: ClassVar[str] = "probability"
    published_threshold: ClassVar[float | None] = 0.9

    def query(self, predict, clean, run):
        images = torch.zeros(2, 1, 8, 8)
        images[1, 0, 6:, 6:] = 1
        answer = predict(images)
        return Finding(float(answer[1].max()), (int(answer[1].argmax()),))


@pytest.fixture
def lit(monkeypatch):
    monkeypatch.setitem(METHODS, "lit", Lit)
    monkeypatch.setitem(METHODS, "asking", Asking)


def calibrated(scores, **options):
    return Calibration("lit", {"factor": 1.0, **options}, tuple(scores), "twenty of ours")


def test_a_score_above_the_published_threshold_is_suspicious(lit):
    found = bdfast.detect(Corner(3, 8.0), columns(), method="lit", seed=5)
    assert found.suspicious
    assert found.targets == (3,)
    assert (found.threshold, found.threshold_from, found.false_alarms) == (10.0, "published: nowhere", None)
    assert found.options == {"factor": 1.0, "seed": 5}
    assert len(found.evidence["logit"]) == CLASSES
    assert str(found) == "suspicious: target label 3; score 160, above 10"
    assert not bdfast.detect(Corner(3, 0.0), columns(), method="lit").suspicious


def test_a_calibration_gives_the_threshold_and_the_false_alarms(lit):
    found = bdfast.detect(Corner(3, 8.0), columns(), method="lit", calibration=calibrated(range(100)), false_alarms=0.1)
    assert found.threshold == 90
    assert (found.false_alarms.accused, found.false_alarms.clean) == (9, 100)
    assert found.threshold_from == "at most 0.1 of clean networks above it, by 100 (twenty of ours)"
    assert str(found.false_alarms).startswith("9 of 100 clean networks accused, 95 % interval 4.2% to 16.4%")
    given = bdfast.detect(Corner(3, 8.0), columns(), method="lit", calibration=calibrated(range(100)), threshold=200)
    assert (given.suspicious, given.threshold_from, given.false_alarms.accused) == (False, "given", 0)


def test_scores_of_other_options_are_no_calibration(lit):
    with pytest.raises(ValueError, match=r"calibration: expected one of lit with \{'factor': 2"):
        bdfast.detect(Corner(3, 8.0), columns(), method="lit", factor=2, calibration=calibrated(range(100)))


def test_without_any_threshold_the_error_says_where_to_get_one(lit, monkeypatch):
    monkeypatch.setattr(Lit, "published_threshold", None)
    with pytest.raises(ValueError, match=r"threshold: expected one for lit with .* pass threshold="):
        bdfast.detect(Corner(3, 8.0), columns(), method="lit")


def test_networks_of_the_user_calibrate(lit):
    networks = (Corner(target, 0.1 * target) for target in range(3))
    found = bdfast.detectors.calibrate(networks, columns(), method="lit", described="three")
    assert found.scores == pytest.approx((0.0, 2.0, 4.0))
    assert (found.method, found.options, found.networks) == ("lit", {"factor": 1.0}, "three")
    with pytest.raises(ValueError, match="networks: expected clean networks, got none"):
        bdfast.detectors.calibrate([], columns(), method="lit")


def test_a_function_will_do_for_a_black_box(lit):
    network = Corner(5, 8.0)

    def answers(images):
        with torch.inference_mode():
            return network(images).softmax(1)

    inside = bdfast.detect(network, columns(), method="asking", amp=False)
    outside = bdfast.detect(answers, columns(), method="asking")
    assert inside.targets == outside.targets == (5,)
    assert inside.score == pytest.approx(outside.score, abs=1e-6)
    with pytest.raises(ValueError, match=r"model: expected a network for lit, which looks inside, got function"):
        bdfast.detect(answers, columns(), method="lit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "surogate"}, r"method: expected one of .*; did you mean 'surrogate'\?"),
        ({"method": "lit", "facter": 1}, r"facter: expected an option of lit \(factor\).*did you mean 'factor'"),
        ({"method": Lit(), "factor": 1}, r"method: expected its options inside Lit\(...\)"),
        ({"method": "lit", "clean": TensorDataset(torch.zeros(3, 1, 8, 8))}, "clean"),
    ],
)
def test_what_is_wrong_is_named(lit, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bdfast.detect(Corner(3, 8.0), **{"clean": columns(), **changes})


@pytest.mark.parametrize("method", [Lit, Batches, 3])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(TypeError, match=r"method: expected a name or a bdfast.detectors.base.Detector, got "):
        bdfast.detect(Corner(3, 8.0), columns(), method=method)
    with pytest.raises(TypeError, match=r"method: expected a name or a bdfast.defenses.base.Defense, got "):
        bdfast.purify(Corner(3, 8.0), columns(), method=method)
    with pytest.raises(TypeError, match=r"method: expected a name or a bdfast.suppression.base.Suppression, got "):
        bdfast.suppress(Corner(3, 8.0), columns(), method=method)


def test_a_calibration_from_a_file_fits_options_that_are_tuples(lit, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Several(Lit):
        classes: tuple[int, ...] = (1, 2)

    monkeypatch.setitem(METHODS, "several", Several)
    networks = [Corner(3, 0.0) for _ in range(20)]
    bdfast.detectors.calibrate(networks, columns(), method="several", classes=(0, 3)).save(tmp_path / "mine.json")
    read = Calibration.load(tmp_path / "mine.json")
    assert bdfast.detect(Corner(3, 8.0), columns(), method="several", classes=(0, 3), calibration=read).suspicious
    assert bdfast.detect(Corner(3, 8.0), columns(), method="several", classes=[0, 3], calibration=read).suspicious


def test_the_share_of_false_alarms_is_always_checked(lit):
    with pytest.raises(ValueError, match=r"false_alarms: expected a share in \(0, 1\), got 5"):
        bdfast.detect(Corner(3, 8.0), columns(), method="lit", false_alarms=5)


def test_the_network_is_left_as_it_was(lit, monkeypatch):
    network = Corner(3, 8.0).train()
    network.scale.requires_grad_(False)
    state = torch.get_rng_state()
    bdfast.detect(network, columns(), method="lit")
    monkeypatch.setattr(Lit, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bdfast.detect(network, columns(), method="lit")
    assert network.training
    assert not network.scale.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_a_result_can_be_kept(lit, tmp_path):
    found = bdfast.detect(Corner(3, 8.0), columns(), method="surrogate", threshold=0.2)
    found.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detection.json", "trigger.png"]
    picture = found.picture()
    assert picture.shape == (1, 8, 8)
    assert 0 <= picture.min() <= picture.max() <= 1
    bdfast.detect(Corner(3, 8.0), columns(), method="lit").save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detection.json"]


def test_a_detector_of_the_users_own_is_known_everywhere():
    before = dict(METHODS)
    try:
        bdfast.register("detect", "mine")(Lit)
        assert bdfast.detect(Corner(3, 8.0), columns(), method="mine").suspicious
        assert "mine" in [method.name for method in bdfast.list_methods("detect")]
    finally:
        METHODS.clear()
        METHODS.update(before)


def test_no_parameter_takes_triggered_or_test_data():
    import inspect

    names = {name for function in (bdfast.detect, Batches.__init__) for name in inspect.signature(function).parameters}
    assert not {name for name in names if "trigger" in name or "test" in name}
