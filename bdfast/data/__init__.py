"""Data: images in memory, batches on a device, named data sets, augmentation."""

from bdfast.data.images import ImageTensors

__all__ = ["ImageTensors"]
