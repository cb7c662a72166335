"""Augmentation on the device: an Albumentations transform, drawn in the workers and applied to batches on a GPU."""

import logging
from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.data.dataset import Batch, seed_transform
from transkd.data.feeding.colour import jitter, look_up
from transkd.data.feeding.heads import split_transform
from transkd.data.feeding.planning import OUTSIDE, Axis, Jitter, Pixels, Plan, PlannedBatch

__all__ = ["DeviceAugmentation", "on_device", "untranslatable"]

log = logging.getLogger(__name__)

RAMP = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (1, 256, 3)).copy()


class DeviceAugmentation:
    """A transform in two halves: workers plan each sample, the device makes the batch.

    The random numbers are drawn by the transform itself, from the sample's seed, so a sample has the parameters that
    it would have on the CPU; its pixels differ by the rounding of bilinear interpolation, its label not at all.

    Args:
        transform: an Albumentations composition that ``untranslatable`` has no objection to.
    """

    def __init__(self, transform: Any) -> None:
        self.head, self.rest = split_transform(transform)
        parts = [] if self.rest is None else list(self.rest)
        self.fill, self.fill_target = next(iter(_fills(parts)), (0, 0))

    def plan(self, image: Pixels, label: Pixels, seed: int) -> tuple[Pixels, Pixels, Plan]:
        """Apply the deterministic head and draw the parameters of the rest."""
        if self.head is not None:
            resized = self.head(image=image, mask=label)
            image, label = resized["image"], resized["mask"]
        plan = Plan(Axis(image.shape[0]), Axis(image.shape[1]), [])
        if self.rest is None:
            return image, label, plan
        seed_transform(self.rest, seed)
        self.rest.py_random.random()  # a composition draws whether it is applied
        for transform in self.rest:
            parameters = _draw(transform, plan)
            if type(transform) in COLOURS:
                plan.colours.append(COLOURS[type(transform)](transform, parameters))
            elif parameters is not None:
                GEOMETRY[type(transform)](plan, parameters)
        return image, label, plan

    def apply(self, batch: PlannedBatch) -> Batch:
        """Make the augmented batch on the device of its tensors."""
        inside = (batch.target_rows != OUTSIDE)[:, :, None] & (batch.target_columns != OUTSIDE)[:, None]
        target = _gather(batch.target, batch.target_rows, batch.target_columns)
        target = target.masked_fill(~inside, self.fill_target)
        rows, columns = (bits.view(torch.float32) for bits in (batch.rows, batch.columns))
        image = _interpolate(batch.image, rows, columns).round()
        image = image.masked_fill(~inside[:, None], self.fill)
        for colour in batch.colours:
            image = look_up(image, colour) if isinstance(colour, Tensor) else jitter(image, colour)
        return Batch(image.to(torch.uint8), target, batch.name)


def _draw(transform: Any, plan: Plan) -> dict[str, Any] | None:
    """Parameters of one transform for an image of the plan's size so far; None if it is not applied."""
    if not transform.should_apply():
        return None
    size = (len(plan.rows.positions), len(plan.columns.positions), 3)
    data = {"image": np.broadcast_to(np.uint8(0), size)}  # its size and type count, and it takes no memory
    parameters: dict[str, Any] = transform.update_transform_params(transform.get_params(), data)
    return {**parameters, **transform.get_params_dependent_on_data(parameters, data)}


