"""The last feature map of a network: read, and multiplied by a mask, while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Features:
    """The output of one module of a network, seen by a hook.

    Args:
        model: The network.
        run: Runs it once, so that the module can be found.

    Attributes:
        layer: Name of the module: the last whose output has positions, [B, C, H, W] or [B, tokens, D], else the last
            before the logits; of those that run once in a pass.
        values: Its output in the last pass.
        mask: Multiplied onto the output when set.

    Raises:
        ValueError: The network has no module of that kind.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self.layer = _last_feature_map(model, run)
        self.mask: Tensor | None = None
        self.values: Tensor
        self._handle = model.get_submodule(self.layer).register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.values = output
        return output if self.mask is None else output * self.mask.to(output.dtype)

    def __enter__(self) -> Features:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def _last_feature_map(model: nn.Module, run: Callable[[], Any]) -> str:
    finished: list[tuple[str, torch.Size]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            finished.append((name, output.shape if isinstance(output, Tensor) else torch.Size()))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    passes = Counter(name for name, _ in finished)
    logits = finished[-1][1] if finished else torch.Size()
    once = [(name, shape) for name, shape in finished if passes[name] == 1]
    placed = [name for name, shape in once if len(shape) in (3, 4) and max(shape[2:]) > 1]
    flat = [name for name, shape in once if len(shape) == 2 and shape != logits]
    if not placed and not flat:
        raise ValueError(
            "model: expected a module before the logits that runs once and returns a tensor, got none; put the feature "
            "extractor into a module of its own."
        )
    return (placed or flat)[-1]
