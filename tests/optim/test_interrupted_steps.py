"""An error anywhere inside a step: weights and state are those of before the step, or those of after it."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdfast.optim import PAM, SAM, GradientNorm, perturbed

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


class Halt(BaseException):
    """Raised by the tests. Like what Ctrl-C raises it is no Exception, so that no code catches it."""


class Scene:
    """Four parameters in two groups of other options, and an optimizer of them."""

    def __init__(self, name: str, base: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, dtype=dtype, generator=generator)
        values = [draw(3, 4), draw(3), draw(2, 3), draw(2)]
        if name == "strided":  # every second column of a larger weight: the ops work on a copy of it
            values[2] = draw(2, 6)[:, ::2]
        self.params = [nn.Parameter(x) for x in values]
        self.curvature = [draw(x.shape).abs() for x in values]
        optimizer, options = BASES[base]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.05}]
        if name == "gradient norm":
            self.optimizer = GradientNorm(groups, optimizer, rho=0.1, alpha=0.7, **options)
        elif name == "pam":
            reference = [param.detach() + 0.1 for param in self.params]
            self.optimizer = PAM(groups, optimizer, reference=reference, rho=0.3, **options)
        else:
            gap = 0.3 if name == "gsam" else 0.0
            self.optimizer = SAM(groups, optimizer, rho=0.1, adaptive=name == "asam", surrogate_gap=gap, **options)

    def backward(self) -> None:
        """Gradients of a quadratic loss, in few calls: errors are raised at each of them."""
        gradients = torch._foreach_mul([x.detach() for x in self.params], self.curvature)
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient

    def ready(self) -> "Scene":
        """Before the call of `step`: there are gradients where it needs them."""
        self.optimizer.zero_grad()
        if self.optimizer.needs_gradient:
            self.backward()
        return self

    def distance(self) -> float | None:
        """What PAM carries on to its next step, if it is known."""
        return self.optimizer.state_dict()["param_groups"][0].get("distance")

    def state(self) -> list[torch.Tensor]:
        """Everything else that the next step depends on, in one order."""
        stored = self.optimizer.state_dict()
        values = [param.detach().clone() for param in self.params]
        for index, held in sorted(stored["state"].items()):
            values += [torch.tensor(float(index)), *(torch.as_tensor(held[key]).clone() for key in sorted(held))]
        for group in stored["param_groups"]:
            options = {name: x for name, x in group.items() if name not in ("distance", "measured")}
            values.append(torch.tensor([float(x) for x in options.values() if isinstance(x, int | float)]))
        return values


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def call_at(place: int, events: tuple[str, ...], call: Callable[[], None]) -> bool:
    """Raise at one of the calls inside `call`; whether there are so many."""
    seen, inside = 0, True

    def profile(frame, event, argument) -> None:
        nonlocal seen
        if inside and event in events:
            seen += 1
            if seen == place:
                sys.setprofile(None)
                raise Halt(place)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
        inside = False
    except Halt:
        pass
    finally:
        sys.setprofile(before)
    return seen >= place


class RaisingMode(TorchDispatchMode):
    """Raises at one op of torch, before or after it has run."""

    def __init__(self, place: int, late: bool, error: type[BaseException]) -> None:
        super().__init__()
        self.place, self.late, self.error, self.seen = place, late, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.place and not self.late:
            raise self.error("op")
        result = func(*args, **(kwargs or {}))
        if self.seen == self.place and self.late:
            raise self.error("op")
        return result


# A generator of torch's that is closed by an error swallows the next.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
METHODS = pytest.mark.parametrize("name", ["sam", "strided", "gsam", "gradient norm", "pam"])
SCENES = pytest.mark.parametrize(
    ("name", "base"),
    [(name, base) for name in ("sam", "gradient norm", "pam") for base in BASES]
    + [("strided", "sgd"), ("gsam", "sgd")],
)
CALLS, RETURNS = ("call", "c_call"), ("return", "c_return", "c_exception")


class Around:
    """A step that is tried again and again, with the states before and after it."""

    def __init__(self, name: str, base: str, steps: int = 2, dtype: torch.dtype = torch.float32) -> None:
        self.arguments, self.steps = (name, base, dtype), steps
        before, after = self.make(), self.make()
        after.optimizer.step(after.backward)
        self.before, self.after = before.state(), after.state()
        self.distances = before.distance(), after.distance()
        assert not same(self.before, self.after)
        if name == "pam" and base == "sgd" and dtype == torch.float32:
            assert self.distances[1]

    def make(self) -> Scene:
        scene = Scene(*self.arguments)
        for _ in range(self.steps):
            scene.ready().optimizer.step(scene.backward)
        return scene.ready()

    def follow(self, scene: Scene, taken: bool) -> Scene:
        """A scene to try the same step in: the same one after an error before the step, which must leave no trace."""
        return self.make() if taken or not self.steps else scene.ready()

    def taken(self, scene: Scene) -> bool:
        """Whether the step was taken; fails if it was taken in part."""
        assert torch.is_grad_enabled()
        state = scene.state()
        taken = same(state, self.after)
        assert taken or same(state, self.before)
        if taken:  # the distance may have been lost, and is then measured
            assert scene.distance() in (None, self.distances[1])
        else:
            assert scene.distance() == self.distances[0]
        return taken


def check_all_places(name: str, base: str, events: tuple[str, ...], steps: int = 2) -> None:
    around = Around(name, base, steps)
    scene, count, place, reached = around.make(), 0, 0, True
    while reached:
        place += 1
        reached = call_at(place, events, lambda scene=scene: scene.optimizer.step(scene.backward))
        taken = around.taken(scene)
        count += taken
        scene = around.follow(scene, taken)
    assert taken
    assert 10 < count < place - 200


@SCENES
def test_raised_at_any_call(name, base):
    check_all_places(name, base, CALLS)


@pytest.mark.parametrize(("name", "base"), [("sam", "sgd"), ("pam", "sgd"), ("gradient norm", "adamw")])
def test_raised_when_any_call_returns(name, base):
    """As by a signal: the kernel has written, and its result is lost."""
    check_all_places(name, base, RETURNS)


@pytest.mark.parametrize(("name", "base"), [("strided", "sgd"), ("pam", "adamw")])
def test_raised_in_the_very_first_step(name, base):
    """There is no momentum yet, and none may be left: it would be taken for that of a step."""
    check_all_places(name, base, CALLS, steps=0)


@SCENES
def test_raised_in_either_half(name, base):
    around = Around(name, base)
    scene, place, reached = around.make(), 0, True
    while reached:
        place += 1
        reached = call_at(place, CALLS, lambda scene=scene: scene.optimizer.first_step(zero_grad=True))
        if reached:
            assert not around.taken(scene)
            with pytest.raises(RuntimeError, match="expected first_step"):
                scene.optimizer.second_step()
            scene.ready()
    scene.optimizer.restore()
    scene.ready()
    place, reached = 2, True  # the first two calls are those of the lambda and of the method itself
    while reached:
        place += 1
        scene.optimizer.first_step(zero_grad=True)
        scene.backward()
        reached = call_at(place, CALLS, lambda scene=scene: scene.optimizer.second_step(zero_grad=True))
        taken = around.taken(scene)
        scene = around.follow(scene, taken)
    assert taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # which native kernels take, and do not
@pytest.mark.parametrize(("late", "error"), [(False, Halt), (True, Halt), (True, RuntimeError), (True, ValueError)])
@SCENES
def test_raised_at_any_op(name, base, late, error, dtype):
    """A RuntimeError of a kernel that has run must not be taken for one of a kernel that refuses its arguments."""
    around = Around(name, base, dtype=dtype)
    scene, place, reached = around.make(), 0, True
    while reached:
        place += 1
        mode = RaisingMode(place, late, error)
        with contextlib.suppress(Halt, RuntimeError, ValueError), mode:
            scene.optimizer.step(scene.backward)
        reached = mode.seen >= place
        taken = around.taken(scene)
        scene = around.follow(scene, taken)
    assert taken


@METHODS
def test_raised_by_a_hook_of_the_step(name):
    around = Around(name, "sgd")

    def fails(*args) -> None:
        raise Halt

    for register, expected in (("register_step_pre_hook", False), ("register_step_post_hook", True)):
        for second in ("second_step", "step"):
            scene = around.make()
            getattr(scene.optimizer, register)(fails)
            scene.optimizer.first_step(zero_grad=True)
            scene.backward()
            with pytest.raises(Halt):
                getattr(scene.optimizer, second)()
            assert around.taken(scene) == expected


@METHODS
def test_what_one_call_refuses_is_found_before_another_has_written(name):
    around = Around(name, "sgd")
    scene = around.make()
    held = scene.optimizer.state[scene.params[3]]
    buffer = held["momentum_buffer"]
    held["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"momentum_buffers\[1\]: expected shape \[2\] like params\[1\], got \[3\]"):
        scene.optimizer.step(scene.backward)
    held["momentum_buffer"] = buffer
    assert not around.taken(scene)


@pytest.mark.parametrize("mode", ["sam", "path"])
def test_perturbed_comes_back_from_anywhere(mode):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 6)[:, ::2])]
    for param in params:
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in params]
    reference = [param + 1 for param in before] if mode == "path" else None

    def inside() -> None:
        with perturbed(params, rho=0.5, mode=mode, reference=reference):
            assert not any(map(torch.equal, params, before))

    place, reached = 0, True
    while reached:
        place += 1
        reached = call_at(place, CALLS, inside)
        assert all(map(torch.equal, params, before))
        assert torch.is_grad_enabled()
    assert place > 100
    others = perturbed(params, rho=0.5, mode="path", reference=[before[0][:2], before[1]])
    with pytest.raises(ValueError, match=r"dirs\[0\]: expected shape \[3, 4\] like params\[0\], got \[2, 4\]"):
        others.__enter__()
    assert all(map(torch.equal, params, before))
