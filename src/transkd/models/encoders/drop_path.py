"""Stochastic depth whose compiled code does not depend on the rate."""

import torch
from timm.layers import drop
from torch import Tensor

__all__ = ["DropPath"]


class DropPath(drop.DropPath):
    """timm's ``DropPath``; under ``torch.compile`` the rate is a tensor.

    So blocks of unlike rates above 0 share their compiled code, and in eval so do all blocks.

    Args:
        drop_prob: share of the images whose path is dropped in training.

    Example:
        >>> DropPath(0.5).eval()(torch.ones(2, 3)).sum()
        tensor(6.)
    """

    keep: Tensor

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(()), persistent=False)
        self.drop_prob = drop_prob

    @property
    def drop_prob(self) -> float:
        """The rate; can be set."""
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, rate: float) -> None:
        self._drop_prob, self._drops = rate, rate > 0
        if hasattr(self, "keep"):  # missing while timm's constructor runs
            self.keep = torch.full_like(self.keep, 1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, …] to the same."""
        if not (self.training and self._drops):
            return x
        if not torch.compiler.is_compiling():
            dropped: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return dropped
        kept = torch.rand(x.shape[:1] + (1,) * (x.ndim - 1), device=x.device) < self.keep
        return x * (kept / self.keep.clamp_min(torch.finfo(torch.float32).tiny)).to(x.dtype)
