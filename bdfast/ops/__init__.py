"""Multi-tensor operations on neurons; each takes the parameters of a whole model in one call.

Letters used throughout: T tensors in a list, R rows (neurons) over the whole list in list order, C columns of
a row. A *neuron* is one index of dimension 0, a *sub-weight* is one number of it, and the *change* of a
sub-weight is ``abs(x - ref)``, taken in float32 (in float64 for float64 tensors).
"""

from bdfast.ops.kth_largest_change_op import kth_largest_change
from bdfast.ops.neuron_norms_op import neuron_norms
from bdfast.ops.perturb_op import Mode, Scope, perturb_
from bdfast.ops.scale_neurons_op import scale_neurons_
from bdfast.ops.sharp_step_op import sharp_step_
from bdfast.ops.zero_changed_op import zero_changed_

__all__ = [
    "Mode",
    "Scope",
    "kth_largest_change",
    "neuron_norms",
    "perturb_",
    "scale_neurons_",
    "sharp_step_",
    "zero_changed_",
]
