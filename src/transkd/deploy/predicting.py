"""Segment images with a trained network."""

from pathlib import Path

import torch
from albumentations import from_dict
from rich.progress import track

from transkd.data.dataset import read_image
from transkd.data.geometry import ImageTransform
from transkd.data.images import find_images
from transkd.deploy.archives import check_archive, write_archive
from transkd.errors import UserError
from transkd.models import Segmenter, load_segmenter
from transkd.pictures import Pixels, colourise, overlay, palette_of, save_image
from transkd.settings import PredictSettings

__all__ = ["predict", "segment"]


def segment(network: Segmenter, image: Pixels, transform: ImageTransform | None = None) -> Pixels:
    """Predict class ids [H, W] of an image [H, W, 3], at the image's own pixels whatever the transform does to it."""
    pixels, place = transform(image) if transform is not None else (image, None)
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(network.mean.device)
    place = None if place is None else place[None].to(tensor.device)
    ids: Pixels = network.predict(tensor, image.shape[:2], place)[0].to(torch.uint8).cpu().numpy()
    return ids


def predict(settings: PredictSettings) -> None:
    """Write class ids, colours and overlays of every image; unreadable images are skipped and reported at the end.

    Raises:
        UserError: there is no image, or some could not be read.
    """
    base, images = find_images(settings.input)
    network, card = load_segmenter(settings.weights)
    if settings.archive is not None:
        check_archive(settings.archive, network.num_classes, images)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(accelerator if settings.device == "auto" else settings.device).eval()
    palette, transform = palette_of(card), None
    if settings.resize and card.get("eval_transform"):
        transform = ImageTransform(from_dict(card["eval_transform"]))
    output, failed = Path(settings.output), []
    done: dict[Path, Path] = {}  # class ids of each image
    for path in track(images, description="predicting"):
        try:
            image = read_image(path)
        except UserError as error:
            failed.append(str(error))
            continue
        ids = segment(network, image, transform)
        colours = colourise(ids, palette)
        pictures = {"ids": ids, "colour": colours, "overlay": overlay(image, colours, settings.opacity)}
        for folder, pixels in pictures.items():
            save_image(pixels, output / folder / path.relative_to(base).with_suffix(".png"))
        done[path] = output / "ids" / path.relative_to(base).with_suffix(".png")
    print(f"{len(images) - len(failed)} of {len(images)} images segmented into {output}/{{ids,colour,overlay}}")
    if settings.archive is not None:
        print(write_archive(settings.archive, done, output / f"{settings.archive}.zip"))
    if failed:
        raise UserError("; ".join(failed))
