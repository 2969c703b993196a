"""Scores per neuron: weight change, gradient norm, ranking and outliers."""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdfast import ops
from bdfast.files import whole_file
from bdfast.neurons.index import NeuronIndex, NeuronLayer, Source, aligned_rows, named_tensors

# Factor from the median absolute deviation to the standard deviation of normal data.
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """A score for every neuron of an index; higher means more suspicious.

    Attributes:
        values: [R] float32, on the device of the model.
        layers: The parameters that the neurons belong to, in order.

    Raises:
        ValueError: `values` is not a vector with one element per neuron of `layers`.
    """

    values: Tensor
    layers: tuple[NeuronLayer, ...]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.index),):
            raise ValueError(
                f"NeuronScores: values: expected shape ({len(self.index)},), one score per neuron of layers, got "
                f"{tuple(self.values.shape)}; pass the scores in the order of the index that the layers come from."
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def index(self) -> NeuronIndex:
        """The neurons that were scored."""
        return NeuronIndex.of(self.layers)

    def ranking(self, *, decimals: int | None = None) -> Tensor:
        """Flat numbers of the neurons, the highest score first; of equal scores, the earlier neuron first.

        Args:
            decimals: Compare the scores rounded to so many decimal places (half to even), not the scores
                themselves.

        Returns:
            [R] int64, on the device of the scores.

        Raises:
            ValueError: A score is NaN. The message names its layer.
        """
        self._check_no_nan()
        # In float64 a float32 times 10^4 is exact, so this rounds like printing with four decimals.
        keys = self.values if decimals is None else (self.values.double() * 10**decimals).round()
        return keys.sort(descending=True, stable=True).indices

    def top(self, k: int) -> list[tuple[str, int, float]]:
        """The k neurons with the highest scores, or all if there are fewer.

        Returns:
            (parameter name, row, score), the highest score first; of equal scores, the earlier neuron first.

        Raises:
            ValueError: `k` is negative, or a score is NaN.
        """
        if k < 0:
            raise ValueError(f"NeuronScores.top: k: expected 0 or more, got {k}; pass a number of neurons.")
        chosen = self.ranking()[:k]
        index = self.index
        result = []
        for neuron, value in zip(chosen.tolist(), self.values[chosen].tolist(), strict=True):
            layer, row = index.locate(neuron)
            result.append((layer.parameter, row, value))
        return result

    def outliers(self, z: float = 3.5) -> Tensor:
        """Neurons that score more than z robust standard deviations above the median.

        score - median > z * 1.4826 * MAD, where MAD is the median absolute deviation from the median; both
        medians are the lower one for an even count. Low scores are never outliers. With MAD = 0, when at
        least half of the scores are equal, every score above the median is an outlier.

        The rule of ULRL (Min et al., arXiv 2405.14781), applied there to the rows of the last linear layer.

        Returns:
            [R] bool, on the device of the scores.

        Raises:
            ValueError: `z` is negative or NaN, or a score is NaN.
        """
        if not z >= 0:
            raise ValueError(f"NeuronScores.outliers: z: expected 0 or more, got {z}; 3.5 is the published value.")
        self._check_no_nan()
        excess = self.values - self.values.median()
        return excess > z * MAD_TO_SIGMA * excess.abs().median()

    def by_layer(self) -> dict[str, Tensor]:
        """From the name of each parameter to a view [rows] of the scores of its neurons."""
        return {layer.parameter: self.values[layer.start : layer.stop] for layer in self.layers}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns parameter, row, value, one line per neuron; replaces a file of that name at once.

        Values have nine significant digits, which identify a float32.
        """
        with whole_file(path) as temporary, temporary.open("x", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("parameter", "row", "value"))
            for name, values in self.by_layer().items():
                writer.writerows((name, row, f"{value:.9g}") for row, value in enumerate(values.tolist()))

    def _check_no_nan(self) -> None:
        nans = self.values.isnan()
        if nans.any():
            layer, row = self.index.locate(int(nans.nonzero()[0]))
            raise ValueError(
                f"NeuronScores: values: expected numbers, got {int(nans.sum())} NaN, the first for row {row} of "
                f"{layer.parameter!r}; look for NaN or infinite weights or gradients in the model that was scored."
            )


def neuron_weight_change(
    model: Source, reference: Source, *, ord: float = 1, index: NeuronIndex | None = None
) -> NeuronScores:
    """The norm of the weight difference of every neuron between `model` and `reference`.

    With ord=1 this is the neuron weight change (NWC) of TSBD (Lin et al., NeurIPS 2024). It is not divided by
    the number of weights of a neuron, so wide neurons score higher.

    Args:
        model: The changed model; a state dict will do if `index` is given.
        reference: The model before the change, or its state dict: same architecture, dtype and device.
        ord: 1, 2 or inf.
        index: The neurons to score; by default all of `model`, without the scales of normalisation layers.

    Raises:
        TypeError: `model` or `reference` is of another type.
        ValueError: The two differ in names, shapes, dtype or device, or there are no neurons.
    """
    index = index_of(model, index)
    rows, references = aligned_rows(index.layers, {"model": model, "reference": reference})
    return NeuronScores(ops.neuron_norms(rows, references, ord=ord), index.layers)


def neuron_gradient_norm(model: nn.Module, *, ord: float = 1, index: NeuronIndex | None = None) -> NeuronScores:
    """The norm of the gradient of every neuron's weights, taken from `.grad`.

    With ord=1 this is the neuron activeness of TSBD (Lin et al., NeurIPS 2024) for one batch. A parameter
    without a gradient scores 0.

    Args:
        model: The model after `backward()`.
        ord: 1, 2 or inf.
        index: The neurons to score; by default all of `model`, without the scales of normalisation layers.

    Raises:
        ValueError: No neuron has a gradient, or gradients differ in dtype or device.
    """
    index = index_of(model, index)
    rows = aligned_rows(index.layers, {"model": model})[0]
    gradients: Mapping[str, Tensor] = {
        name: parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        for name, parameter in named_tensors(model, "model").items()
        if parameter.grad is not None
    }
    present = [layer for layer in index.layers if layer.parameter in gradients]
    if not present:
        raise ValueError(
            f"neuron_gradient_norm: model: expected a gradient in at least one of the {len(index.layers)} parameters "
            "that hold neurons, got none; call loss.backward() first, and do not clear the gradients before this."
        )
    norms = ops.neuron_norms(aligned_rows(present, {"gradient of model": gradients})[0], ord=ord)
    if len(present) == len(index.layers):
        return NeuronScores(norms, index.layers)
    values = torch.zeros(len(index), dtype=norms.dtype, device=rows[0].device)
    for layer, part in zip(present, norms.split([len(layer) for layer in present]), strict=True):
        values[layer.start : layer.stop] = part
    return NeuronScores(values, index.layers)


def index_of(model: Source, index: NeuronIndex | None) -> NeuronIndex:
    """The given index, or that of the whole model."""
    if index is not None:
        return index
    # Refuses a state dict, which does not say which of its tensors hold neurons.
    return NeuronIndex(model)  # type: ignore[arg-type]
