"""LayerNorm over the channels of tokens that stays in bfloat16 under autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TokenNorm"]


class TokenNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose output has the input's type in bfloat16 autocast on a GPU, as it has on a CPU.

    Autocast widens LayerNorm to float32 on a GPU only. Every layer that reads the output then converts it back, and the
    residual sums are twice as large in memory. Statistics are computed in float32 either way; in float16, whose range
    is short, autocast's rule stays.

    Example:
        >>> TokenNorm(4)(torch.zeros(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [..., C] to tokens [..., C]."""
        device = input.device.type
        if device != "cuda" or input.dtype != torch.bfloat16 or not torch.is_autocast_enabled(device):
            return super().forward(input)
        with torch.autocast(device, enabled=False):  # the kernel takes weights of the input's type only
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
