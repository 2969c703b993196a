"""Vision transformer (Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021) for small images.

Names are those of timm and DeiT (`patch_embed`, `blocks`, `attn.qkv`, ...), so that their weights load. Queries, keys
and values come from one `nn.Linear`, whose rows bdfast knows as neurons.
"""

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.models.sizes import check_sizes

MOST_PATCHES = 14
"""Patches along a side that the published networks have at 224 pixels."""


class PatchEmbedding(nn.Module):
    """One vector per patch."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> [B, patches, width], row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, tokens, width] -> the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, D]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between; four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, tokens, width] -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, tokens, width] -> the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """`depth` blocks on the patches of the image and a class token, whose last value is classified.

    Positions are learned, so the network takes images of one size. Fresh weights are drawn as published, except those
    of the classifier: they start small in place of zero, so that the first gradient reaches all parameters. There is
    no dropout.

    Args:
        num_classes: Number of outputs.
        image_size: Height and width of the images, in pixels.
        width: Length of the vector of a patch. 192 is ViT-Ti (Touvron et al., "Training data-efficient image
            transformers", 2021; 5.4 M parameters without the classifier), 768 with `heads=12` the ViT-B of the paper.
        depth: Number of blocks; 12 is published.
        heads: Heads of the attention, a divisor of the width. When left out, one per 64 of the width as published, and
            at least 2.
        in_channels: Channels of the input image.
        patch_size: Height and width of a patch, in pixels, a divisor of `image_size`. When left out, the smallest
            divisor from 4 with at most 14 patches along a side: 4 for images of 28 and 32 pixels, 16 for 224.

    Raises:
        ValueError: A size is no whole number of at least 1, or does not divide what it has to divide.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int = 32,
        width: int = 192,
        depth: int = 12,
        heads: int | None = None,
        in_channels: int = 3,
        patch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, image_size=image_size, width=width, depth=depth, in_channels=in_channels)
        heads = max(2, width // 64) if heads is None else heads
        patch_size = _patch_size(image_size) if patch_size is None else patch_size
        check_sizes(heads=heads, patch_size=patch_size)
        if image_size % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of the image size, {image_size}, got {patch_size}; choose one, or "
                "scale the images."
            )
        if width % heads:
            raise ValueError(
                f"width: expected a multiple of the number of heads, {heads}, got {width}; choose "
                f"{width + heads - width % heads}, or another number of heads."
            )
        self.image_size = image_size
        self.patch_embed = PatchEmbedding(in_channels, width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self._draw()

    def _draw(self) -> None:
        nn.init.normal_(self.pos_embed, std=0.02)
        projection = self.patch_embed.proj
        nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                # Queries, keys and values are three layers in one, and each is drawn by its own size.
                for part in module.weight.chunk(3) if name.endswith("qkv") else [module.weight]:
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, image_size, image_size] -> logits [B, num_classes].

        Raises:
            ValueError: The images have another size, or are not square.
        """
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"x: expected square images of {self.image_size}x{self.image_size} pixels, got "
                f"{'x'.join(map(str, x.shape[-2:]))}; scale or crop them, or build the network with another image_size."
            )
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def _patch_size(image_size: int) -> int:
    smallest = max(4, -(-image_size // MOST_PATCHES))
    for size in range(smallest, image_size // 4 + 1):
        if image_size % size == 0:
            return size
    raise ValueError(
        f"image_size: expected one that square patches of 4 pixels or more divide into 4 to {MOST_PATCHES} a side, got "
        f"{image_size}; scale the images, to 28, 32 or 64 pixels for example, or give patch_size."
    )
