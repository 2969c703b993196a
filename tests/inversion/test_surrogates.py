"""The search for the easiest class, and surrogate triggers, on a network whose trigger is known."""

import pytest
import torch
from corner_networks import CLASSES, Corner, Shift, columns
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.inversion.least_length import GAP, _scatters, least_lengths
from bdfast.inversion.scene import ALL_TO_ALL, Scene, gathered, losses_towards, scene_of
from bdfast.inversion.surrogates import Surrogate, find_surrogates
from bdfast.inversion.universal import START, followed, lead
from bdfast.training import Run


def batches(data: TensorDataset) -> Batches:
    return Batches(data, device="cpu", batch_size=64)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("target", [0, 5])
def test_the_target_label_is_the_only_suspect(target):
    with scene_of(Corner(target, 8.0), batches(columns()), Run()) as scene:
        found = least_lengths(scene, draws())
    assert found.suspects == [target]
    assert found.lengths.argmin() == target
    assert found.lengths.shape == (CLASSES,)
    assert found.away == torch.inf


def test_networks_that_follow_short_changes_are_searched_below_the_first_length():
    """There, all classes that are reached would look alike."""

    class Two(Corner):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            lit = images[:, 0, 6:, :2].mean((1, 2))
            return super().forward(images) + self.scale * 130 * lit[:, None] * nn.functional.one_hot(torch.tensor(5), 8)

    with scene_of(Two(3, 400.0), batches(columns()), Run()) as scene:
        found = least_lengths(scene, draws())
    assert float(found.lengths[3]) < START / 2
    assert found.suspects == [3]


def test_of_a_known_target_only_its_length_is_looked_for():
    with scene_of(Corner(3, 8.0), batches(columns()), Run()) as scene:
        found = find_surrogates(scene, draws(), targets=[6])
    assert found.targets == [6]
    assert found.lengths.lengths.isfinite().nonzero().flatten().tolist() == [6]


def test_a_clean_network_has_no_suspect():
    with scene_of(Corner(0, 0.0), batches(columns()), Run()) as scene:
        found = least_lengths(scene, draws())
    assert found.suspects == []
    assert found.gap == 1
    assert found.lengths.isfinite().all()
    assert found.away == torch.inf


def test_a_trigger_with_a_target_for_each_label_leads_away_from_all():
    with scene_of(Shift(0, 30.0), batches(columns()), Run()) as scene:
        found = find_surrogates(scene, draws())
        assert (found.targets, found.clear) == ([ALL_TO_ALL], True)
        assert found.lengths.away * GAP <= float(found.lengths.lengths.min())
        assert found.lengths.all()[ALL_TO_ALL] == found.lengths.usable([ALL_TO_ALL]) == found.lengths.away
        before = found.residual_in(scene)
    assert before > 0.8
    with scene_of(Shift(0, 0.0), batches(columns()), Run()) as scene:
        assert found.residual_in(scene) < 0.2


def test_anyone_may_ask_for_them():
    found = bdfast.surrogates(Corner(3, 8.0), columns())
    again = bdfast.surrogates(Corner(3, 8.0), DataLoader(columns(), batch_size=256, shuffle=True))
    assert found.targets == again.targets == [3]
    torch.testing.assert_close(found.lengths.lengths, again.lengths.lengths)
    assert found.residual(Corner(3, 8.0), columns()) > 0.9
    assert found.residual(Corner(3, 0.0), columns(), batch_size=7) < 0.2
    assert bdfast.surrogates(Corner(3, 8.0), columns(), target=6).targets == [6]
    for target in (-1, 8):
        with pytest.raises(ValueError, match=rf"target: expected a class in 0\.\.7, got {target}; leave it out"):
            bdfast.surrogates(Corner(3, 8.0), columns(), target=target)
    with pytest.raises(ValueError, match="images: "):
        found.residual(Corner(3, 8.0), [{"x": torch.zeros(1, 8, 8), "y": 0}])


def test_a_change_that_leads_to_few_labels_is_no_all_to_all_trigger():
    """Where many classes are near each other it is short, too."""

    class Few(Shift):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            lit = images[:, 0, 6:, 6:].mean((1, 2)).square()
            first = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
            return self.scale * (images[:, 0, :6].mean(1) + self.strength * lit[:, None] * first)

    for network, found in ((Few(0, 30.0), False), (Shift(0, 30.0), True)):
        with scene_of(network, batches(columns()), Run()) as scene:
            change = torch.zeros(1, 8, 8)
            change[:, 6:, 6:] = 0.9
            assert _scatters(scene, change, draws()) == found


def test_images_that_the_network_gets_wrong_are_no_all_to_all_trigger():
    images, labels = columns(960).tensors
    wrong = torch.arange(len(labels)) % 12 > 0
    data = TensorDataset(images, torch.where(wrong, (labels + 3) % CLASSES, labels))
    for network, all_to_all in ((Corner(0, 0.0), False), (Shift(0, 30.0), True)):
        with scene_of(network, batches(data), Run()) as scene:
            assert (least_lengths(scene, draws()).away < torch.inf) == all_to_all


def test_where_all_classes_are_asked_for_all_to_all_is_not():
    with scene_of(Shift(0, 30.0), batches(columns()), Run()) as scene:
        assert least_lengths(scene, draws(), among=[2]).away == torch.inf


