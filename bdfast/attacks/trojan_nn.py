"""TrojanNN: a patch made to excite a few neurons of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from bdfast.attacks.prepared import PreparedAttack, answers, attacker, some_images
from bdfast.task import at_least_float32, logits_of
from bdfast.training.seeds import derived_seed

LR = 0.05
"""Learning rate (Adam) of the patch, whose pixels are in [0, 1]."""


@dataclass(frozen=True)
class TrojanNN(PreparedAttack):
    """Liu, Ma, Aafer, Lee, Zhai, Wang and Zhang, "Trojaning attack on neural networks" (NDSS 2018).

    The neurons are inputs of the layer that gives the logits: those whose connections are strongest. A patch is
    fitted so that they come close to `value`, and replaces the pixels under it. The connections are those to the
    logits, times what a random patch changes in the neuron, as one that the patch does not reach cannot be raised; the
    paper takes those from the layer before. The paper's mask is a logo, and its patch is fitted on an empty image;
    ours is a square in the lower right corner, fitted on clean images. The paper then trains on images that it
    reconstructs from the network; here the patch poisons training data, as in BackdoorBench.

    Attributes:
        area: Part of the image that the square covers; published: 0.04, 0.07 and 0.1.
        neurons: How many neurons are chosen; BackdoorBench: 2.
        value: What they shall reach; BackdoorBench: 100.
        images: Clean images that the patch is fitted on.
        steps: Steps of the search; BackdoorBench: 1,000.
    """

    area: float = 0.07
    neurons: int = 2
    value: float = 100.0
    images: int = 64
    steps: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.area <= 1:
            raise ValueError(f"area: expected a fraction in (0, 1], got {self.area}; 0.07 is 7 % of the image.")
        for name in ("neurons", "images", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}; leave it at its default.")

    def prepare(self, network: nn.Module, data: Dataset[Any], *, seed: int = 0) -> Mapping[str, torch.Tensor]:
        """Choose the neurons and fit the patch; arguments as for `PreparedAttack.prepare`.

        Returns:
            "pattern" [C, H, W] float32 in [0, 1], "mask" [H, W] bool, where it replaces pixels, and "neurons" [N]
            int64, which inputs of the last layer it excites.

        Raises:
            ValueError: The network does not end in a linear layer, or that has fewer inputs than `neurons`.
        """
        with attacker(network, data, seed) as (net, batches):
            clean, _ = some_images(batches, self.images, derived_seed(seed, "images"))
            last = _last_linear(net, clean)
            seen: list[torch.Tensor] = []
            last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

            def activations(images: torch.Tensor) -> torch.Tensor:
                seen.clear()
                answers(net, images)
                return at_least_float32(seen[0])

            mask = torch.zeros(clean.shape[-2:], dtype=torch.bool, device=clean.device)
            side = min(*mask.shape, max(1, round((self.area * mask.numel()) ** 0.5)))
            mask[-side:, -side:] = True
            pattern = torch.rand(clean.shape[1:]).to(clean)
            with torch.no_grad():
                moved = activations(torch.where(mask, pattern, clean)) - activations(clean)
                strength = last.weight.abs().sum(0) * moved.abs().mean(0)
            if self.neurons > len(strength):
                raise ValueError(
                    f"neurons: expected at most {len(strength)}, the inputs of the last layer, got {self.neurons}; "
                    "choose fewer."
                )
            neurons = strength.topk(self.neurons).indices
            optimizer = torch.optim.Adam([pattern.requires_grad_()], lr=LR)
            for _ in range(self.steps):
                optimizer.zero_grad()
                reached = activations(torch.where(mask, pattern, clean))[:, neurons]
                (self.value - reached).square().mean().backward()
                optimizer.step()
                with torch.no_grad():
                    pattern.clamp_(0, 1)
            found = pattern.detach().float() * mask
            return {"pattern": found.cpu(), "mask": mask.cpu(), "neurons": neurons.cpu()}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a copy with the patch.

        Raises:
            ValueError: There is no trigger yet, or it was made for images of another shape.
        """
        pattern = self.found("pattern")
        self.check_shape(images, pattern.shape)
        return torch.where(self.found("mask").to(images.device), pattern.to(images), images)


@torch.no_grad()
def _last_linear(net: nn.Module, images: torch.Tensor) -> nn.Linear:
    """The linear layer whose output the logits are."""
    outputs: list[tuple[nn.Module, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append((module, (inputs[0], output))))
        for module in net.modules()
        if isinstance(module, nn.Linear)
    ]
    logits = logits_of(net(images))
    for handle in handles:
        handle.remove()
    if outputs:
        module, (features, output) = outputs[-1]
        if isinstance(module, nn.Linear) and features.ndim == 2 and torch.equal(output, logits):
            return module
    raise ValueError(
        "network: expected one whose logits come from a linear layer (torch.nn.Linear) with inputs [B, D], got one "
        "without; put such a layer at its end, or choose another attack."
    )
