"""Overlapping patch embedding, shared by the MiT encoder and the Embedding Assistant."""

import math

from torch import Tensor, nn

from transkd.layers.token_norm import TokenNorm

__all__ = ["OverlapPatchEmbedding", "init_vision_weights"]


class OverlapPatchEmbedding(nn.Module):
    """Strided convolution whose windows overlap, then LayerNorm over the channels (arXiv 2105.15203, section 3.1).

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the embedding.
        kernel_size: window; padding is half of it.
        stride: step between windows, in input pixels.

    Shapes:
        [B, in_channels, H, W] -> tokens [B, N, out_channels] and the grid (H', W') with N = H'·W' in raster order.

    Example:
        >>> import torch
        >>> tokens, grid = OverlapPatchEmbedding(3, 32, kernel_size=7, stride=4)(torch.zeros(1, 3, 64, 96))
        >>> tokens.shape, grid
        (torch.Size([1, 384, 32]), (16, 24))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        self.norm = TokenNorm(out_channels, eps=1e-5)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed an image or a feature map."""
        embedded = self.proj(image)
        height, width = embedded.shape[-2:]
        return self.norm(embedded.flatten(2).transpose(1, 2)), (height, width)


def init_vision_weights(module: nn.Module) -> None:
    """Initialise one layer as MiT does; for ``module.apply``.

    Linear weights: truncated normal, σ 0.02. Convolution weights: normal with σ = sqrt(2 / fan_out), fan_out counted
    per group. Biases 0; LayerNorm 1 and 0 as PyTorch has them.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