def _gather(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values [B, h, w] of maps [B, H, W] at indices [B, h] and [B, w]; negative ones count as 0."""
    samples = torch.arange(len(maps), device=maps.device)[:, None, None]
    return maps[samples, rows.clamp(min=0)[:, :, None], columns.clamp(min=0)[:, None]]


def _interpolate(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values [B, 3, h, w] of images [B, H, W, 3] at coordinates [B, h] and [B, w]."""
    height, width = image.shape[1:3]
    y, x = ((2 * positions + 1) / size - 1 for positions, size in ((rows, height), (columns, width)))
    shape = (len(image), rows.shape[1], columns.shape[1])
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(image.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)


# Transforms that have an equivalent


def _scale(plan: Plan, parameters: dict[str, Any]) -> None:
    plan.rows.scale(parameters["scale"])
    plan.columns.scale(parameters["scale"])


def _crop(plan: Plan, parameters: dict[str, Any]) -> None:
    pads, (left, top, right, bottom) = parameters.get("pad_params"), parameters["crop_coords"]
    if pads is not None:
        plan.rows.pad(pads["pad_top"], pads["pad_bottom"])
        plan.columns.pad(pads["pad_left"], pads["pad_right"])
    plan.rows.crop(top, bottom)
    plan.columns.crop(left, right)


def _flip(plan: Plan, parameters: dict[str, Any]) -> None:
    plan.columns.flip()


def _shift(plan: Plan, parameters: dict[str, Any]) -> None:
    plan.columns.shift(round(parameters["matrix"][0, 2]))
    plan.rows.shift(round(parameters["matrix"][1, 2]))


GEOMETRY: dict[type, Callable[[Plan, dict[str, Any]], None]] = {
    A.RandomScale: _scale,
    A.RandomCrop: _crop,
    A.CenterCrop: _crop,
    A.HorizontalFlip: _flip,
    A.Affine: _shift,
}


def _table(transform: Any, parameters: dict[str, Any] | None) -> Pixels:
    """What the transform makes of each of the 256 values."""
    table: Pixels = (RAMP if parameters is None else transform.apply(RAMP, **parameters))[0, :, 0]
    return table


def _factors(transform: Any, parameters: dict[str, Any] | None) -> Jitter:
    if parameters is None:
        return ()
    order = [int(step) for step in parameters["order"]]
    return order, [float(parameters[name]) for name in ("brightness", "contrast", "saturation", "hue")]


COLOURS: dict[type, Callable[[Any, dict[str, Any] | None], Pixels | Jitter]] = {
    A.RandomBrightnessContrast: _table,
    A.ColorJitter: _factors,
}


def untranslatable(transform: Any) -> str | None:
    """Why a transform cannot run on the device; None if it can.

    Example:
        >>> untranslatable(A.Compose([A.HorizontalFlip(), A.GaussNoise()]))
        'GaussNoise has no equivalent on the device'
        >>> untranslatable(A.Compose([A.Resize(16, 32), A.RandomCrop(8, 8)]))
    """
    if type(transform) is not A.Compose or transform.p < 1:
        return "only an albumentations.Compose with p=1 can be moved to the device"
    rest = split_transform(transform)[1]
    parts = [] if rest is None else list(rest)
    coloured = False
    for position, part in enumerate(parts):
        name = type(part).__name__
        if type(part) not in GEOMETRY and type(part) not in COLOURS:
            return f"{name} has no equivalent on the device"
        if type(part) in GEOMETRY and coloured:
            return f"{name} comes after a colour transform"
        if type(part) is A.RandomScale and position > 0:
            return "RandomScale is not the first random transform"
        if not _has_plain_arguments(part):
            return f"{name} has arguments without an equivalent on the device"
        coloured = coloured or type(part) in COLOURS
    return "its transforms fill with different values" if len(_fills(parts)) > 1 else None


def _has_plain_arguments(part: Any) -> bool:
    modes = {"interpolation": cv2.INTER_LINEAR, "mask_interpolation": cv2.INTER_NEAREST, "area_for_downscale": None}
    modes |= {"border_mode": cv2.BORDER_CONSTANT, "brightness_by_max": True, "fit_output": False}
    if any(getattr(part, name, plain) != plain for name, plain in modes.items()):
        return False
    if _is_filling(part) and not all(isinstance(value, int | float) for value in (part.fill, part.fill_mask)):
        return False
    if type(part) is not A.Affine:
        return True
    turns = (*part.rotate, *part.shear["x"], *part.shear["y"])
    return not any(turns) and all(part.scale[axis] == (1, 1) for axis in ("x", "y"))


def _is_filling(part: Any) -> bool:
    return type(part) is A.Affine or bool(getattr(part, "pad_if_needed", False))


def _fills(parts: list[Any]) -> set[tuple[int, int]]:
    """Values that fill image and label."""
    return {(int(part.fill), int(part.fill_mask)) for part in parts if _is_filling(part)}


def on_device(transform: Any, asked: str) -> DeviceAugmentation | None:
    """Move a transform to the device; None, with a line in the log, if it must stay on the CPU.

    Args:
        transform: the training transform.
        asked: the setting ``data.augment``; "device" makes the line a warning.
    """
    if transform is None:
        return None
    reason = untranslatable(transform)
    if reason is None:
        return DeviceAugmentation(transform)
    level = logging.WARNING if asked == "device" else logging.INFO
    log.log(level, "data.augment=%s: augmentation stays on the CPU: %s", asked, reason)
    return None
