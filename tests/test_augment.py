import torch

from bdfast.data.augment import ShiftFlip


def test_every_image_is_a_shifted_or_mirrored_copy():
    torch.manual_seed(0)
    image = torch.rand(1, 2, 5, 5) + 1  # no zeros, so that padding is recognisable
    out = ShiftFlip(pixels=1)(image.expand(200, -1, -1, -1))
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1))
    crops = [padded[:, dy : dy + 5, dx : dx + 5] for dy in range(3) for dx in range(3)]
    allowed = torch.stack([*crops, *(crop.flip(2) for crop in crops)])
    matches = (out[:, None] == allowed).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    assert matches.any(0).all()  # all nine shifts, both ways round


def test_without_shift_and_flip_nothing_changes():
    images = torch.rand(3, 1, 4, 6)
    assert torch.equal(ShiftFlip(pixels=0, flip=False)(images), images)
