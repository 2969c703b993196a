"""What would fail at the end fails at the start, or not at all."""

import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bdfast
from bdfast.cli import main
from bdfast.training import fit
from bdfast.training.copies import copy_of
from bdfast.training.descriptions import plain

QUICK = {"amp": False, "augment": None, "epochs": 1, "lr": 0.01}


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, wrap) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"logits": y},
        lambda y: SimpleNamespace(logits=y, loss=None),
        lambda y: {"loss": None, "out": y},
        lambda y: (y,),
    ],
    ids=["dict", "object", "segmentation's out", "tuple of one"],
)
def test_logits_are_found(trained, clean, wrap):
    model = Wrapped(trained, wrap)
    assert bdfast.evaluate(model, clean).acc == bdfast.evaluate(trained, clean).acc
    assert bdfast.purify(model, clean, method="ft", **QUICK).history[-1].accuracy > 0.5


@pytest.mark.parametrize("wrap", [lambda y: (y, y), lambda y: {"features": y}, lambda y: "cat"])
def test_or_the_error_names_forward(trained, clean, wrap):
    for verb in (bdfast.evaluate, bdfast.purify, bdfast.invert_trigger, bdfast.surrogates):
        with pytest.raises(ValueError, match=r"clean: batch 0: model: expected logits.*forward="):
            verb(Wrapped(trained, wrap), clean)


class Auxiliary(nn.Module):
    """Returns more while it is trained, as GoogLeNet does; a tuple that says nothing is found out at the start."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.inner, self.named = body(), named

    def forward(self, x):
        logits = self.inner(x)
        if not self.training:
            return logits
        return SimpleNamespace(logits=logits, aux_logits=logits) if self.named else (logits, logits)


def test_heads_of_the_training_mode(clean, monkeypatch):
    assert bdfast.purify(Auxiliary(named=True), clean, method="ft", **QUICK).history[-1].loss > 0
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"model: expected logits.*forward="):
        bdfast.purify(Auxiliary(named=False), clean, method="ft", **QUICK)


class Keeping(nn.Module):
    """Keeps its last features, which hang on a graph after a training pass, also inside a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen, self.lock = body(), {}, threading.Lock()

    def forward(self, x):
        self.last = self.inner[:-1](x)
        self.seen["features"] = [self.last]
        return self.inner[-1](self.last)


def test_networks_that_deepcopy_refuses(clean):
    model = Keeping()
    fit(model, clean, epochs=2, amp=False)
    with pytest.raises((RuntimeError, TypeError)):
        __import__("copy").deepcopy(model)
    twin = copy_of(model)
    assert twin.lock is model.lock
    assert twin.last.grad_fn is None
    assert twin.inner[0].weight is not model.inner[0].weight
    for method, options in (("ft", {}), ("ft_sam", {"rho": 0.1}), ("pam", {"rho": 0.1, "invert_epochs": 1})):
        result = bdfast.purify(model, clean, method=method, **options, **QUICK)
        assert bdfast.evaluate(result.model, clean, recalibrate_on=clean).acc >= 0


def test_a_network_that_cannot_be_copied_is_refused_at_the_start(clean):
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = body()

        def forward(self, x):
            return self.inner(x)

        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    with pytest.raises(ValueError, match=r"model: expected a network that copy.deepcopy can copy.*not me"):
        bdfast.purify(Stubborn(), clean, method="ft")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["ft", "pam"])
def test_inside_no_grad(trained, clean, mode, method):
    options = {"rho": 0.1, "invert_epochs": 1, "rounds": 1} if method == "pam" else {}
    with mode():
        result = bdfast.purify(trained, clean, method=method, **options, **QUICK)
        bdfast.invert_trigger(trained, clean, options=bdfast.BTIDBF(mask_epochs=1, epochs=1), amp=False)
    assert not next(result.model.parameters()).is_inference()


