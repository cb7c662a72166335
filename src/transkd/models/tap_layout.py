"""Layout of the tensors that taps capture: maps or tokens, with the position of their axes."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from transkd.errors import UserError

__all__ = ["TapLayout", "alternatives", "consistent_layouts", "describe", "first_tensor"]

STRIDES = (1, 2, 4, 8, 14, 16, 32, 64)
LAYOUTS = {"BCHW": "a map [B, C, H, W]", "BHWC": "a map [B, H, W, C]", "BNC": "tokens [B, N, C]"}


class TapLayout(NamedTuple):
    """Layout of a tap's tensor, determined by the probe; ``axes`` is a key of LAYOUTS."""

    name: str
    axes: str
    channels: int
    strides: tuple[int, ...]

    @classmethod
    def infer(cls, name: str, output: Any, image: Tensor, module: nn.Module) -> "TapLayout":
        """Determine the only layout that is consistent with a tap's output for the probe."""
        tensor, size = first_tensor(output), tuple(image.shape[-2:])
        if tensor is None:
            raise UserError(
                f"tap {name!r} returns {describe(output)}, expected a tensor or a tuple that starts with one; "
                f"tap another submodule, such as {alternatives(name, module)}"
            )
        readings = consistent_layouts(tensor, image)
        what = f"tap {name!r} returns {describe(tensor)} for an image of {size[0]} x {size[1]}"
        if not readings:
            raise UserError(
                f"{what}, expected {', '.join(LAYOUTS.values())} of the image size over a stride (no class token); "
                "tap another submodule, or give the size that the module is built for: probe=(H, W)"
            )
        if len(readings) > 1:
            raise UserError(
                f"{what}, which could be {' or '.join(LAYOUTS[axes] for axes in readings)}, expected one of them; "
                "give another size, not square: probe=(H, W)"
            )
        (axes,) = readings
        strides = tuple(stride for stride in STRIDES if axes == "BNC" and grid_of(tensor.shape[1], size, [stride]))
        return cls(name, axes, tensor.shape[axes.index("C")], strides)

    def to_map(self, output: Any, image: Tensor) -> Tensor:
        """Convert to a map [B, C, H, W]."""
        tensor = self._checked(output, image)
        if self.axes == "BCHW":
            return tensor
        if self.axes == "BHWC":
            return tensor.permute(0, 3, 1, 2)
        return tensor.transpose(1, 2).reshape(len(tensor), self.channels, *self._grid(tensor, image))

    def to_tokens(self, output: Any, image: Tensor) -> Tensor:
        """Convert to tokens [B, N, C]."""
        tensor = self._checked(output, image)
        if self.axes == "BCHW":
            return tensor.flatten(2).transpose(1, 2)
        return tensor.flatten(1, 2) if self.axes == "BHWC" else tensor

    def _grid(self, tensor: Tensor, image: Tensor) -> tuple[int, int]:
        return grid_of(tensor.shape[1], image.shape[-2:], self.strides) or (0, 0)

    def _checked(self, output: Any, image: Tensor) -> Tensor:
        tensor = first_tensor(output)
        if (
            tensor is not None
            and tensor.ndim == len(self.axes)
            and (len(tensor), tensor.shape[self.axes.index("C")]) == (len(image), self.channels)
            and (self.axes != "BNC" or all(self._grid(tensor, image)))
        ):
            return tensor
        what = describe(output if tensor is None else tensor)
        raise UserError(
            f"tap {self.name!r} returns {what} for images {list(image.shape)}, expected {LAYOUTS[self.axes]} with "
            f"C = {self.channels} as for the probe; give a probe of the images' size: probe=(H, W)"
        )


def consistent_layouts(tensor: Tensor, image: Tensor) -> list[str]:
    """Return every layout that is consistent with a tensor's shape."""
    if tensor.ndim not in (3, 4) or len(tensor) != len(image):
        return []
    size = tuple(image.shape[-2:])
    if tensor.ndim == 3:
        return ["BNC"] if grid_of(tensor.shape[1], size, STRIDES) else []
    sides = {"BCHW": tensor.shape[2:], "BHWC": tensor.shape[1:3]}
    on_grid = [axes for axes, (h, w) in sides.items() if grid_of(h * w, size, STRIDES) == (h, w)]
    # Fallback for convolutions without padding or with other strides: the aspect ratio is the image's within 10 %.
    return on_grid or [axes for axes, (h, w) in sides.items() if w and 0.9 < h / w * size[1] / size[0] < 1.1]


def grid_of(tokens: int, size: Sequence[int], strides: Iterable[int]) -> tuple[int, int] | None:
    """Return the grid (h, w) of N tokens that is the image size divided by a stride, rounded up or down, or None."""
    height, width = size
    for stride in strides:
        for grid in ((-(-height // stride), -(-width // stride)), (height // stride, width // stride)):
            if grid[0] * grid[1] == tokens:
                return grid
    return None


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor, or the first element of a tuple or list if that is a tensor, else None."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def describe(output: Any) -> str:
    """Describe an output for messages."""
    return f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def alternatives(name: str, module: nn.Module) -> str:
    """List a few alternatives to a submodule: its children, else similar names, else the first submodules."""
    names = [other for other, _ in module.named_modules() if other not in ("", name)]
    children = [other for other in names if other.rpartition(".")[0] == name]
    return ", ".join((children or difflib.get_close_matches(name, names, n=5) or names)[:5])
