"""Layers that are computed as 1×1 convolutions on a CPU."""

from dataclasses import dataclass

__all__ = ["CHOICES", "Choices"]


@dataclass
class Choices:
    """Layers to compute as 1×1 convolutions on a CPU; the results are equal to rounding.

    PyTorch's convolutions use oneDNN, its matrix products MKL; which one is faster depends on the processor.
    ``transkd.training.cpu_choices`` measures it.

    Attributes:
        linear: linear layers on tokens in float32.
        linear_bf16: linear layers on tokens in bfloat16, also under autocast.
        attention: attention without gradients in float32.
    """

    linear: bool = True
    linear_bf16: bool = True
    attention: bool = True


CHOICES = Choices()
"""The choices of this process."""
