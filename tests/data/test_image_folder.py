"""Folders of images: their classes, sixteen bits, damaged files, sizes."""

import numpy as np
import pytest
import torch
from PIL import Image

from bdfast.data.image_folder import read_image
from bdfast.data.named_sets import named_data


def images(root, names, count: int = 2, size=(6, 5)):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (10 * number, index, 0)).save(root / name / f"{index}.png")
    return str(root)


def labels_by_folder(data) -> dict[str, int]:
    return {path.parent.name: label for path, label in data.samples}


def test_numbers_count_as_numbers(tmp_path):
    data = named_data(images(tmp_path, [str(i) for i in range(12)]), train=True, classes=12)
    assert labels_by_folder(data) == {str(i): i for i in range(12)}
    assert [label for _, label in data][-2:] == [11, 11]


def test_names_are_those_of_the_checkpoint(tmp_path):
    folder = images(tmp_path, ["cat", "ape", "dog"])
    data = named_data(folder, train=True, classes=3, class_names=("dog", "cat", "ape"))
    assert labels_by_folder(data) == {"dog": 0, "cat": 1, "ape": 2}
    assert labels_by_folder(named_data(folder, train=True, classes=3)) == {"ape": 0, "cat": 1, "dog": 2}


def test_hidden_folders_and_files_are_skipped(tmp_path):
    folder = images(tmp_path, ["0", "1"])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "0" / ".thumb.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no class")
    assert len(named_data(folder, train=True, classes=2)) == 4


@pytest.mark.parametrize(
    ("folders", "options", "message"),
    [
        (["0", "1"], {"classes": 3}, "expected 3 sub-folders in .*, one for each output of the model, got 2"),
        (["1", "2"], {"classes": 2}, r"expected the class numbers 0\.\.1 .*, got none for 0"),
        (["cat"], {"class_names": ("cat", "dog")}, r"got 1 missing \('dog'\) and 0 unknown"),
        (["cat", "cow"], {"class_names": ("cat", "dog")}, r"1 missing \('dog'\) and 1 unknown \('cow'\)"),
        ([], {}, "expected one sub-folder of images per class"),
    ],
)
def test_classes_that_do_not_fit_are_named(tmp_path, folders, options, message):
    with pytest.raises(ValueError, match=message):
        named_data(images(tmp_path, folders), train=True, **options)


def test_an_empty_class_is_named(tmp_path):
    folder = images(tmp_path, ["cat", "dog"])
    for path in (tmp_path / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="expected images of class 'dog'"):
        named_data(folder, train=True, classes=2)


def test_sixteen_bits_keep_their_values(tmp_path):
    values = np.array([[0, 1, 257], [30000, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    torch.testing.assert_close(read_image(tmp_path / "a.png")[0], torch.from_numpy(values / 65535.0).float())
    (tmp_path / "set" / "0").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "set" / "0" / "a.png")
    for channels in (1, 3):
        image, _ = named_data(str(tmp_path / "set"), train=True, channels=channels, classes=1)[0]
        assert image.shape == (channels, 2, 3)
        torch.testing.assert_close(image[0], torch.from_numpy(values / 65535.0).float())


def test_grey_stays_what_it_is(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "0").mkdir()
    Image.fromarray(values).save(tmp_path / "0" / "a.png")
    image, _ = named_data(str(tmp_path), train=True, channels=1, classes=1)[0]
    assert torch.equal((image * 255).round().to(torch.uint8)[0], torch.from_numpy(values))


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b"", lambda b: b"GIF89a" + b[6:40]])
def test_a_damaged_file_is_named(tmp_path, damage):
    folder = images(tmp_path, ["0", "1"], size=(64, 64))
    Image.effect_noise((64, 64), 50).save(tmp_path / "1" / "broken.jpg")
    path = tmp_path / "1" / "broken.jpg"
    path.write_bytes(damage(path.read_bytes()))
    data = named_data(folder, train=True, classes=2)
    with pytest.raises(ValueError, match=r"expected an image in .*broken.jpg, got a file that cannot be read"):
        list(data)


def test_sizes_that_differ_are_named(tmp_path):
    folder = images(tmp_path, ["0", "1"])
    Image.new("RGB", (9, 9)).save(tmp_path / "1" / "large.png")
    with pytest.raises(ValueError, match=r"got \[9, 9\] in .*large.png and \[5, 6\] in .*0.png; pass --size"):
        list(named_data(folder, train=True, classes=2))
    assert len(list(named_data(folder, train=True, classes=2, size=5))) == 5
