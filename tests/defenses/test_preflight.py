"""What would fail at the end fails at the start; nothing is decided without evidence; stale checkpoints are refused."""

import functools
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bdfast
from bdfast.cli import main
from bdfast.training import fit
from bdfast.training.batchnorm import batchnorms, kept_statistics, recalibrate
from bdfast.training.copies import copy_of
from bdfast.training.descriptions import described, plain

QUICK = {"amp": False, "augment": None, "epochs": 1}


def body(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes))


@pytest.fixture(scope="module")
def trained(digits):
    model = body()
    fit(model, digits[0], epochs=4, amp=False)
    return model.eval()


@pytest.fixture
def clean(digits):
    return digits[1].subset(torch.arange(96))


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
    for verb in (bdfast.evaluate, bdfast.purify, bdfast.invert_trigger):
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


@pytest.mark.parametrize("verb", [bdfast.purify, bdfast.evaluate, bdfast.invert_trigger])
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
    bdfast.purify(trained, clean, method=method, **options, **QUICK).save(tmp_path)
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


def test_a_model_at_chance_is_told_and_tsbd_refuses_it(trained, clean):
    wrong = TensorDataset(clean.images.float() / 255, (clean.labels + 1) % 10)
    for method in ("ft", "ft_sam"):
        with pytest.warns(
            UserWarning, match="clean: expected a model that is better than chance on it, got an accuracy"
        ):
            result = bdfast.purify(
                trained, wrong, method=method, **({"rho": 0.1} if method == "ft_sam" else {}), **QUICK
            )
        assert "better than chance" in result.warnings[0]
    passes = []
    with (
        pytest.warns(UserWarning, match="better than chance"),
        pytest.raises(ValueError, match="clean: expected images on which the model is better than a constant answer"),
    ):
        bdfast.purify(trained, wrong, n=0.2, forward=lambda m, b: (passes.append(1) or m(b[0]), b[1]), **QUICK)
    assert len(passes) < 20


def test_less_than_one_image_per_class_is_told(trained, clean):
    with pytest.warns(UserWarning, match="clean: expected at least one sample per class, got 8 for 10 classes"):
        bdfast.purify(trained, clean.subset(torch.arange(8)), method="ft", **QUICK)


def frozen(model: nn.Module, *but: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(but) if but else False)
    return model


def test_frozen_parameters_are_never_written_to(trained, digits):
    model = frozen(copy_of(trained), "4")
    with pytest.raises(ValueError, match="model: expected neurons that can be trained, got 8 in 1 parameters"):
        bdfast.purify(model, digits[1], n=0.2, **QUICK)
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"tsbd": {"n": 0.2, "layers": "linear", "unlearn_lr": 0.01}, "ft_sam": {"rho": 0.5}, "pam": {"rho": 0.1}}
    for method in ("tsbd", "ft_sam", "pam", "ft", "sam"):
        result = bdfast.purify(model, digits[1], method=method, **options.get(method, {}), **QUICK)
        changed = {n for n, value in result.model.named_parameters() if not torch.equal(value, before[n])}
        assert changed
        assert all(name.startswith("4") for name in changed), method


def test_what_has_not_changed_is_not_zeroed(trained):
    scores = bdfast.neuron_weight_change(trained, trained)
    model = copy_of(trained)
    assert bdfast.reinitialize(model, scores, n=0.2, m=0.7, changed=(trained, trained)).zeroed == 0
    moved = copy_of(trained)
    with torch.no_grad():
        moved[4].weight[:, :3] += 0.1  # fewer sub-weights than are to be zeroed
    scores = bdfast.neuron_weight_change(moved, trained)
    done = bdfast.reinitialize(model, scores, n=0.5, m=0.9, changed=(moved, trained))
    assert done.zeroed == 3 * int(done.neurons.sum()) == 27
    assert int((model[4].weight == 0).sum()) == 27


