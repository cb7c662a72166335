"""Images of a folder or a glob, without labels."""

from pathlib import Path

from transkd.errors import UserError

__all__ = ["find_images"]

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
