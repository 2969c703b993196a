"""Data: images in memory, batches on a device, and views of a data set through an attack."""

from bdfast.data.images import ImageTensors
from bdfast.data.poison import Triggered, poisoned

__all__ = ["ImageTensors", "Triggered", "poisoned"]
