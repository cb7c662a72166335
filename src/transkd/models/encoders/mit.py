"""Mix Transformer (MiT-B0…B5), the encoder of SegFormer, registered with timm."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transkd.errors import UserError
from transkd.layers.attention import attend
from transkd.layers.patch_embedding import OverlapPatchEmbedding, init_vision_weights
from transkd.layers.token_linear import TokenLinear
from transkd.layers.token_norm import TokenNorm
from transkd.models.encoders.drop_path import DropPath

__all__ = ["MixTransformer"]


def check_size(name: str, image: Tensor) -> None:
    """Check that an image [B, 3, H, W] is at least 32×32.

    Raises:
        UserError: it is smaller; names the encoder.
    """
    if min(image.shape[-2:]) < 32:
        raise UserError(
            f"{name} needs an image of at least 32×32 pixels, got {image.shape[-2]}×{image.shape[-1]}: "
            "its deepest stage has stride 32. Resize or pad the image."
        )


def check_heads(channels: int, heads: int) -> None:
    """Check that a stage's channels can be split over its attention heads.

    Raises:
        UserError: they cannot.
    """
    if heads < 1 or channels % heads:
        raise UserError(f"a stage of {channels} channels cannot have {heads} attention heads: expected a divisor")


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens [B, N, C] as a map [B, C, H, W]; no copy, the map is channels-last in memory."""
    # reshape before permute: a batch of one then also has channels-last strides, which convolutions check
    return tokens.reshape(tokens.shape[0], *grid, -1).permute(0, 3, 1, 2)


def to_tokens(feature_map: Tensor) -> Tensor:
    """View a map [B, C, H, W] as tokens [B, N, C]; no copy when the map is channels-last in memory."""
    return feature_map.flatten(2).transpose(1, 2)


class EfficientAttention(nn.Module):
    """Multi-head self-attention with keys and values downsampled by ``reduction`` (arXiv 2105.15203, section 3.1)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.q = TokenLinear(channels, channels)
        self.kv = TokenLinear(channels, 2 * channels)
        self.proj = TokenLinear(channels, channels)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction)
            self.norm = TokenNorm(channels, eps=1e-5)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, C] on their grid (H, W) to tokens [B, N, C]."""
        context = tokens
        if self.reduction > 1:
            context = self.norm(to_tokens(self.sr(to_map(tokens, grid))))
        return self.proj(attend(self.q(tokens), self.kv(context), self.heads))


class DepthwiseConv(nn.Module):
    """3×3 depth-wise convolution of tokens; a separate module for the published parameter names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, C] to tokens [B, N, C]."""
        return to_tokens(self.dwconv(to_map(tokens, grid)))


