"""Linear layers on tokens, shared by encoders and terms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.layers.choices import CHOICES

__all__ = ["TokenLinear", "convolved_row", "token_linear"]

ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; on a CPU computed as a 1×1 convolution over an image of one row where that is faster.

    PyTorch's CPU convolutions use oneDNN, which on some processors is twice as fast as MKL, used by ``F.linear``
    (docs/performance.md); ``transkd.layers.choices`` says which one to use.

    Args:
        x: [..., in]; fastest if contiguous.
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].

    Example:
        >>> token_linear(torch.ones(2, 3, 4), torch.full((5, 4), 0.5), torch.ones(5)).unique()
        tensor([3.])
    """
    if not ONEDNN or x.device.type != "cpu" or x.dtype == torch.float64 or x.numel() == 0:
        return F.linear(x, weight, bias)
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    chosen = CHOICES.linear_bf16 if half else CHOICES.linear
    return convolved_row(x, weight, bias) if chosen else F.linear(x, weight, bias)


def convolved_row(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Apply a linear layer to tokens [..., in] as a grouped 1×1 convolution; weight [out, in / groups]."""
    row = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, in, 1, tokens], channels-last
    row = F.conv2d(row, weight[:, :, None, None], bias, groups=groups)
    return row.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class TokenLinear(nn.Linear):
    """``nn.Linear`` computed by ``token_linear``; parameters, names and initialisation are those of ``nn.Linear``.

    Example:
        >>> TokenLinear(4, 6)(torch.zeros(2, 5, 4)).shape
        torch.Size([2, 5, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [..., in] to tokens [..., out]."""
        return token_linear(input, self.weight, self.bias)
