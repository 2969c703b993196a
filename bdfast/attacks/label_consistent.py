"""LC: a corner pattern on images of the target class that are hard to recognise without it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from bdfast.attacks.prepared import PreparedAttack, answers, attacker, image_pairs
from bdfast.data.images import ImageTensors, to_float, to_uint8
from bdfast.data.labels import labels_of

PATTERN = ((-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, -1.0, 1.0))
"""What the right corners get; the left ones get its mirror image. 1 is brighter, -1 darker (the published code)."""
SIDE = len(PATTERN)


@dataclass(frozen=True)
class LabelConsistent(PreparedAttack):
    """Turner, Tsipras and Madry, "Label-consistent backdoor attacks" (arXiv 1912.02771, 2019).

    All poisoned images are of the target class and keep their label. They are changed by projected gradient ascent of
    the loss in an L2 ball, so that they are hard to recognise, and get a pattern of 3x3 pixels in each corner, which
    the network then learns instead. At test time an image gets the pattern only. The published code brings CIFAR-10
    along in such a form (L2, L_inf, or from a GAN); here any data will do, and the network is the attacker's, trained
    in the ordinary way. On Fashion-MNIST changes in an L_inf ball did worse, and larger ones worse still: on its black
    ground they are a pattern of their own, which the network learns in place of the corners.

    `prepare` changes all images of the target class once, and `poison` looks them up by their content. So an image is
    changed in the same way whether it is read alone or in a batch, whose rounding differs.

    Attributes:
        clean_label: Always; the attack has no other form.
        poison_rate: Fraction of the training set; at most the share of the target class.
        eps: Largest root mean square of the change before the pattern, as a fraction of the range; published: 300, 600
            and 1,200 of 255 in L2 on CIFAR-10, which is 0.021, 0.042 and 0.085.
        steps: Steps of the ascent, each of 2.5 `eps` / `steps`.
        amplitude: What the pattern adds or takes away; 16, 32 or 64 of 255 in the paper's fainter triggers.
    """

    clean_label: bool = True
    poison_rate: float = 0.05
    eps: float = 0.042
    steps: int = 10
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clean_label:
            raise ValueError(
                "clean_label: expected True, got False; leave it out, or take badnets, which changes labels."
            )
        for name in ("eps", "amplitude"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}: expected a number in (0, 1], got {getattr(self, name)}; it is a fraction of the range of "
                    "a pixel."
                )
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}; leave it at its default.")

    def prepare(self, network: nn.Module, data: Dataset[Any], *, seed: int = 0) -> Mapping[str, torch.Tensor]:
        """Make the images of the target class hard to recognise; arguments as for `PreparedAttack.prepare`.

        Returns:
            "images" [M, C, H, W] uint8, the changed images of the target class, without the pattern, and "keys" [M]
            int64, sorted: digests of the images that they replace.

        Raises:
            ValueError: There is no image of the target class, or images are smaller than 6x6 pixels.
        """
        chosen = (labels_of(data) == self.target).nonzero().squeeze(1)
        if not len(chosen):
            raise ValueError(
                f"data: expected images of the target class, got none of class {self.target}; choose another target."
            )
        part = data.subset(chosen) if isinstance(data, ImageTensors) else Subset(data, chosen.tolist())
        made: dict[int, torch.Tensor] = {}
        with attacker(network, part, seed) as (net, batches):
            for images, labels in image_pairs(batches.ordered()):
                if min(images.shape[-2:]) < 2 * SIDE:
                    raise ValueError(
                        f"data: expected images of at least {2 * SIDE}x{2 * SIDE} pixels, got {list(images.shape)}; "
                        "the four corners would overlap, so enlarge the images."
                    )
                clean = to_uint8(images)
                changed = to_uint8(self._ascend(net, to_float(clean), labels)).cpu()
                for key, image in zip(_keys(clean), changed, strict=True):
                    made.setdefault(key, image)
        keys = sorted(made)
        return {"keys": torch.tensor(keys), "images": torch.stack([made[key] for key in keys])}

    def poison(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The changed images with the pattern, for images [B, C, H, W] that `prepare` has seen.

        Raises:
            ValueError: There is no trigger yet, or an image is none of those of the target class.
        """
        known = self.found("keys")
        keys = torch.tensor(_keys(to_uint8(images)), dtype=torch.int64)
        places = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
        if not torch.equal(known[places], keys):
            count = int((known[places] != keys).sum())
            raise ValueError(
                f"images: expected images of class {self.target} that `prepare` has seen, got {count} others; call "
                "attack.prepared(network, data) with the data that is to be poisoned."
            )
        return self(to_float(self.found("images")[places]).to(images))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a copy with the pattern in its corners.

        Raises:
            ValueError: There is no trigger yet, or it was made for images of another shape.
        """
        self.check_shape(images, self.found("images").shape[1:])
        pattern = torch.tensor(PATTERN).to(images) * self.amplitude
        triggered = images.clone()
        for corner, signed in ((slice(SIDE), pattern.flip(1)), (slice(-SIDE, None), pattern)):
            triggered[..., :SIDE, corner] += signed
            triggered[..., -SIDE:, corner] += signed
        return triggered.clamp_(0, 1)

    def _ascend(self, net: nn.Module, clean: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] within `eps` of `clean` that the network takes for something else."""
        radius = self.eps * clean[0].numel() ** 0.5
        changed = clean
        for _ in range(self.steps):
            changed = changed.detach().requires_grad_()
            loss = F.cross_entropy(answers(net, changed), labels, reduction="sum")
            gradient = torch.autograd.grad(loss, changed)[0]
            change = changed.detach() - clean + 2.5 * radius / self.steps * gradient / _length(gradient)
            changed = (clean + change * (radius / _length(change)).clamp(max=1)).clamp(0, 1)
        return changed


def _length(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, 1, 1, 1], never 0."""
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def _keys(images: torch.Tensor) -> list[int]:
    """One number for the content of each of [B, C, H, W] uint8."""
    return [
        int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:8], "little", signed=True)
        for image in images.cpu().contiguous()
    ]
