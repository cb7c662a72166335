"""Lite Vision Transformer (LVT), an encoder about as large as MiT-B0."""

from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transkd.layers.attention import attend
from transkd.layers.patch_embedding import OverlapPatchEmbedding, init_vision_weights
from transkd.layers.token_linear import TokenLinear
from transkd.layers.token_norm import TokenNorm
from transkd.models.encoders.drop_path import DropPath
from transkd.models.encoders.mit import check_heads, check_size, to_tokens

__all__ = ["LiteVisionTransformer"]

# Maps inside a stage are [B, H, W, C] for linear layers and LayerNorm; convolutions use a permuted view.


def channels_first(x: Tensor) -> Tensor:
    """View a map [B, H, W, C] as [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """View a map [B, C, H, W] as [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


class ConvolutionalAttention(nn.Module):
    """Convolutional self-attention, CSA (Lite Vision Transformer, arXiv 2112.10809).

    3×3 windows (P = 9 positions) with stride 2. Each position has its own C→C matrix, as in a convolution, and the nine
    results attend to each other. There are no queries and keys: a linear layer predicts the P·P attention logits per
    head from the mean of 2×2 pixels. Outputs of overlapping windows are added.
    """

    KERNEL, STRIDE, PADDING = 3, 2, 1

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        positions = self.KERNEL**2
        self.logits = TokenLinear(channels, heads * positions**2)
        self.value = nn.Conv2d(positions * channels, positions * channels, 1, groups=positions, bias=False)
        self.proj = TokenLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] to map [B, H, W, C]; L windows inside, D = C / heads."""
        image, positions = channels_first(x), self.KERNEL**2

        pooled = channels_last(F.avg_pool2d(image, self.STRIDE, ceil_mode=True))  # ceil_mode: one pixel per window
        logits = self.logits(pooled).unflatten(3, (self.heads, positions, positions)).flatten(1, 2)
        attention = (logits * self.scale).softmax(dim=-1)  # [B, L, heads, P, P]

        windows = F.unfold(image, self.KERNEL, padding=self.PADDING, stride=self.STRIDE)  # [B, C·P, L]
        by_position = windows.view(x.shape[0], x.shape[3], positions, -1).transpose(1, 2)  # [B, P, C, L]
        values = self.value(by_position.flatten(1, 2)[..., None]).squeeze(3).unflatten(1, (positions, self.heads, -1))

        attended = attention @ values.permute(0, 4, 2, 1, 3)  # [B, L, heads, P, D]
        columns = attended.permute(0, 2, 4, 3, 1).flatten(1, 3)  # [B, C·P, L]
        folded = F.fold(columns, image.shape[-2:], self.KERNEL, padding=self.PADDING, stride=self.STRIDE)
        return self.proj(channels_last(folded))


class AtrousAttention(nn.Module):
    """Recursive atrous self-attention, RASA (Lite Vision Transformer, arXiv 2112.10809).

    Keys and values come from a map downsampled by ``reduction``, as in MiT. Queries have three scales: the same
    depth-wise 3×3 convolution is applied to them at three dilations. Attention is applied twice, the second time to the
    input plus the first result.
    """

    DILATIONS = (1, 3, 5)

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.q = TokenLinear(channels, channels, bias=False)
        self.atrous = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        self.kv = TokenLinear(channels, 2 * channels, bias=False)
        self.proj = TokenLinear(channels, channels)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction)
            self.norm = TokenNorm(channels, eps=1e-5)

    def attend(self, x: Tensor) -> Tensor:
        """Apply attention once, map [B, H, W, C] to map [B, H, W, C]."""
        queries = channels_first(self.q(x))
        weight, groups = self.atrous.weight, self.atrous.groups
        scales = [F.silu(F.conv2d(queries, weight, padding=d, dilation=d, groups=groups)) for d in self.DILATIONS]
        query = channels_last(
            reduce(torch.add, scales)
        ).contiguous()  # contiguous channels for the fused attention kernels

        context = self.norm(channels_last(self.sr(channels_first(x)))) if self.reduction > 1 else x
        attended = attend(query.flatten(1, 2), self.kv(context.flatten(1, 2)), self.heads)
        return self.proj(attended).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] to map [B, H, W, C]."""
        first = F.silu(self.attend(x))
        return F.silu(self.attend(first + x))


class MLP(nn.Module):
    """Two linear layers, used in stage 1."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(channels, hidden)
        self.fc2 = TokenLinear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] to map [B, H, W, C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class ConvMLP(nn.Module):
    """Two 1×1 convolutions with a depth-wise 3×3 convolution between them, used in stages 2 to 4."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] to map [B, H, W, C]."""
        return channels_last(self.fc2(F.gelu(self.dwconv(self.fc1(channels_first(x))))))


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with a residual and stochastic depth."""

    def __init__(self, channels: int, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = TokenNorm(channels, eps=1e-5)
        self.attn = attn
        self.norm2 = TokenNorm(channels, eps=1e-5)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] to map [B, H, W, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LiteVisionTransformer(nn.Module):
    """Lite Vision Transformer encoder (LVT, Yang et al., arXiv 2112.10809), by default of the published size.

    Four stages at strides 4, 8, 16 and 32. Stage 1 uses convolutional self-attention, the others recursive atrous
    self-attention. Unlike in MiT, there is no LayerNorm after a stage, and the returned patch embeddings are those
    before their LayerNorm.

    Args:
        channels: channels of each stage.
        depths: number of blocks of each stage.
        heads: attention heads of each stage.
        mlp_ratios: hidden channels of each stage's MLP divided by the stage's channels.
        reductions: key/value reduction of each stage; not used in stage 1, which has no keys.
        drop_path_rate: stochastic depth of the last block; increases linearly from 0 over the blocks.
        in_chans: channels of the image.

    Shapes:
        image [B, in_chans, H, W], H and W at least 32 -> four features [B, C_i, H_i, W_i] and four patch
        embeddings [B, H_i·W_i, C_i].

    Example:
        >>> encoder = LiteVisionTransformer()
        >>> features, embeddings = encoder.forward_stages(torch.zeros(1, 3, 64, 96))
        >>> [tuple(feature.shape) for feature in features]
        [(1, 64, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (2, 2, 5, 8),
        mlp_ratios: Sequence[int] = (4, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.grad_checkpointing = False
        drop_rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for i, width in enumerate(channels):
            previous = channels[i - 1] if i else in_chans
            kernel_size, stride = (3, 2) if i else (7, 4)
            embed = OverlapPatchEmbedding(previous, width, kernel_size, stride)
            hidden = mlp_ratios[i] * width
            blocks = nn.ModuleList()
            for _ in range(depths[i]):
                attn = AtrousAttention(width, heads[i], reductions[i]) if i else ConvolutionalAttention(width, heads[i])
                mlp = ConvMLP(width, hidden) if i else MLP(width, hidden)
                blocks.append(Block(width, attn, mlp, next(drop_rates)))
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", blocks)
        self.apply(init_vision_weights)

    def forward_stages(self, image: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return features and patch embeddings of the four stages."""
        check_size("LVT", image)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        features, embeddings = [], []
        feature = image
        for i in range(1, len(self.channels) + 1):
            embed = cast(OverlapPatchEmbedding, self.get_submodule(f"patch_embed{i}"))
            embedded = embed.proj(feature)
            embeddings.append(to_tokens(embedded))
            x = embed.norm(channels_last(embedded))
            for block in self.get_submodule(f"block{i}").children():
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            feature = channels_first(x)
            features.append(feature)
        return tuple(features), tuple(embeddings)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing: the backward pass recomputes each block."""
        self.grad_checkpointing = enable
