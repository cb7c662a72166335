"""Segment images with a trained network."""

import errno
import os
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from transkd.data.geometry import ImageTransform
from transkd.data.images import OUTPUTS, find_images
from transkd.data.reading import MOST_PIXELS, read_image
from transkd.data.writing import save_png
from transkd.deploy.archives import check_archive, write_archive
from transkd.deploy.loading import load_network
from transkd.deploy.tiling import finite_logits, segment_in_tiles
from transkd.errors import UserError
from transkd.layers import restored
from transkd.layers.upsampling import upsampled_argmax
from transkd.models import Segmenter
from transkd.models.storage.resizing import Step, resize_steps, resized
from transkd.pictures import Pixels, colourise, overlay, palette_of
from transkd.settings import PredictSettings

__all__ = ["predict", "segment"]

AUTO_TILE = 1024
WHOLE = 4 * 2**20  # tile=auto: pixels up to which an image is predicted as a whole
MOST_CLASSES = 255  # ids are written in 8 bits, 255 stands for no class
MOST_NAMED = 20  # of the images that failed, in the last line
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # what the next image meets too


def segment(
    network: Segmenter, image: Pixels, transform: ImageTransform | None = None, tile: int | str | None = None
) -> Pixels:
    """Predict class ids [H, W] of an image [H, W, 3], at the image's own pixels whatever the transform does to it.

    Args:
        network: in eval mode.
        image: RGB uint8.
        transform: for the network's input; what pads or turns the image is predicted as a whole.
        tile: side of overlapping tiles for inputs that are larger, see ``segment_in_tiles``; "auto": 1024 for inputs
            above 4 megapixels; None: never.

    Raises:
        UserError: the logits are not finite.
    """
    pixels, place = transform(image) if transform is not None else (image, None)
    height, width = pixels.shape[:2]
    if tile == "auto":
        tile = AUTO_TILE if height * width > WHOLE else None
    if isinstance(tile, int) and max(height, width) > tile and place is None:
        return segment_in_tiles(network, pixels, image.shape[:2], tile)
    logits = finite_logits(network, pixels)
    if place is not None:
        logits = restored(logits, place[None].to(logits.device), image.shape[:2])
    ids: Pixels = upsampled_argmax(logits, image.shape[:2])[0].to(torch.uint8).cpu().numpy()
    return ids


def predict(settings: PredictSettings) -> None:
    """Write class ids, colours and overlays of every image; those that fail are named at the end.

    Raises:
        UserError: there is no image, the network or the output is wrong, or some images could not be segmented.
    """
    found = find_images(settings.input)
    output = Path(settings.output)
    targets = {image: _target(output, found.base, image) for image in found.images}
    _check_output(output, targets, settings.input)
    device = choose_device(settings.device)
    network, card = load_network(settings.weights, settings.network)
    if network.num_classes > MOST_CLASSES:
        raise UserError(f"{settings.weights} has {network.num_classes} classes; ids are written in 8 bits, up to 255")
    if settings.archive is not None:
        check_archive(settings.archive, network.num_classes, found.images)
    network.to(device).eval()
    palette = palette_of(card)
    transform = card.get("eval_transform") if settings.resize else None
    steps = resize_steps(transform) if transform else []
    failed, done = list(found.unreadable), dict[Path, Path]()  # images and their class ids
    for image, target in track(targets.items(), description="predicting"):
        try:
            _segment_file(network, image, target, palette, steps, settings)
            done[image] = target["ids"]
        except Exception as error:  # every image is done or named; networks raise many types of exceptions
            failed.append(_describe(image, error))
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK:
                failed.append(f"stopped at {image}, the images after it were not read")
                break
    for folder in found.left_out:
        print(f"not searched: {folder}, written by predict")
    print(f"{len(done)} of {len(targets)} images segmented into {output}/{{ids,colour,overlay}}")
    if settings.archive is not None:
        print(write_archive(settings.archive, done, output / f"{settings.archive}.zip"))
    if len(failed) > MOST_NAMED:
        print(*failed, sep="\n")
        failed = [*failed[:MOST_NAMED], "and others, listed above"]
    if failed:
        raise UserError("; ".join(failed))


def _segment_file(
    network: Segmenter, image: Path, target: dict[str, Path], palette: Any, steps: list[Step], settings: PredictSettings
) -> None:
    pixels = read_image(image)
    height, width = resized(pixels.shape[:2], steps)
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{image} would have {height}×{width} pixels at the size of validation; resize=false keeps its own"
        )
    ids = segment(network, pixels, _transform(steps), settings.tile)
    save_png(ids, target["ids"])
    colours = colourise(ids, palette)
    save_png(colours, target["colour"])
    save_png(overlay(pixels, colours, settings.opacity), target["overlay"])


def _transform(steps: list[Step]) -> ImageTransform | None:
    import albumentations as A

    return ImageTransform(A.Compose([getattr(A, name)(**values) for name, values in steps])) if steps else None


def _target(output: Path, base: Path, image: Path) -> dict[str, Path]:
    name = image.relative_to(base).with_suffix(".png")
    return {kind: output / kind / name for kind in OUTPUTS}


def _check_output(output: Path, targets: dict[Path, dict[str, Path]], pattern: str) -> None:
    """Check before anything is loaded that the output can be written, and over no image of the input."""
    inputs = {image.resolve() for image in targets}
    for target in targets.values():
        for path in target.values():
            if path.resolve() in inputs:
                raise UserError(f"output={output} would overwrite {path}, an image of input={pattern}; choose another")
    for folder in (output / kind for kind in OUTPUTS):
        place = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
        if not place.is_dir():
            raise UserError(f"cannot write into output={output}: {place} is not a folder; choose another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"cannot write into output={output}: {place} is not writable; choose another")


def choose_device(name: str) -> torch.device:
    """Return the device to predict on; "auto" is the GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it has no values")
        torch.zeros(1, device=device).item()
    except Exception as error:  # AssertionError, RuntimeError and others, by device
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"device={name} cannot be used ({reason}); expected auto, cpu, cuda, cuda:1 or mps, if this machine has it"
        ) from error
    return device


def _describe(image: Path, error: Exception) -> str:
    message = (str(error).strip().splitlines() or [""])[0][:500]
    if isinstance(error, UserError):
        return message if str(image) in message else f"{image}: {message}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in message:
        return f"{image}: not enough memory; set a smaller tile, such as tile=512"
    return f"{image}: {type(error).__name__}: {message}"
