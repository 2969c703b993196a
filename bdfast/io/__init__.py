"""Files: safe checkpoints."""

from bdfast.io.checkpoints import load_into, load_weights, save_weights

__all__ = ["load_into", "load_weights", "save_weights"]
