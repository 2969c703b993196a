"""Files: safe checkpoints."""

from bdfast.io.weights import load_into, load_weights, save_weights

__all__ = ["load_into", "load_weights", "save_weights"]
