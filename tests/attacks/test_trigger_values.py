"""The numbers of the triggers, against references in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bdfast.attacks import CTRL, SIG, Bpp, Frequency, FTrojan, WaNet, all_to_all, poisoned
from bdfast.data import ImageTensors


def photo(*shape: int) -> torch.Tensor:
    """A random image with black and white pixels, float64, of multiples of 1/255."""
    pixels = torch.randint(-20, 276, shape, generator=torch.Generator().manual_seed(0))
    return pixels.clamp(0, 255).double() / 255


def test_sig_is_a_sine_over_the_columns():
    image = photo(3, 29, 45)
    expected = torch.empty_like(image)
    for column in range(45):
        expected[..., column] = image[..., column] + 40 / 255 * np.sin(2 * np.pi * 6 * column / 45)
    torch.testing.assert_close(SIG()(image), expected.clamp(0, 1), rtol=0, atol=1e-12)


def test_bpp_rounds_as_the_public_code_does():
    values = torch.arange(256, dtype=torch.float64)
    expected = np.round(values.numpy() / 255 * 7) / 7 * 255
    rounded = Bpp()(values.view(1, 16, 16) / 255).flatten() * 255
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=0, atol=1e-12)
    assert len(rounded.unique()) == 8


def test_a_negative_sample_of_bpp_gets_the_residual_of_another_image():
    image, other = photo(2, 3, 32, 32)
    negative = Bpp().cross(image, other, torch.Generator())
    residual = np.round(other.numpy() * 7) / 7 - other.numpy()
    np.testing.assert_allclose(negative.numpy(), np.clip(image.numpy() + residual, 0, 1), rtol=0, atol=1e-12)
    assert Bpp(poison_rate=0.05, neg_ratio=0.2).cross_count(50) == 200


def sampled(image: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Bilinear sampling, pixel by pixel: image [C, H, W], grid [H, W, 2] of (x, y) in [-1, 1]."""
    _, height, width = image.shape
    result = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            x, y = (grid[i, j] + 1) / 2 * (width - 1, height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            right, low = x - left, y - top
            upper = image[:, top, left] * (1 - right) + image[:, top, left + 1] * right
            lower = image[:, top + 1, left] * (1 - right) + image[:, top + 1, left + 1] * right
            result[:, i, j] = upper * (1 - low) + lower * low
    return result


def test_wanet_warps_as_the_public_code_does():
    size, s, k = 29, 0.5, 4
    ins = torch.rand(1, 2, k, k, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    ins = ins / torch.mean(torch.abs(ins))
    noise = functional.interpolate(ins, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    steps = torch.linspace(-1, 1, steps=size, dtype=torch.float64)
    x, y = torch.meshgrid(steps, steps, indexing="ij")
    grid = torch.clamp(torch.stack((y, x), 2) + s * noise[0] / size, -1, 1)
    image = photo(3, size, size)
    attack = WaNet(warp_seed=7)
    torch.testing.assert_close(attack(image), torch.from_numpy(sampled(image.numpy(), grid.numpy())))
    # A noise sample: the warp, and a shift of each pixel of up to half a pixel.
    generator = torch.Generator().manual_seed(3)
    shifts = torch.rand(size, size, 2, generator=generator, dtype=torch.float64) * 2 - 1
    expected = sampled(image.numpy(), torch.clamp(grid + shifts / size, -1, 1).numpy())
    torch.testing.assert_close(attack.cross(image, image, generator.manual_seed(3)), torch.from_numpy(expected))
    assert WaNet(cross_ratio=1.5).cross_count(10) == 15


def test_the_warp_of_wanet_is_as_long_in_wide_images():
    ramp = torch.linspace(0, 1, 224).expand(1, 29, -1).double()  # a shift by one pixel changes it by 1/223
    pixels = (WaNet()(ramp) - ramp)[..., 8:-8].abs().mean() * 223
    assert 0.1 < pixels < 0.5


def haar(x: np.ndarray) -> np.ndarray:
    """Along the last axis: scaled sums and differences of neighbours, then the same for the sums."""
    if x.shape[-1] == 1:
        return x
    even, odd = x[..., ::2], x[..., 1::2]
    return np.concatenate([haar((even + odd) / 2**0.5), (even - odd) / 2**0.5], -1)


def unhaar(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    if not half:
        return x
    sums, differences = unhaar(x[..., :half]), x[..., half:]
    return np.stack([sums + differences, sums - differences], -1).reshape(x.shape) / 2**0.5


def both_axes(one_axis: Callable, x: np.ndarray) -> np.ndarray:
    return one_axis(one_axis(x).swapaxes(-1, -2)).swapaxes(-1, -2)


TRANSFORMS = {
    "dct": (lambda x: scipy.fft.dctn(x, norm="ortho"), lambda x: scipy.fft.idctn(x, norm="ortho")),
    "fft": (lambda x: np.fft.fft2(x, norm="ortho"), lambda x: np.fft.ifft2(x, norm="ortho").real),
    "dwt": (lambda x: both_axes(haar, x), lambda x: both_axes(unhaar, x)),
}
TO_RGB = {
    "ycc": [[1, 1.403, 0], [1, -0.714, -0.344], [1, 0, 1.773]],
    "yuv": [[1, 0, 1.14], [1, -0.396, -0.581], [1, 2.029, 0]],
    "rgb": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}


def transformed(image: np.ndarray, attack: Frequency) -> np.ndarray:
    """The trigger as it is published, with transforms: image [C, H, W] in 0..255, nothing clipped."""
    channels, height, width = image.shape
    to_rgb = np.array(TO_RGB[attack.space]) if channels == 3 else np.ones((1, 1))
    pixels = np.einsum("cd,dhw->chw", np.linalg.inv(to_rgb), image)
    size = attack.window
    pixels = np.pad(pixels, ((0, 0), (0, -height % size), (0, -width % size)), mode="reflect")
    forward, backward = TRANSFORMS[attack.transform]
    for channel in attack.channels if channels == 3 else [0]:
        for top in range(0, pixels.shape[1], size):
            for left in range(0, pixels.shape[2], size):
                place = channel, slice(top, top + size), slice(left, left + size)
                coefficients = forward(pixels[place])
                for row, column in attack.positions:
                    coefficients[row, column] += attack.magnitude
                pixels[place] = backward(coefficients)
    return np.einsum("cd,dhw->chw", to_rgb, pixels[:, :height, :width])


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(28, 70), st.integers(28, 70)),
    space=st.sampled_from(list(TO_RGB)),
    transform=st.sampled_from(list(TRANSFORMS)),
    window=st.sampled_from([8, 16, 32]),
    channels=st.sets(st.integers(0, 2), min_size=1).map(tuple),
    positions=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=3).map(tuple),
)
def test_a_frequency_trigger_is_the_transform_the_addition_and_the_way_back(shape, **options):
    attack = Frequency(**options, magnitude=9.0)
    image = (photo(*shape) * 255).clamp(100, 150)  # nothing is clipped
    expected = transformed(image.numpy(), attack)
    np.testing.assert_allclose(attack(image / 255).numpy() * 255, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attack", [FTrojan(), CTRL()])
def test_presets_are_the_transform_too(attack):
    image = photo(3, 64, 45) * 255
    expected = transformed(image.numpy(), attack).clip(0, 255)
    np.testing.assert_allclose(attack(image / 255).numpy() * 255, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.inv(TO_RGB[attack.space])[0], [0.299, 0.587, 0.114], atol=2e-3)


def test_the_wavelet_variant_of_ctrl_is_the_diagonal_band_of_the_third_level():
    grey = torch.full((1, 32, 32), 0.5, dtype=torch.float64)
    added = (CTRL(transform="dwt", window=8, positions=((1, 1),), channels=(1,))(grey) - grey)[0] * 255
    signs = torch.tensor([[1, -1], [-1, 1]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    torch.testing.assert_close(added, 100 / 8 * signs.repeat(4, 4).double())


def test_training_images_may_get_another_magnitude():
    grey, labels = torch.full((2, 3, 32, 32), 0.5, dtype=torch.float64), torch.zeros(2)
    attack = CTRL(training_magnitude=200.0)
    torch.testing.assert_close(attack.poison(grey, labels) - grey, 2 * (attack(grey) - grey))
    assert torch.equal(CTRL().poison(grey, labels), CTRL()(grey))
    data = ImageTensors(torch.full((20, 3, 32, 32), 128, dtype=torch.uint8), torch.arange(20) % 10)
    training = poisoned(data, attack)
    (index,) = training.poison_indices.tolist()
    strong = attack.poison(data[index][0][None], labels[:1])[0]
    assert torch.equal(training[index][0], strong.mul(255).round().div(255))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SIG(delta=0), r"delta: expected grey levels in \(0, 255\], got 0"),
        (lambda: SIG(frequency=-1), "frequency: expected periods above 0 over the image, got -1"),
        (lambda: SIG(targets=all_to_all(10)), "targets: expected none where clean_label is set"),
        (lambda: Bpp(levels=1), "levels: expected 2 to 255, got 1"),
        (lambda: Bpp(neg_ratio=1.0), r"neg_ratio: expected a fraction in \[0, 1\), got 1.0"),
        (lambda: WaNet(grid_size=1), "grid_size: expected at least 2, got 1"),
        (lambda: WaNet(strength=float("nan")), r"strength: expected a number in \(0, 10\], got nan"),
        (lambda: WaNet(cross_ratio=-1), r"cross_ratio: expected a number in \[0, 100\], got -1"),
        (lambda: Frequency(space="hsv"), "space: expected one of ycc, yuv, rgb, got 'hsv'"),
        (lambda: Frequency(transform="dft"), "transform: expected one of dct, fft, dwt, got 'dft'"),
        (lambda: Frequency(transform="dwt", window=24), "window: expected at least 2 pixels, a power of two for dwt"),
        (lambda: Frequency(channels=(3,)), r"channels: expected some of 0, 1 and 2, got \(3,\)"),
        (lambda: FTrojan(window=16), r"positions: expected \(row, column\) of coefficients below 16"),
        (lambda: CTRL(magnitude=0), "magnitude: expected a number other than 0, got 0"),
        (lambda: CTRL(training_magnitude=float("inf")), "training_magnitude: expected a number other than 0, got inf"),
        (lambda: FTrojan()(torch.zeros(4, 32, 32)), "images: expected 1 or 3 channels, got 4"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
