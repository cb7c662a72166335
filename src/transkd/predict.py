"""Segment images: ``python -m transkd.predict weights=student.safetensors input=images/ output=predictions/``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transkd.cli import hydra_command
from transkd.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from transkd.models import Segmenter
    from transkd.pictures import Pixels

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def find_images(pattern: str) -> tuple[Path, list[Path]]:
    """The images of a file, a folder or a glob, and the folder that their output names are relative to.

    Raises:
        UserError: there is none, or two would write the same output.
    """
    path = Path(pattern)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        base, found = path, path.rglob("*")
    else:
        base = path.parent
        while "*" in str(base):
            base = base.parent
        found = base.glob(str(path.relative_to(base)))
    images = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(
            f"no images for input={pattern}: expected an image, a folder or a glob such as 'frames/*.png' "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    by_output: dict[Path, Path] = {}
    for image in images:
        twin = by_output.setdefault(image.with_suffix(""), image)
        if twin is not image:
            raise UserError(f"{twin} and {image} would write the same output; rename one")
    return base, images


def segment(network: "Segmenter", image: "Pixels", transform: Any = None) -> "Pixels":
    """Class ids [H, W] of an image [H, W, 3], at the image's own size whatever the transform does."""
    import torch

    pixels = transform(image=image)["image"] if transform is not None else image
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(network.mean.device)
    ids: Pixels = network.predict(tensor, image.shape[:2])[0].to(torch.uint8).cpu().numpy()
    return ids


def predict(cfg: "DictConfig") -> None:
    """Write class ids, colours and overlays of every image; an unreadable one is named at the end."""
    import torch
    from rich.progress import track

    from transkd.data.dataset import read_image
    from transkd.models import load_segmenter
    from transkd.pictures import colourise, overlay, palette_of, save_image
    from transkd.training.memory import keep_freed_memory

    base, images = find_images(str(cfg.input))
    if cfg.keep_freed_memory:
        keep_freed_memory()
    network, card = load_segmenter(cfg.weights)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    network.to(device).eval()
    palette, transform = palette_of(card), None
    if cfg.resize and card.get("eval_transform"):
        from albumentations import from_dict

        transform = from_dict(card["eval_transform"])
    failed = []
    for path in track(images, description="predicting"):
        try:
            image = read_image(path)
        except UserError as error:
            failed.append(str(error))
            continue
        ids = segment(network, image, transform)
        colours = colourise(ids, palette)
        name = path.relative_to(base).with_suffix(".png")
        for folder, pixels in (
            ("ids", ids),
            ("colour", colours),
            ("overlay", overlay(image, colours, cfg.opacity)),
        ):
            save_image(pixels, Path(cfg.output) / folder / name)
    print(f"{len(images) - len(failed)} of {len(images)} images segmented into {cfg.output}/{{ids,colour,overlay}}")
    if failed:
        raise UserError("; ".join(failed))


@hydra_command("predict")
def main(cfg: "DictConfig") -> None:
    """Compose, then predict."""
    predict(cfg)


if __name__ == "__main__":
    main()
