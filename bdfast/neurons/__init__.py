"""Neurons: an index of them, scores per neuron, and zeroing."""

from bdfast.neurons.index import NeuronIndex, NeuronLayer
from bdfast.neurons.reinitialization import Reinitialized, prune_neurons, reinitialize
from bdfast.neurons.rules import register_neurons
from bdfast.neurons.scores import NeuronScores, neuron_gradient_norm, neuron_weight_change

__all__ = [
    "NeuronIndex",
    "NeuronLayer",
    "NeuronScores",
    "Reinitialized",
    "neuron_gradient_norm",
    "neuron_weight_change",
    "prune_neurons",
    "register_neurons",
    "reinitialize",
]
