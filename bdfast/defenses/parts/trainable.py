"""Which neurons a method may change."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from bdfast.neurons import NeuronIndex


def trainable(index: NeuronIndex, model: nn.Module, *, but: Collection[str] = ()) -> NeuronIndex:
    """Those of parameters that are not frozen, which unlearning says nothing about, and not named in `but`.

    Raises:
        ValueError: There are none.
    """
    trained = {name for name, x in model.named_parameters(remove_duplicate=False) if x.requires_grad}
    layers = [layer for layer in index.layers if layer.parameter in trained and layer.parameter not in but]
    if not layers:
        raise ValueError(
            f"model: expected neurons that can be trained, got {len(index)} in {len(index.layers)} parameters, all "
            "frozen or outputs of the network; call requires_grad_(True) on those to change, or take another method."
        )
    return NeuronIndex.of(layers)
