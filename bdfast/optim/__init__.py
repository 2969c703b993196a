"""Optimizers that take the gradient at perturbed weights: SAM, GradientNorm, PAM; and `perturbed`, a context."""

from bdfast.optim.gradient_norm import GradientNorm
from bdfast.optim.path_aware import PAM
from bdfast.optim.perturbation import perturbed
from bdfast.optim.sharp_optimizer import SharpOptimizer
from bdfast.optim.sharpness_aware import SAM

__all__ = ["PAM", "SAM", "GradientNorm", "SharpOptimizer", "perturbed"]
