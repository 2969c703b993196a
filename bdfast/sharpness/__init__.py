"""Steps that look around the weights before they move them: SAM, its relatives, and what they share."""

from bdfast.sharpness.finite import check_finite_gradients
from bdfast.sharpness.gradient_norm import GradientNorm
from bdfast.sharpness.optimizer import SharpOptimizer
from bdfast.sharpness.pam import PAM
from bdfast.sharpness.perturbed import perturbed
from bdfast.sharpness.sam import SAM

__all__ = ["PAM", "SAM", "GradientNorm", "SharpOptimizer", "check_finite_gradients", "perturbed"]
