"""Images of a file, a folder or a glob, without labels."""

from pathlib import Path

from transkd.data.listing import IMAGE_SUFFIXES, find_files, is_image
from transkd.errors import UserError

__all__ = ["find_images"]


def find_images(pattern: str) -> tuple[Path, list[Path]]:
    """Find images, and the folder to which the names of their outputs are relative.

    Raises:
        UserError: there are no images, or two have the same output name.
    """
    path = Path(pattern)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        base, found = path, find_files(path)
    else:
        base = path.parent
        while "*" in str(base):
            base = base.parent
        found = sorted(base.glob(str(path.relative_to(base))))
    images = [file for file in found if is_image(file) and not _hidden(file.relative_to(base))]
    if not images:
        raise UserError(
            f"no images for input={pattern}: expected an image, a folder or a glob such as 'frames/*.png' "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    by_output: dict[Path, Path] = {}
    for image in images:
        twin = by_output.setdefault(image.with_suffix(""), image)
        if twin is not image:
            raise UserError(f"{twin} and {image} would write the same output; rename one")
    return base, images


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
