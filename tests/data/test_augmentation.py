import pytest
import torch

from bdfast.data.augmentation import Augmentation, overlaid


def test_every_image_is_a_shifted_or_mirrored_copy():
    torch.manual_seed(0)
    image = torch.rand(1, 2, 5, 5) + torch.tensor([-3.0, 1.0]).view(1, 2, 1, 1)  # not in [0, 1]
    out = Augmentation(shift=1, flip=True)(image.expand(200, -1, -1, -1))
    least = image[0].amin((1, 2), keepdim=True)  # the least value of a channel follows from outside
    padded = least.expand(2, 7, 7).clone()
    padded[:, 1:6, 1:6] = image[0]
    crops = [padded[:, dy : dy + 5, dx : dx + 5] for dy in range(3) for dx in range(3)]
    allowed = torch.stack([*crops, *(crop.flip(2) for crop in crops)])
    matches = (out[:, None] == allowed).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    assert matches.any(0).all()  # all nine shifts, both ways round


def test_an_overlay_is_a_faint_mixture_of_two_images_of_the_batch():
    torch.manual_seed(0)
    images = torch.eye(8).view(8, 1, 1, 8)  # the values of a mixture say which images are in it, and how much of each
    out = overlaid(images, 0.3).view(8, 8)
    own = out.diagonal()
    assert (own >= 0.7).all()
    assert own.min() < 0.9
    torch.testing.assert_close(out.sum(1), torch.ones(8))
    assert ((out > 0).sum(1) <= 2).all()


def test_without_anything_nothing_changes():
    images = torch.rand(3, 1, 4, 6)
    assert torch.equal(Augmentation(shift=0)(images), images)
    assert overlaid(images, 0) is images


def test_the_default_shift_grows_with_the_image_and_spares_other_data():
    torch.manual_seed(0)
    image = torch.zeros(64, 1, 84, 112)
    image[:, :, 20, 20] = 1
    rows = Augmentation()(image).amax((1, 3)).argmax(1)
    assert (rows.min(), rows.max()) == (17, 23)
    table = torch.rand(4, 7)
    assert Augmentation()(table) is table
    assert overlaid(table, 0.3) is table


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match="shift: expected pixels >= 0, got -1"):
        Augmentation(shift=-1)