def test_the_history_says_what_the_inputs_are(trained, clean):
    scaled = TensorDataset(clean.images.float(), clean.labels)
    (note,) = bdfast.purify(trained, scaled, method="ft", **QUICK).history[0].notes
    assert note.startswith("The images are not in [0, 1] but in [0, 255]")
    rows = [{"x": image, "y": label} for image, label in clean]
    result = bdfast.purify(trained, rows, method="ft", forward=lambda m, b: (m(b["x"]), b["y"]), **QUICK)
    assert result.history[0].notes == ("The inputs are no images [B, C, H, W]: neither shifted nor overlaid.",)
    assert bdfast.purify(trained, clean, method="ft", **QUICK).history[0].notes == ()


def test_instance_norm_obeys_the_policy(clean):
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(64, 10))
    assert len(batchnorms(model)) == 1
    batches = [x for x, _ in DataLoader(clean, batch_size=48)]
    model.train()
    with kept_statistics(model):
        model(batches[0])
    assert float(model[0].running_mean) == 0
    recalibrate(model, batches, lambda m, x: m(x))
    expected = torch.stack([x.mean((2, 3)).mean() for x in batches]).mean()
    torch.testing.assert_close(model[0].running_mean[0], expected)
    assert model[0].momentum == 0.1
    before = model[0].running_mean.clone()
    result = bdfast.purify(model, clean, method="ft", bn="frozen", **QUICK)
    assert torch.equal(result.model[0].running_mean, before)


# Stale state.


def top(x):
    return x * 0.5


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def test_functions_are_told_apart_by_what_they_do():
    def closing(factor):
        return lambda x: x * factor

    same = [
        (top, top),
        (closing(2), closing(2)),
        (Scale(3), Scale(3)),
        (functools.partial(top), functools.partial(top)),
    ]
    assert all(described(a, "augment") == described(b, "augment") for a, b in same)
    different = [
        top,
        closing(2),
        closing(3),
        Scale(3),
        Scale(4),
        functools.partial(top),
        lambda x: x * 0.6,
        nn.Flatten(),
    ]
    assert len({described(f, "augment") for f in different}) == len(different)
    with pytest.raises(ValueError, match=r"augment: expected something .* can be told by, got generator"):
        described(closing(x for x in "ab"), "augment")
    holding = Scale(1)
    holding.factor = holding
    with pytest.raises(ValueError, match=r"augment: .* which holds itself"):
        described(holding, "augment")


class Noisy(Dataset):
    """Other images at every reading, from a generator that bdfast does not know."""

    def __init__(self, data):
        self.data, self.draws = data, np.random.default_rng(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + float(self.draws.normal()), label


def test_a_workdir_belongs_to_its_samples_and_functions(tmp_path, trained, digits):
    first, other = digits[1].subset(torch.arange(64)), digits[1].subset(torch.arange(64, 128))
    settings = {"method": "ft", "amp": False, "epochs": 2, "workdir": tmp_path}
    purified = bdfast.purify(trained, first, augment=Scale(0.9), **settings)
    again = bdfast.purify(trained, first, augment=Scale(0.9), **settings)
    assert all(torch.equal(a, b) for a, b in zip(purified.model.parameters(), again.model.parameters(), strict=True))
    relabelled = bdfast.data.ImageTensors(first.images, first.labels.flip(0))
    changes = [
        (other, {"augment": Scale(0.9)}),
        (relabelled, {"augment": Scale(0.9)}),
        (first, {"augment": Scale(0.8)}),
        (first, {"augment": top}),
        (first, {"augment": Scale(0.9), "forward": lambda m, b: (m(b[0] * 1.0), b[1])}),
    ]
    for data, functions in changes:
        with pytest.raises(ValueError, match="workdir: expected checkpoints of this run"):
            bdfast.purify(trained, data, **functions, **settings)
    with pytest.raises(ValueError, match="clean: expected samples that are the same when they are read again"):
        bdfast.purify(trained, Noisy(first), augment=None, **{**settings, "workdir": tmp_path / "noisy"})
    assert bdfast.purify(trained, Noisy(first), augment=None, **{**settings, "workdir": None}).history


def test_an_output_that_cannot_be_written_is_noticed_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["purify", "ft", "nowhere.pt", "--data", "nowhere", "--output", str(tmp_path / "file" / "out")])
    assert "output: expected a folder that can be written to" in capsys.readouterr().err
