"""Networks: bdfast's own of any width, those of torchvision, of timm and of users by name; input normalisation."""

from bdfast.models.convnext import SmallConvNeXt
from bdfast.models.mobilenet import SmallMobileNetV2
from bdfast.models.normalization import Normalize, normalized
from bdfast.models.preact_resnet import PreActResNet18
from bdfast.models.spec import ARCHITECTURES, ModelSpec, register_model
from bdfast.models.vgg import SmallVGG
from bdfast.models.vit import SmallViT

__all__ = [
    "ARCHITECTURES",
    "ModelSpec",
    "Normalize",
    "PreActResNet18",
    "SmallConvNeXt",
    "SmallMobileNetV2",
    "SmallVGG",
    "SmallViT",
    "normalized",
    "register_model",
]
