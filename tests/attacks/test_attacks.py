import numpy as np
import pytest
import torch
from PIL import Image

from bdfast.attacks import BadNets, Blended


def test_badnets_sets_the_square_and_nothing_else():
    images = torch.zeros(2, 3, 10, 12)
    triggered = BadNets(size=2, margin=1)(images)
    assert triggered.sum() == 2 * 3 * 4
    assert torch.equal(triggered[:, :, 7:9, 9:11], torch.ones(2, 3, 2, 2))
    assert images.sum() == 0


def test_badnets_puts_a_white_square_into_the_lower_right_corner_by_default():
    images = torch.rand(2, 3, 28, 31)
    expected = images.clone()
    expected[..., 25:, 28:] = 1.0
    assert torch.equal(BadNets()(images), expected)


@pytest.mark.parametrize(
    ("corner", "place"),
    [("lower right", (5, 5)), ("lower left", (5, 1)), ("upper right", (2, 5)), ("upper left", (2, 1))],
)
def test_badnets_in_every_corner(corner, place):
    triggered = BadNets(size=2, corner=corner, margin=(2, 1))(torch.zeros(1, 9, 8))
    assert triggered.nonzero()[0].tolist() == [0, *place]
    assert triggered.sum() == 4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("square", [[0.8, 0.8, 0.8], [0.8, 0.8, 0.8], [0.8, 0.8, 0.8]]),
        ("checkerboard", [[0.8, 0, 0.8], [0, 0.8, 0], [0.8, 0, 0.8]]),
        ("cross", [[0.8, 0.5, 0.8], [0.5, 0.8, 0.5], [0.8, 0.5, 0.8]]),
        ("10./.01", [[0.8, 0, 0.5], [0.5, 0, 0.8]]),
    ],
)
def test_badnets_draws_patterns(pattern, expected):
    triggered = BadNets(pattern=pattern, color=0.8, corner="upper left")(torch.full((1, 8, 8), 0.5))
    assert torch.equal(triggered[0, : len(expected), :3], torch.tensor(expected))
    triggered[0, : len(expected), :3] = 0.5
    assert (triggered == 0.5).all()


def test_badnets_in_color():
    red = BadNets(color=(1.0, 0.25, 0.0))(torch.full((2, 3, 8, 8), 0.5))
    assert torch.equal(red[1, :, 7, 7], torch.tensor([1, 0.25, 0]))
    with pytest.raises(ValueError, match="color: expected a grey level for images with 1 channels"):
        BadNets(color=(1.0, 0.0, 0.0))(torch.zeros(1, 8, 8))


def test_badnets_refuses_a_pattern_that_does_not_fit():
    with pytest.raises(ValueError, match="size: expected a pattern that fits 4x4 pixels, got 5x5 and margin 0"):
        BadNets(size=5)(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="size: expected a pattern that fits 4x8 pixels, got 1x6 and margin 3"):
        BadNets(pattern="101101", margin=3)(torch.zeros(1, 4, 8))


def test_blended_mixes_one_fixed_pattern():
    attack = Blended(alpha=0.25)
    black, white = attack(torch.zeros(2, 1, 6, 6)), attack(torch.ones(1, 1, 6, 6))
    assert torch.equal(black[0], black[1])
    torch.testing.assert_close(white[0] - black[0], torch.full((1, 6, 6), 0.75))
    assert not torch.equal(black, Blended(alpha=0.25, pattern_seed=1)(torch.zeros(2, 1, 6, 6)))


def test_blended_draws_uniform_noise_by_default():
    images = torch.rand(2, 3, 28, 31)
    noise = torch.rand(3, 28, 31, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Blended()(images), images.lerp(noise, 0.2))


def test_blended_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Blended()(torch.zeros(1, 4, 4))
    assert torch.equal(torch.rand(1), expected)


def test_blended_with_a_picture_of_ones_own(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    attack = Blended(image=str(tmp_path / "picture.png"))
    (tmp_path / "picture.png").unlink()  # it has been read
    same_size = attack(torch.zeros(2, 3, 32, 32))
    torch.testing.assert_close(same_size[1], 0.2 * torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    grey = Image.fromarray(pixels).convert("L")
    torch.testing.assert_close(
        attack(torch.zeros(1, 32, 32))[0], 0.2 * torch.from_numpy(np.array(grey)) / 255, rtol=0, atol=0.2 / 255
    )
    stretched = attack(torch.zeros(3, 28, 45))
    assert stretched.shape == (3, 28, 45)
    assert 0.05 < stretched.mean() < 0.15
    with pytest.raises(ValueError, match="images: expected 1 or 3 channels for a picture as pattern, got 4"):
        attack(torch.zeros(4, 32, 32))


@pytest.mark.parametrize(("mode", "level"), [("L", 200), ("I;16", 51400), ("P", 0), ("RGBA", (9, 9, 9, 0)), ("F", 1e9)])
def test_blended_takes_pictures_of_every_kind(tmp_path, mode, level):
    path = tmp_path / ("picture.tiff" if mode == "F" else "picture.png")
    Image.new(mode, (5, 7), level).save(path)
    triggered = Blended(image=str(path))(torch.full((3, 28, 28), 0.5))
    expected = {"L": 200 / 255, "I;16": 51400 / 65535, "P": 0, "RGBA": 9 / 255, "F": 1}[mode]
    torch.testing.assert_close(triggered, torch.full((3, 28, 28), 0.4 + 0.2 * expected))


@pytest.mark.parametrize(
    "content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "half", "bomb", "folder"]
)
def test_blended_refuses_files_that_are_no_pictures(tmp_path, content):
    path = tmp_path / "picture.png"
    if content == "half":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif content == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)  # 50 kB
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image: expected the file of a picture, got '.*picture.png', which"):
        Blended(image=str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadNets(target=-1), "target: expected a class index >= 0, got -1"),
        (lambda: BadNets(poison_rate=1.5), r"poison_rate: expected a fraction in \(0, 1\), got 1.5"),
        (lambda: BadNets(size=0), "size: expected at least 1 pixel, got 0"),
        (lambda: BadNets(margin=(1, -1)), r"margin: expected 0 or more pixels, or two such numbers, got \(1, -1\)"),
        (lambda: BadNets(margin=(1, 1, 1)), "margin: expected 0 or more pixels"),
        (lambda: BadNets(pattern="circle"), "pattern: expected square, checkerboard, cross or rows .* got 'circle'"),
        (lambda: BadNets(pattern=""), "pattern: expected square"),
        (lambda: BadNets(pattern="101/10"), "pattern: expected square"),
        (lambda: BadNets(color=255), r"color: expected a grey level in \[0, 1\] or three of them, got 255"),
        (lambda: BadNets(color=(1, 0)), "color: expected a grey level"),
        (lambda: BadNets(corner="center"), "corner: expected lower or upper, then right or left, got 'center'"),
        (lambda: Blended(alpha=0.0), r"alpha: expected a number in \(0, 1\], got 0.0"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
