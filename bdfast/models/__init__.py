"""Networks: PreAct-ResNet18 of any width, torchvision's classifiers, and input normalisation."""

from bdfast.models.normalization import Normalize, normalized
from bdfast.models.preact_resnet import PreActResNet18
from bdfast.models.spec import ARCHITECTURES, ModelSpec, register_model

__all__ = ["ARCHITECTURES", "ModelSpec", "Normalize", "PreActResNet18", "normalized", "register_model"]