class MixFFN(nn.Module):
    """Two linear layers with a depth-wise convolution between them, which replaces a position encoding."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = TokenLinear(hidden, channels)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, C] to tokens [B, N, C]."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), grid)))


class Block(nn.Module):
    """Pre-norm transformer block: attention and Mix-FFN, each with a residual and stochastic depth."""

    def __init__(self, channels: int, heads: int, reduction: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = TokenNorm(channels, eps=1e-6)
        self.attn = EfficientAttention(channels, heads, reduction)
        self.norm2 = TokenNorm(channels, eps=1e-6)
        self.mlp = MixFFN(channels, mlp_ratio * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, C] to tokens [B, N, C]."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), grid))


class MixTransformer(nn.Module):
    """Mix Transformer encoder (SegFormer, Xie et al., arXiv 2105.15203, section 3.1).

    Four stages at strides 4, 8, 16 and 32. Parameter names are those of the published ImageNet checkpoints
    (``patch_embed1…4``, ``block1…4``, ``norm1…4``).

    Args:
        channels: channels of each stage.
        depths: number of blocks of each stage.
        heads: attention heads of each stage.
        reductions: key/value reduction of each stage.
        mlp_ratio: hidden channels of the Mix-FFN divided by the stage's channels.
        drop_path_rate: stochastic depth of the last block; increases linearly from 0 over the blocks.
        in_chans: channels of the image.
        num_classes: outputs of the ImageNet classifier; 0 for none.

    Raises:
        UserError: the stages' numbers do not fit each other.

    Shapes:
        image [B, in_chans, H, W], H and W at least 32 -> four features [B, C_i, H_i, W_i] and four patch
        embeddings [B, H_i·W_i, C_i].

    Example:
        >>> encoder = MixTransformer(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), heads=(1, 2, 3, 4), num_classes=0)
        >>> features, embeddings = encoder.forward_stages(torch.zeros(1, 3, 64, 96))
        >>> [tuple(feature.shape) for feature in features]
        [(1, 8, 16, 24), (1, 16, 8, 12), (1, 24, 4, 6), (1, 32, 2, 3)]
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: int = 4,
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not len(channels) == len(depths) <= len(heads) or min(depths) < 1 or not 0 <= drop_path_rate < 1:
            raise UserError(
                f"expected as many depths as channels, each at least 1, and a drop_path_rate from 0 to below 1; got "
                f"channels={channels}, depths={depths}, drop_path_rate={drop_path_rate}"
            )
        self.channels = tuple(channels)
        self.grad_checkpointing = False
        self.num_features = self.head_hidden_size = self.channels[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"norm{i + 1}"} for i, width in enumerate(channels)
        ]
        drop_rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for i, width in enumerate(channels):
            previous = channels[i - 1] if i else in_chans
            kernel_size, stride = (3, 2) if i else (7, 4)
            embed = OverlapPatchEmbedding(previous, width, kernel_size, stride)
            blocks = [Block(width, heads[i], reductions[i], mlp_ratio, next(drop_rates)) for _ in range(depths[i])]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", TokenNorm(width, eps=1e-6))
        self.apply(init_vision_weights)
        self.reset_classifier(num_classes)

    def forward_stages(
        self, image: Tensor, num_stages: int | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return features and patch embeddings of the first ``num_stages`` stages, by default of all."""
        check_size("MiT", image)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        features, embeddings = [], []
        feature = image
        for i in range(1, (num_stages or len(self.channels)) + 1):
            tokens, grid = self.get_submodule(f"patch_embed{i}")(feature)
            embeddings.append(tokens)
            for block in self.get_submodule(f"block{i}").children():
                tokens = checkpoint(block, tokens, grid, use_reentrant=False) if recompute else block(tokens, grid)
            feature = to_map(self.get_submodule(f"norm{i}")(tokens), grid)
            features.append(feature)
        return tuple(features), tuple(embeddings)

    # The methods below implement timm's interface of an image classifier with feature extraction.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing: the backward pass recomputes each block."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the stages' maps in NCHW, as timm's feature extraction."""
        if output_fmt != "NCHW":
            raise UserError(f"MiT returns NCHW maps, got output_fmt={output_fmt!r}")
        selected, deepest = feature_take_indices(len(self.channels), indices)
        features, _ = self.forward_stages(x, deepest + 1 if stop_early else None)
        chosen = [features[i] for i in selected]
        return chosen if intermediates_only else (features[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages deeper than the deepest requested one."""
        selected, deepest = feature_take_indices(len(self.channels), indices)
        for i in range(deepest + 2, len(self.channels) + 1):
            for name in (f"patch_embed{i}", f"block{i}", f"norm{i}"):
                delattr(self, name)
        self.channels = self.channels[: deepest + 1]
        if prune_head:
            self.reset_classifier(0)
        return list(selected)

    def get_classifier(self) -> nn.Module:
        """Return the ImageNet classifier, or ``nn.Identity``."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the ImageNet classifier; 0 removes it."""
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(self.channels[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(init_vision_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the deepest map [B, C_4, H/32, W/32]."""
        return self.forward_stages(x)[0][-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average over positions and apply the classifier."""
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Return ImageNet logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "mit_b0": {"channels": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "mit_b1": {"channels": (64, 128, 320, 512), "depths": (2, 2, 2, 2)},
    "mit_b2": {"channels": (64, 128, 320, 512), "depths": (3, 4, 6, 3)},
    "mit_b3": {"channels": (64, 128, 320, 512), "depths": (3, 4, 18, 3)},
    "mit_b4": {"channels": (64, 128, 320, 512), "depths": (3, 8, 27, 3)},
    "mit_b5": {"channels": (64, 128, 320, 512), "depths": (3, 6, 40, 3)},
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed1.proj",
            "classifier": "head",
        }
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    if pretrained:
        raise UserError(f"timm hosts no weights for {name}: give a file with weights=PATH instead of pretrained=True")
    feature_cfg = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"}
    model: MixTransformer = build_model_with_cfg(
        MixTransformer, name, pretrained, feature_cfg=feature_cfg, **{**VARIANTS[name], **kwargs}
    )
    return model


@register_model
def mit_b0(pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    """MiT-B0, 3.3 M parameters."""
    return _create("mit_b0", pretrained, **kwargs)


@register_model
def mit_b1(pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    """MiT-B1, 13.2 M parameters."""
    return _create("mit_b1", pretrained, **kwargs)


@register_model
def mit_b2(pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    """MiT-B2, 24.2 M parameters."""
    return _create("mit_b2", pretrained, **kwargs)


@register_model
def mit_b3(pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    """MiT-B3, 44.1 M parameters."""
    return _create("mit_b3", pretrained, **kwargs)


@register_model
def mit_b4(pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    """MiT-B4, 60.8 M parameters."""
    return _create("mit_b4", pretrained, **kwargs)


@register_model
def mit_b5(pretrained: bool = False, **kwargs: Any) -> MixTransformer:
    """MiT-B5, 81.4 M parameters."""
    return _create("mit_b5", pretrained, **kwargs)
