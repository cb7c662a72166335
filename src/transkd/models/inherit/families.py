"""Views of the encoders that can be solved, with the same names for the parts of each family."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from transkd.layers.attention import attend
from transkd.models.encoders.mit import MixTransformer, to_map, to_tokens
from transkd.models.encoders.timm_encoder import TimmEncoder

__all__ = ["Attention", "Block", "FeedForward", "Stage", "stages_of"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; keys and values come from a map reduced by a strided convolution, if ``reduce`` is set."""

    q: nn.Linear
    kv: nn.Linear
    proj: nn.Linear
    heads: int
    reduce: nn.Conv2d | None
    norm: nn.LayerNorm | None

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.q.out_features // self.heads

    def shrunk(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Reduced map before its norm: tokens [B, N, C] to [B, M, C]."""
        assert self.reduce is not None
        return to_tokens(self.reduce(to_map(tokens, grid)))

    def context(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Input of keys and values, [B, M, C]."""
        return tokens if self.norm is None else self.norm(self.shrunk(tokens, grid))

    def attended(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Concatenated outputs of the heads, [B, N, C]."""
        return attend(self.q(tokens), self.kv(context), self.heads)

    def __call__(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, N, C] on their grid to tokens [B, N, C]."""
        return self.proj(self.attended(tokens, self.context(tokens, grid)))


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with a depth-wise convolution and GELU between them (Mix-FFN)."""

    fc1: nn.Linear
    depthwise: nn.Conv2d
    fc2: nn.Linear

    def filtered(self, hidden: Tensor, grid: Grid) -> Tensor:
        """Depth-wise convolution of hidden units [B, N, H]."""
        return to_tokens(self.depthwise(to_map(hidden, grid)))

    def activated(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Activations of the hidden units [B, N, H]."""
        return F.gelu(self.filtered(self.fc1(tokens), grid))

    def __call__(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, N, C] on their grid to tokens [B, N, C]."""
        return self.fc2(self.activated(tokens, grid))


@dataclass(frozen=True)
class Block:
    """Pre-norm transformer block."""

    norm1: nn.LayerNorm
    attention: Attention
    norm2: nn.LayerNorm
    ffn: FeedForward

    def attend(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Attention with its residual connection."""
        return tokens + self.attention(self.norm1(tokens), grid)

    def feed(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Mix-FFN with its residual connection."""
        return tokens + self.ffn(self.norm2(tokens), grid)

    def __call__(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, N, C] on their grid to tokens [B, N, C]."""
        return self.feed(self.attend(tokens, grid), grid)


@dataclass(frozen=True)
class Stage:
    """Patch embedding (strided convolution, norm), blocks, norm."""

    embed: nn.Conv2d
    embed_norm: nn.LayerNorm
    blocks: Sequence[Block]
    norm: nn.LayerNorm

    @property
    def width(self) -> int:
        """Channels of the stage."""
        return self.embed.out_channels


def stages_of(encoder: nn.Module) -> list[Stage] | None:
    """The stages of MiT or PVTv2; None for another encoder."""
    if isinstance(encoder, MixTransformer):
        return [
            _stage(encoder.get_submodule(f"patch_embed{i}"), encoder.get_submodule(f"block{i}"), f"norm{i}", encoder)
            for i in range(1, len(encoder.channels) + 1)
        ]
    if isinstance(encoder, TimmEncoder) and re.fullmatch(r"pvt_v2_b\d", encoder.architecture):
        modules = dict(encoder.body.named_children())
        return [
            _stage(modules["patch_embed"] if i == 0 else stage.downsample, stage.blocks, "norm", stage)
            for i, stage in enumerate(modules[f"stages_{i}"] for i in range(len(encoder.channels)))
        ]
    return None


def _stage(embed: Any, blocks: nn.Module, norm: str, owner: nn.Module) -> Stage:
    return Stage(
        embed.proj,
        embed.norm,
        [_block(block) for block in blocks.children()],
        cast(nn.LayerNorm, owner.get_submodule(norm)),
    )


def _block(block: Any) -> Block:
    attn, mlp = block.attn, block.mlp
    reduce = getattr(attn, "sr", None)
    heads = attn.heads if hasattr(attn, "heads") else attn.num_heads
    depthwise = mlp.dwconv if isinstance(mlp.dwconv, nn.Conv2d) else mlp.dwconv.dwconv
    return Block(
        block.norm1,
        Attention(attn.q, attn.kv, attn.proj, heads, reduce, None if reduce is None else attn.norm),
        block.norm2,
        FeedForward(mlp.fc1, depthwise, mlp.fc2),
    )
