"""`bdfast suppress`: what it writes, what it takes from the data, and what it refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdfast.cli import main, suppress_command
from bdfast.cli.suppress_command import NetworkOptions, statistics, write_suspected
from bdfast.data.digits import digits_source
from bdfast.data.image_folder import ClassFolders
from bdfast.data.images import ImageTensors
from bdfast.data.named_sets import named_data
from bdfast.io.checkpoints import read_description
from bdfast.models import ModelSpec
from bdfast.suppression.suppressing import suppress

QUICK = {
    "abl": "--isolation-epochs 1 --epochs 1 --unlearn-epochs 1 --recover-epochs 0 --ratio 0.2",
    "cbd": "--backdoor-epochs 1 --epochs 1 --ratio 0.1",
}
# A few updates teach a network nothing, which the result says.
pytestmark = pytest.mark.filterwarnings("ignore:(model|unlearn_lr). expected:UserWarning")


@pytest.fixture
def folder(tmp_path):
    """Twenty images of two classes, whose red is darker than their green, and whose blue is 51 throughout."""
    values = np.random.default_rng(0)
    for label in ("cat", "a dog, small"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(10):
            pixels = values.integers(0, 128, (8, 10, 3), np.uint8)
            pixels[..., 1] += 100
            pixels[..., 2] = 51
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def run(method, data, output, *options):
    given = f"--batch-size 8 --width 2 --no-amp --quiet {QUICK[method]}".split()
    main(["suppress", method, "--data", str(data), "--output", str(output), *given, *options])


@pytest.mark.parametrize("method", list(QUICK))
def test_a_folder_becomes_a_network_that_other_commands_read(folder, tmp_path, method, capsys):
    out = tmp_path / "out"
    run(method, folder, out, "--json", "--workdir", str(tmp_path / "work"))
    printed = json.loads(capsys.readouterr().out)
    count = {"abl": 4, "cbd": 2}[method]
    assert (printed["method"], printed["samples"], printed["suspected"]) == (method, 20, count)
    assert printed["options"]["epochs"] == 1
    assert printed["updates"] == 6
    assert any((tmp_path / "work").iterdir())

    written = json.loads((out / "result.json").read_text())
    with (out / "suspected.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["index", "path"]
    assert [int(index) for index, _ in lines] == written["suspected"]
    samples = ClassFolders(folder, lambda x: x).samples
    assert [Path(path) for _, path in lines] == [samples[index][0] for index in written["suspected"]]
    assert all(Path(path).is_file() for _, path in lines)

    main(["evaluate", str(out / "model.safetensors"), "--data", str(folder), "--json"])
    assert 0 <= json.loads(capsys.readouterr().out)["acc"] <= 1


def test_the_network_comes_from_the_data(folder, tmp_path):
    run("cbd", folder, tmp_path / "out")
    spec = ModelSpec.from_json(read_description(tmp_path / "out" / "model.safetensors"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]) / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2), ddof=1)
    assert spec.mean == pytest.approx(mean, abs=6e-5)
    assert spec.std == pytest.approx([*std[:2], 1], abs=6e-5)
    assert mean[1] - mean[0] > 0.3
    assert (spec.num_classes, spec.in_channels, spec.width, spec.image_size) == (2, 3, 2, 8)
    assert spec.class_names == ("a dog, small", "cat")


def test_what_is_given_is_taken(folder, tmp_path):
    network = ["--class-names", "cat", "a dog, small", "--in-channels", "1", "--mean", "0.5", "--std", "0.25"]
    run(
        "cbd",
        folder,
        tmp_path / "out",
        *network,
        "--arch",
        "small_vit",
        "--depth",
        "1",
        "--width",
        "32",
        "--size",
        "16",
    )
    spec = ModelSpec.from_json(read_description(tmp_path / "out" / "model.safetensors"))
    assert spec == ModelSpec(
        "small_vit", 2, 1, 32, "cifar", (0.5,), (0.25,), ("cat", "a dog, small"), depth=1, image_size=16
    )


def test_a_named_set_has_the_figures_of_the_demo(tmp_path):
    source = digits_source()
    assert statistics(source.train, 1, 100) == (10, source.mean, source.std)
    spec = NetworkOptions(width=2).for_data(source.train, 100)
    assert (spec.num_classes, spec.in_channels, spec.mean, spec.std) == (10, 1, source.mean, source.std)
    assert spec.class_names == (source.train.class_names or ())
    assert NetworkOptions(num_classes=12).for_data(source.train, 100).num_classes == 12
    write_suspected(tmp_path / "suspected.csv", source.train, [2, 5])
    assert (tmp_path / "suspected.csv").read_text() == "index\n2\n5\n"


def test_the_options_are_those_of_a_spec():
    assert set(NetworkOptions.__dataclass_fields__) == set(ModelSpec.__dataclass_fields__)


def test_images_are_not_read_where_all_is_given(monkeypatch):
    monkeypatch.setattr(suppress_command, "statistics", None)
    images = ImageTensors(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    spec = NetworkOptions(num_classes=2, mean=(0.5,), std=(0.5,)).for_data(images, 2)
    assert spec == ModelSpec(num_classes=2, in_channels=1, mean=(0.5,), std=(0.5,), image_size=8)


def test_the_seed_fixes_the_network(folder, tmp_path, monkeypatch):
    starts, states = [], []

    def spying(model, *args, **kwargs):
        starts.append(next(model.parameters()).detach().clone())
        return suppress(model, *args, **kwargs)

    monkeypatch.setattr(suppress_command, "suppress", spying)
    for number, seed in enumerate((0, 0, 1)):
        run("cbd", folder, tmp_path / str(number), "--seed", str(seed))
        states.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize(
    ("options", "flip", "augmented"), [([], False, True), (["--flip"], True, True), (["--no-augment"], False, False)]
)
def test_augmentation(folder, tmp_path, monkeypatch, options, flip, augmented):
    seen = {}

    def spying(*args, **kwargs):
        seen.update(kwargs)
        return suppress(*args, **kwargs)

    monkeypatch.setattr(suppress_command, "suppress", spying)
    run("cbd", folder, tmp_path / "out", *options)
    assert (seen["augment"] is not None) == augmented
    assert not augmented or seen["augment"].flip == flip


def test_the_table_says_where_everything_is(folder, tmp_path, capsys):
    arguments = f"--batch-size 8 --width 2 --no-amp {QUICK['abl']} --output {tmp_path / 'out'}"
    main(["suppress", "abl", "--data", str(folder), *arguments.split()])
    shown = capsys.readouterr().out
    for word in ("abl", "suspected", "isolated labels", "warning", "model"):
        assert word in shown


def test_file_names_that_are_no_text(tmp_path):
    (tmp_path / "cat").mkdir()
    path = tmp_path / "cat" / b"\xff\n.png".decode("utf-8", "surrogateescape")
    try:
        Image.new("RGB", (4, 4)).save(path, format="png")
    except OSError:
        pytest.skip("the file system takes text only")
    write_suspected(tmp_path / "s.csv", named_data(str(tmp_path), train=True), [0])
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["index", "path"], ["0", str(path)]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["alb"], "did you mean 'abl'"),
        (["abl", "--data", "digit"], "did you mean 'digits'"),
        (["abl", "--data", "digits", "--arch", "small_vti"], "did you mean 'small_vit'"),
        (["abl", "--data", "digits", "--in-channels", "3"], "in_channels: expected 1, the channels of the images"),
        (["abl", "--data", "digits", "--mean", "0.5"], "std: expected mean and std, or neither"),
        (["abl", "--data", "digits", "--class-names", "a", "b", "--num-classes", "10"], "class_names: expected a name"),
        (["abl", "--data", "digits", "--num-classes", "9", "--width", "2"], "expected labels 0..8"),
        (["abl", "--data", "FOLDER", "--num-classes", "3"], "data: expected 3 sub-folders"),
        (["abl", "--data", "digits", "--width", "2", "--ratio", "0.0001"], "ratio: expected a share that isolates"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(options, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["suppress", *(str(folder) if option == "FOLDER" else option for option in options)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bdfast suppress: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path("suppressed").glob("*"))


def test_help_lists_the_methods(capsys):
    for arguments in (["suppress"], ["suppress", "--help"]):
        main(arguments)
        shown = capsys.readouterr().out
        assert "bdfast suppress METHOD --data DATA" in shown
        assert "abl" in shown
        assert "cbd" in shown
