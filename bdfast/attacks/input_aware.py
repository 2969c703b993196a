"""Input-aware: a trigger of its own for every image, from a trained generator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from bdfast.attacks.encoder_decoder import GROUPS, encode_decode, fresh_weights
from bdfast.attacks.prepared import PreparedAttack, answers, attacker, endless
from bdfast.ops.finite import check_finite_gradients
from bdfast.training.seeds import derived_seed

Weights = Mapping[str, torch.Tensor]
Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]

EPSILON = 1e-7
SHARPNESS = 40.0
"""How steep the mask is around its threshold, as in the published code: tanh(20 s - 10) / 2 + 0.5 is the same."""
PIXELS = 1 << 20
"""Pixels that go through the networks at once on a GPU, so that large images take no more memory than small ones."""


@dataclass(frozen=True)
class InputAware(PreparedAttack):
    """Nguyen and Tran, "Input-aware dynamic backdoor attack" (NeurIPS 2020, arXiv 2010.08138).

    A generator G paints a pattern and a network M says where it covers the image: x' = x + (G(x) - x) M(x). M is
    trained first, so that masks of two images differ and are small; then G, so that a classifier calls x' the target,
    keeps the label of an image with the trigger of another one (a cross sample), and two patterns differ. In the paper
    that classifier is the backdoored network itself. Here it is a copy of the attacker's network that goes on
    learning beside G; what comes out poisons training data, cross samples included, and so reaches any network. The
    published penalty counts every pixel of a mask above `mask_density`; ours counts what the mean of a mask is above
    it, so that it holds for the mean.

    Both networks are small, take images of any size, and run in float64: an image gets the same 8-bit trigger alone
    and in a batch.

    Attributes:
        cross_rate: Cross samples, as a fraction of the poisoned images; published: 1, with which a network that only
            sees the data learns the trigger less well.
        lambda_div: Weight of the diversity of masks and patterns; published: 1.
        lambda_norm: Weight of the size of the masks; published: 100.
        mask_density: Share of the pixels that a mask may cover; published: 0.032.
        lr: Learning rate of all three networks; published: 0.01.
        width: Channels of the first level of G and M, a multiple of 4; published: 32, 16 on MNIST.
        mask_steps: Batches of 128 that M is trained on; published: 25 passes over the data.
        steps: Batches of 128 that G is trained on; published: hundreds of passes.
    """

    cross_rate: float = 0.5
    lambda_div: float = 1.0
    lambda_norm: float = 100.0
    mask_density: float = 0.032
    lr: float = 0.01
    width: int = 16
    mask_steps: int = 200
    steps: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_density < 1:
            raise ValueError(
                f"mask_density: expected a fraction in (0, 1), got {self.mask_density}; the paper uses 0.032."
            )
        if self.width < GROUPS or self.width % GROUPS:
            raise ValueError(f"width: expected a multiple of {GROUPS}, got {self.width}; 16 is the default.")
        for name in ("cross_rate", "lambda_div", "lambda_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}; leave it at its default.")
        for name in ("lr", "mask_steps", "steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}; leave it at its default.")

    def prepare(self, network: nn.Module, data: Dataset[Any], *, seed: int = 0) -> Mapping[str, torch.Tensor]:
        """Train the mask network and the generator; arguments as for `PreparedAttack.prepare`.

        Returns:
            The weights of the generator and of the mask network, float32, under "pattern.*" and "mask.*".
        """
        with attacker(network, data, seed) as (classifier, batches):
            images, _ = next(endless(batches, seed))
            torch.manual_seed(derived_seed(seed, "weights"))
            channels = images.shape[1]
            painter, masker = (
                {name: x.to(images).requires_grad_() for name, x in fresh_weights(channels, maps, self.width).items()}
                for maps in (channels, 1)
            )
            self._learn_masks(masker, endless(batches, derived_seed(seed, "mask")))
            pairs = endless(batches, derived_seed(seed, "pattern"))
            self._learn_patterns(painter, masker, classifier.requires_grad_(), pairs)
        found = {f"pattern.{name}": x for name, x in painter.items()} | {
            f"mask.{name}": x for name, x in masker.items()
        }
        return {name: x.detach().cpu() for name, x in found.items()}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a copy, each with its own trigger.

        Raises:
            ValueError: There is no trigger yet, or it was made for another number of channels.
        """
        flat = images.reshape(-1, *images.shape[-3:])
        pattern, mask = self.trigger(flat)
        return _covered(flat, pattern, mask).to(images.dtype).reshape(images.shape)

    def trigger(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The triggers of images [B, C, H, W]: patterns [B, C, H, W] and masks [B, 1, H, W], float64 in [0, 1].

        Raises:
            ValueError: As for a call.
        """
        self.check_shape(images, (len(self.found("pattern.out.weight")), -1, -1))
        painter, masker = self._weights("pattern", images.device), self._weights("mask", images.device)
        # On a CPU single images stay in its caches, which is three times as fast.
        at_once = 1 if images.device.type == "cpu" else max(1, PIXELS // images[0, 0].numel())
        with torch.no_grad():
            parts = images.double().split(at_once)
            patterns = torch.cat([_pattern(painter, part) for part in parts])
            return patterns, torch.cat([_mask(masker, part) for part in parts])

    def cross_count(self, poisoned: int) -> int:
        """As many cross samples as `cross_rate` asks for."""
        return round(self.cross_rate * poisoned)

    def cross(self, image: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The image [C, H, W] with the trigger that the other one has."""
        pattern, mask = self.trigger(other.unsqueeze(0))
        return _covered(image, pattern[0], mask[0]).to(image.dtype)

    def _weights(self, part: str, device: torch.device) -> Weights:
        return {
            name.removeprefix(f"{part}."): value.to(device, torch.float64)
            for name, value in self.known_state().items()
            if name.startswith(f"{part}.")
        }

    def _learn_masks(self, masker: Weights, pairs: Pairs) -> None:
        optimizer = torch.optim.Adam(masker.values(), lr=self.lr, betas=(0.5, 0.9))
        for _ in range(self.mask_steps):
            images, _ = next(pairs)
            masks = _mask(masker, images)
            too_much = F.relu(masks.mean((1, 2, 3)) - self.mask_density).mean()
            loss = self.lambda_norm * too_much + self.lambda_div * _sameness(images, masks)
            optimizer.zero_grad()
            loss.backward()
            check_finite_gradients(masker.items())
            optimizer.step()

    def _learn_patterns(self, painter: Weights, masker: Weights, classifier: nn.Module, pairs: Pairs) -> None:
        optimizers = (
            torch.optim.Adam(painter.values(), lr=self.lr, betas=(0.5, 0.9)),
            torch.optim.SGD(classifier.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4),
        )
        classifier.train()
        for _ in range(self.steps):
            images, labels = next(pairs)
            patterns = _pattern(painter, images)
            with torch.no_grad():
                masks = _mask(masker, images)
            # A third gets its own trigger, a third that of its neighbour, and a third stays clean.
            own, crossed = (len(images) * part // 3 for part in (1, 2))
            seen = images.clone()
            seen[:own] = _covered(images, patterns, masks)[:own]
            seen[own:crossed] = _covered(images, patterns.roll(1, 0), masks.roll(1, 0))[own:crossed]
            wanted = torch.cat([self.relabel(labels[:own]), labels[own:]])
            loss = F.cross_entropy(answers(classifier, seen), wanted) + self.lambda_div * _sameness(images, patterns)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            check_finite_gradients([*painter.items(), *classifier.named_parameters()])
            for optimizer in optimizers:
                optimizer.step()


def _pattern(painter: Weights, images: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(2 * encode_decode(painter, images))


def _mask(masker: Weights, images: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(SHARPNESS * (torch.sigmoid(2 * encode_decode(masker, images)) - 0.5))


def _covered(images: torch.Tensor, patterns: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return images + (patterns - images) * masks


def _sameness(images: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """How far each image is from its neighbour in the batch, over how far what was made of them is; the mean."""

    def distances(x: torch.Tensor) -> torch.Tensor:
        return (x - x.roll(1, 0)).square().mean((1, 2, 3))

    # The root of 0 has an infinite slope.
    return (distances(images).sqrt() / (distances(made) + EPSILON).sqrt()).mean()
