"""Find and remove backdoors in trained PyTorch networks, from a small clean set, fast.

result = bdfast.purify(model, clean)
metrics = bdfast.evaluate(result.model, test, triggered)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bdfast._version import __version__

if TYPE_CHECKING:
    from bdfast import ops as ops
    from bdfast.attacks import BadNets as BadNets
    from bdfast.attacks import Blended as Blended
    from bdfast.data.augment import Augmentation as Augmentation
    from bdfast.data.poison import Triggered as Triggered
    from bdfast.data.poison import poisoned as poisoned
    from bdfast.defenses import FTSAM as FTSAM
    from bdfast.defenses import TSBD as TSBD
    from bdfast.defenses import PathAwareTuning as PathAwareTuning
    from bdfast.defenses import PurifyResult as PurifyResult
    from bdfast.evaluation import Evaluator as Evaluator
    from bdfast.evaluation import Metrics as Metrics
    from bdfast.evaluation import evaluate as evaluate
    from bdfast.inversion import BTIDBF as BTIDBF
    from bdfast.inversion import Inversion as Inversion
    from bdfast.inversion import invert_trigger as invert_trigger
    from bdfast.methods import list_methods as list_methods
    from bdfast.neurons import NeuronIndex as NeuronIndex
    from bdfast.ops.backends import backends as backends
    from bdfast.ops.backends import use_backend as use_backend
    from bdfast.purification import purify as purify
    from bdfast.reinitialization import prune_neurons as prune_neurons
    from bdfast.reinitialization import reinitialize as reinitialize
    from bdfast.scores import NeuronScores as NeuronScores
    from bdfast.scores import neuron_gradient_norm as neuron_gradient_norm
    from bdfast.scores import neuron_weight_change as neuron_weight_change
    from bdfast.sharpness import PAM as PAM
    from bdfast.sharpness import SAM as SAM
    from bdfast.sharpness import GradientNorm as GradientNorm
    from bdfast.sharpness.perturbed import perturbed as perturbed

# Loaded at first use, so that `import bdfast` costs no more than `import torch`.
_MODULES = {
    "Augmentation": "data.augment",
    "BTIDBF": "inversion",
    "BadNets": "attacks",
    "Blended": "attacks",
    "Evaluator": "evaluation",
    "FTSAM": "defenses",
    "GradientNorm": "sharpness",
    "Inversion": "inversion",
    "Metrics": "evaluation",
    "NeuronIndex": "neurons",
    "NeuronScores": "scores",
    "PAM": "sharpness",
    "PathAwareTuning": "defenses",
    "PurifyResult": "defenses",
    "SAM": "sharpness",
    "TSBD": "defenses",
    "Triggered": "data.poison",
    "backends": "ops.backends",
    "evaluate": "evaluation",
    "invert_trigger": "inversion",
    "list_methods": "methods",
    "neuron_gradient_norm": "scores",
    "neuron_weight_change": "scores",
    "perturbed": "sharpness",
    "poisoned": "data.poison",
    "prune_neurons": "reinitialization",
    "purify": "purification",
    "reinitialize": "reinitialization",
    "use_backend": "ops.backends",
}

__all__ = ["__version__", "ops", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("bdfast.ops")
    if name not in _MODULES:
        raise AttributeError(f"module 'bdfast' has no attribute {name!r}")
    value = getattr(import_module(f"bdfast.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
