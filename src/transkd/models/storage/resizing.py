"""The resizing that a card's ``eval_transform`` describes, as checked values."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from transkd.errors import UserError

__all__ = ["Step", "plain_resize", "resize_steps", "resized"]

Side = Annotated[int, Field(ge=1, le=16384)]
Interpolation = Annotated[int, Field(ge=0, le=6)]
Area = Literal["image", "image_mask"] | None


class _Values(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Resize(_Values):
    height: Side
    width: Side
    interpolation: Interpolation = 1
    area_for_downscale: Area = None
    p: Annotated[float, Field(ge=1, le=1)] = 1.0


class _MaxSize(_Values):
    max_size: Side
    interpolation: Interpolation = 1
    area_for_downscale: Area = None
    p: Annotated[float, Field(ge=1, le=1)] = 1.0


class _Pad(_Values):
    min_height: Side | None = None
    min_width: Side | None = None
    pad_height_divisor: Side | None = None
    pad_width_divisor: Side | None = None
    position: Literal["center", "top_left", "top_right", "bottom_left", "bottom_right"] = "center"
    border_mode: Annotated[int, Field(ge=0, le=4)] = 0
    fill: float | Annotated[list[float], Field(max_length=3)] = 0
    p: Annotated[float, Field(ge=1, le=1)] = 1.0


class _Crop(_Values):
    height: Side
    width: Side
    p: Annotated[float, Field(ge=1, le=1)] = 1.0


STEPS: dict[str, type[_Values]] = {
    "Resize": _Resize,
    "SmallestMaxSize": _MaxSize,
    "LongestMaxSize": _MaxSize,
    "PadIfNeeded": _Pad,
    "CenterCrop": _Crop,
}
"""Transforms of Albumentations that are taken from a card."""

Step = tuple[str, dict[str, Any]]
"""Name of a transform in Albumentations and its arguments."""


def resize_steps(transform: Any) -> list[Step]:
    """Return the steps of a serialised Albumentations transform.

    Raises:
        UserError: it has a step that is not in ``STEPS``, or a value that is out of range.

    Example:
        >>> import albumentations as A
        >>> resize_steps(A.Compose([A.SmallestMaxSize(512)]).to_dict())
        [('SmallestMaxSize', {'max_size': 512, 'interpolation': 1, 'area_for_downscale': None, 'p': 1.0})]
    """
    return _flatten(transform.get("transform") if isinstance(transform, Mapping) else transform, 0)


def _flatten(step: Any, depth: int) -> list[Step]:
    if not isinstance(step, Mapping) or depth > 8:
        raise UserError(_refusal("something that is no transform"))
    name = str(step.get("__class_fullname__", "")).rsplit(".", 1)[-1]
    inside = step.get("transforms")
    if name in ("Compose", "Sequential") and isinstance(inside, Sequence) and step.get("p", 1) == 1:
        return [found for part in inside[:100] for found in _flatten(part, depth + 1)]
    if name == "NoOp":
        return []
    if name not in STEPS:
        raise UserError(_refusal(repr(name[:60])))
    try:
        return [(name, STEPS[name].model_validate(dict(step)).model_dump())]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(_refusal(f"{name} with a wrong {'.'.join(map(str, first['loc']))}")) from error


def _refusal(what: str) -> str:
    return (
        f"the file's eval_transform contains {what}; expected {', '.join(STEPS)}, which predict can follow. "
        "resize=false predicts at the images' own size"
    )


def resized(size: tuple[int, int], steps: Sequence[Step]) -> tuple[int, int]:
    """Height and width of an image after the steps, at most.

    Example:
        >>> resized((1080, 1920), [("SmallestMaxSize", {"max_size": 512})])
        (512, 910)
    """
    height, width = size
    for name, values in steps:
        if name == "Resize":
            height, width = values["height"], values["width"]
        elif name == "PadIfNeeded":
            height = max(height + (values["pad_height_divisor"] or 0), values["min_height"] or 0)
            width = max(width + (values["pad_width_divisor"] or 0), values["min_width"] or 0)
        elif name.endswith("MaxSize"):
            side = min(height, width) if name == "SmallestMaxSize" else max(height, width)
            scale = values["max_size"] / side
            height, width = max(1, round(scale * height)), max(1, round(scale * width))
    return height, width


def plain_resize(transform: Any) -> tuple[int, int] | None:
    """Return height and width if a serialised Albumentations transform is only a resize, otherwise None.

    Example:
        >>> import albumentations as A
        >>> plain_resize(A.Compose([A.Resize(180, 240)]).to_dict())
        (180, 240)
    """
    try:
        steps = resize_steps(transform)
    except UserError:
        return None
    return (steps[0][1]["height"], steps[0][1]["width"]) if [name for name, _ in steps] == ["Resize"] else None
