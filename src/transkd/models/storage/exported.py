"""Types of exported networks and formats, and helpers of the exporters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Card", "Exported", "Format", "count_parameters"]

Card = dict[str, Any]


class Exported(NamedTuple):
    """An exported network, opened by an independent library.

    Attributes:
        run: function from images uint8 [B, 3, H, W] to logits [B, K, ceil(H/4), ceil(W/4)].
        parameters: number of stored values; see ``Format.counts``.
    """

    run: Callable[[Tensor], Tensor]
    parameters: int


class Format(NamedTuple):
    """An export format.

    Attributes:
        write: function of the network in eval mode, its card and a path; formats that are folders create the folder.
        open: function that opens the written file or folder.
        packages: required packages beyond transkd's dependencies.
        minimum: smallest supported height and width of an image.
        normalises: whether the exported network includes the normalisation.
        counts: meaning of ``Exported.parameters``.
        suffix: required suffix of the file name.
    """

    write: Callable[..., None]
    open: Callable[[Path], Exported]
    packages: tuple[str, ...] = ()
    minimum: int = 32
    normalises: bool = False
    counts: str = "parameters"
    suffix: str = ""


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