def test_five_dimensions_do_not_mind_the_memory_format(clean):
    class Five(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Conv3d(1, 1, 1), body()
            self.register_buffer("five", torch.zeros(1, 1, 1, 1, 1))

        def forward(self, x):
            return self.rest(self.first(x.unsqueeze(2)).squeeze(2))

    bdfast.purify(Five(), clean, method="ft", **QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_follow_the_dtype_of_the_model(trained, clean, dtype):
    model = copy_of(trained).to(dtype)
    assert bdfast.evaluate(model, clean).acc > 0.5
    result = bdfast.purify(model, clean, method="ft_sam", rho=0.1, **QUICK)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}


def test_infinite_buffers_are_masks_and_nan_is_damage(clean):
    model = body()
    model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    bdfast.purify(model, clean, method="ft", **QUICK)
    model.register_buffer("mean", torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="model: expected finite weights, got NaN or infinity in mean"):
        bdfast.purify(model, clean, method="ft", **QUICK)


@pytest.mark.parametrize("verb", [bdfast.purify, bdfast.evaluate, bdfast.invert_trigger, bdfast.surrogates])
def test_models_without_values_are_told(clean, verb):
    with pytest.raises(ValueError, match=r"model: expected initialised parameters, got 1\.\w+, which is lazy"):
        verb(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), clean)
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"model: expected parameters with values, got 1\.weight on the meta"):
        verb(model, clean)


def flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize("method", ["ft_sam", "tsbd", "pam"])
def test_a_last_batch_of_one(digits, method):
    """129 images in batches of 32, of which 97 are tuned on."""
    model = flat()
    fit(model, digits[0], epochs=3, amp=False)
    options = {"pam": {"invert_epochs": 1, "rounds": 1, "target": 0}, "tsbd": {"unlearn_to": 0.9}}
    result = bdfast.purify(
        model, digits[1].subset(torch.arange(129)), method=method, batch_size=32, **options.get(method, {}), **QUICK
    )
    assert result.history
    few = digits[1].subset(torch.arange(65))
    assert bdfast.evaluate(model, few, recalibrate_on=few, batch_size=64).acc > 0


def test_sparse_gradients_are_refused(clean):
    class Colours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(16, 10, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.words((x.flatten(1) * 15).abs().long().clamp(max=15)).sum(1)

    with pytest.raises(ValueError, match=r"model: expected dense gradients, got sparse ones for words\.weight"):
        bdfast.purify(Colours(), clean, method="ft", **QUICK)


def test_batches_of_one_name_the_batch_size(clean):
    with pytest.raises(ValueError, match="batch_size: expected at least 2 for a network with BatchNorm"):
        bdfast.purify(flat(), DataLoader(clean, batch_size=1), method="ft", **QUICK)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ft", {"seed": np.int64(3)}),
        ("ft", {"lr": np.float32(0.01)}),
        ("ft_sam", {"rho": torch.tensor(0.5)}),
        ("pam", {"rho": 0.1, "target": np.int64(3), "invert_epochs": 1}),
        ("pam", {"rho": 0.1, "target": torch.tensor(3), "invert_epochs": 1, "seed": torch.tensor(1)}),
    ],
)
def test_numbers_of_numpy_and_torch_become_plain(tmp_path, trained, clean, method, options):
    bdfast.purify(trained, clean, method=method, **{**QUICK, **options}).save(tmp_path)
    written = json.loads((tmp_path / "result.json").read_text())["options"]
    assert all(written[name] == pytest.approx(float(value)) for name, value in options.items() if name in written)


def test_what_json_has_not(tmp_path, trained, clean):
    assert plain({1: (np.float32(0.5), torch.arange(2)), "f": print}) == {"1": (0.5, [0, 1]), "f": repr(print)}
    one = clean.subset((clean.labels == 3).nonzero().squeeze(1))
    with pytest.warns(UserWarning, match="clean: expected images of several classes"):
        result = bdfast.purify(trained, one, method="pam", rho=0.1, invert_epochs=1, rounds=1, **QUICK)
    result.save(tmp_path)
    text = (tmp_path / "result.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert result.found["target"] != 3
    assert result.found["evidence"][3] == math.inf
    assert result.warnings


def test_an_output_that_cannot_be_written_is_noticed_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["purify", "ft", "nowhere.pt", "--data", "nowhere", "--output", str(tmp_path / "file" / "out")])
    assert "output: expected a folder that can be written to" in capsys.readouterr().err
