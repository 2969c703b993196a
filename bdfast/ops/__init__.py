"""The multi-tensor operations on neurons; each takes the parameters of a whole model in one call.

Letters used throughout: T tensors in a list, R rows (neurons) over the whole list in list order, C columns of
a row. A *neuron* is one index of dimension 0, a *sub-weight* is one number of it, and the *change* of a
sub-weight is ``abs(x - ref)``, taken in float32 (in float64 for float64 tensors).
"""

from bdfast.ops.kth_largest_change import kth_largest_change
from bdfast.ops.neuron_norms import neuron_norms
from bdfast.ops.perturb import perturb_
from bdfast.ops.scale_neurons import scale_neurons_
from bdfast.ops.sharp_step import sharp_step_
from bdfast.ops.zero_changed import zero_changed_

__all__ = ["kth_largest_change", "neuron_norms", "perturb_", "scale_neurons_", "sharp_step_", "zero_changed_"]
