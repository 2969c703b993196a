"""README's examples and those of `examples/`, run with the installed package away from the checkout.

Blocks marked `python` run one after the other in one namespace; lines of blocks marked `shell` one by one. In place of
Fashion-MNIST come scikit-learn's digits: a network in seconds, and no download. Ten updates a stage have to do.
"""

import re
import shlex
from pathlib import Path

import pytest
from building import ROOT

pytestmark = pytest.mark.slow

ON_DIGITS = """
from dataclasses import replace
from bdfast.data.digits import digits_source
from bdfast.data.sources import SOURCES
SOURCES["fashion-mnist"] = lambda: replace(digits_source(), epochs=8)
from bdfast.defenses import stages
budget = stages.budget
stages.budget = lambda updates, samples: budget(min(updates, 10), samples)
"""
COMMAND = f"{ON_DIGITS}\nimport sys; from bdfast.cli import main; main(sys.argv[1:])"
# What the shell examples are about: a network of torchvision that knows ten colours, and images of these.
FILES = """
import torch, torchvision
from pathlib import Path
from torchvision.utils import save_image
from bdfast.data import ImageTensors
from bdfast.training import fit
torch.manual_seed(0)
labels = torch.arange(40) % 10
colours = torch.rand(10, 3, 1, 1)[labels].expand(-1, -1, 32, 32)
images = (255 * (0.8 * colours + 0.2 * torch.rand(40, 3, 32, 32))).to(torch.uint8)
model = torchvision.models.resnet18(num_classes=10)
fit(model, ImageTensors(images, labels), epochs=12, batch_size=10, amp=False)
torch.save(model.state_dict(), "weights.pt")
for index, (image, label) in enumerate(zip(images, labels.tolist())):
    Path(f"clean-images/{label}").mkdir(parents=True, exist_ok=True)
    save_image(image / 255, f"clean-images/{label}/{index}.png")
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def succeeded(done) -> None:
    assert done.returncode == 0, (done.args, done.stdout[-4000:], done.stderr[-4000:])


def test_python_of_the_readme(installed, tmp_path):
    pytest.importorskip("sklearn")
    code = blocks("python")
    assert len(code) >= 3
    (tmp_path / "readme.py").write_text("\n".join([ON_DIGITS, *code]))
    succeeded(installed.run(["python", "readme.py"], cwd=tmp_path))


def test_shell_of_the_readme(installed, tmp_path):
    pytest.importorskip("sklearn")
    succeeded(installed.run(["python", "-c", FILES], cwd=tmp_path))
    lines = "\n".join(blocks("shell")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {words[1] for words in commands if words} >= {"purify", "evaluate", "doctor"}
    for program, *arguments in filter(None, commands):
        assert program == "bdfast"
        succeeded(installed.run(["python", "-c", COMMAND, *arguments], cwd=tmp_path))


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(installed, example: Path, tmp_path):
    done = installed.run(["python", "-W", "error", example], cwd=tmp_path)
    succeeded(done)
    assert done.stdout.strip()