def test_a_loss_towards_a_class_and_away_from_the_own():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0], [1.0, 4.0, 2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    away = losses_towards(logits, torch.full((3,), ALL_TO_ALL), labels)
    assert away.tolist() == [1.0, 0.0, 2.0]  # 2 - 1; gone already; 4 - 2
    towards = losses_towards(logits, torch.tensor([2, ALL_TO_ALL, 0]), labels)
    assert towards.tolist() == [-float(logits[0].log_softmax(0)[2]), 0.0, -float(logits[2].log_softmax(0)[0])]
    assert losses_towards(logits[:1], torch.tensor([1]), torch.tensor([-100])).isfinite().all()  # a label that is none


def test_values_of_the_images_do_not_matter():
    """Lengths are shares of the range: images in [-1, 1] give what those in [0, 1] give."""

    class Shifted(Corner):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward((images + 1) / 2)

    with scene_of(Corner(3, 8.0), batches(columns()), Run(amp=False)) as scene:
        expected = least_lengths(scene, draws())
    with scene_of(Shifted(3, 8.0), batches(columns(low=-1, span=2)), Run(amp=False)) as scene:
        found = least_lengths(scene, draws())
    torch.testing.assert_close(found.lengths, expected.lengths)


def test_changes_stay_within_their_lengths():
    targets, lengths = torch.tensor([1, 4]), torch.tensor([0.05, 0.2])
    with scene_of(Corner(3, 8.0), batches(columns()), Run()) as scene:
        changes = lead(scene, targets, torch.randn(2, 1, 8, 8, generator=draws()), lengths, draws())
        longer = lead(scene, targets, changes, 4 * lengths, draws())
        order = scene.drawn(draws(), judge=True)
        assert (followed(scene, targets, longer, order) >= followed(scene, targets, changes, order)).all()
    norms = changes.flatten(1).square().mean(1).sqrt()
    assert (norms <= lengths * scene.span + 1e-6).all()


def test_triggers_are_judged_on_other_images_than_they_are_fitted_on():
    with scene_of(Corner(3, 8.0), batches(columns()), Run()) as scene:
        fitted, judged = scene.drawn(draws()).tolist(), scene.drawn(draws(), judge=True).tolist()
    assert not set(fitted) & set(judged)
    assert len(fitted) + len(judged) == len(scene.images)


def test_the_residual_follows_the_backdoor():
    with scene_of(Corner(3, 8.0), batches(columns()), Run()) as scene:
        found = find_surrogates(scene, draws())
        assert found.targets == [3]
        assert {trigger.kind for trigger in found.triggers} == {"dense 1", "dense 1.5", "patch"}
        before = found.residual_in(scene)
    assert before > 0.9
    residuals = []
    for strength in (4.0, 1.0, 0.0):
        with scene_of(Corner(3, strength), batches(columns()), Run()) as scene:
            residuals.append(found.residual_in(scene))
    assert before >= residuals[0] >= residuals[1] >= residuals[2]
    assert residuals[2] < 0.2


def test_without_images_of_other_classes_there_is_no_rate():
    data = columns()
    images, labels = data.tensors
    with scene_of(Corner(3, 8.0), batches(data), Run()) as scene:
        found = find_surrogates(scene, draws(), targets=[3])
    with scene_of(Corner(3, 8.0), batches(TensorDataset(images[labels == 3], labels[labels == 3])), Run()) as scene:
        assert all(rate != rate for rate in found.rates(scene))
        assert found.residual_in(scene) == 0


def test_triggers_keep_images_within_the_limits():
    images = torch.rand(4, 3, 5, 5)
    dense = Surrogate(0, torch.full((3, 5, 5), 0.7), None, (0.0, 1.0), "dense")
    patch = Surrogate(0, torch.ones(3, 5, 5), torch.eye(5)[None], (0.0, 1.0), "patch")
    assert dense(images).max() == 1
    assert torch.equal(patch(images)[..., 2, 2], torch.ones(4, 3))
    assert torch.equal(patch(images)[..., 0, 1], images[..., 0, 1])


def test_the_network_is_left_as_it_was():
    network = Corner(3, 8.0).train()
    with scene_of(network, batches(columns()), Run()) as scene:
        assert not network.training
        find_surrogates(scene, draws(), targets=[1])
    assert network.training
    assert network.scale.requires_grad
    assert network.scale.grad is None


def test_other_batches_are_refused():
    rows = [{"x": torch.zeros(1, 8, 8), "y": 0}]
    with pytest.raises(ValueError, match=r"clean: expected batches of \(images \[B, C, H, W\], labels\), got dict"):
        gathered(Batches(rows, device="cpu"), 10)


def test_only_so_many_images_are_gathered():
    images, labels, limits = gathered(batches(columns()), 100)
    assert len(images) == len(labels) == 128  # whole batches
    assert limits == (0.0, 1.0)


def test_empty_answers():
    scene = Scene(lambda x: x.flatten(1), torch.zeros(2, 4, 1, 1), torch.zeros(2), 4, (0.0, 1.0), 8)
    assert scene.answers(lambda x: x, torch.arange(0)).shape == (0, 4)
