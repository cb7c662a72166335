"""Images of a file, a folder or a glob, without labels."""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from transkd.data.listing import IMAGE_SUFFIXES, is_image
from transkd.errors import UserError

__all__ = ["OUTPUTS", "Found", "find_images"]

OUTPUTS = ("ids", "colour", "overlay")
"""Folders that predict writes; a folder that holds all three is an earlier output, whose images are not inputs."""


class Found(NamedTuple):
    """Images to read.

    Attributes:
        base: folder to which the names of their outputs are relative.
        images: the images, sorted.
        left_out: folders of an earlier output, which were not searched.
        unreadable: messages about folders that could not be searched.
    """

    base: Path
    images: list[Path]
    left_out: list[Path]
    unreadable: list[str]


def find_images(pattern: str) -> Found:
    """Find the images of a file, of a folder and the folders in it, or of a glob with ``*``, ``**``, ``?``, ``[…]``.

    Links to folders are followed, each folder once; hidden files and folders are passed over. Names that exist are
    taken as they are, also with ``*``, ``?`` or ``[`` in them.

    Raises:
        UserError: there are no images, or two have the same output name.
    """
    base = Path(pattern)
    if os.path.lexists(base) and not os.path.isdir(base):
        return Found(base.parent, [base], [], [])
    while not os.path.isdir(base) and base != base.parent:
        base = base.parent
    parts = Path(pattern).parts[len(base.parts) :]
    found = Found(base, [], [], [])
    for folder, names in _walk(base, parts, found):
        paths = [folder / name for name in names if is_image(Path(name))]
        found.images.extend(path for path in paths if not parts or _matches(path.parts[len(base.parts) :], parts))
    if not found.images:
        raise UserError(
            f"no images for input={pattern}: expected an image, a folder or a glob such as 'frames/*.png' "
            f"({', '.join(IMAGE_SUFFIXES)})" + "".join(f"; {message}" for message in found.unreadable[:1])
        )
    found.images.sort()
    by_output: dict[Path, Path] = {}
    for image in found.images:
        twin = by_output.setdefault(image.with_suffix(""), image)
        if twin is not image:
            raise UserError(f"{twin} and {image} would write the same output; rename one")
    return found


def _walk(base: Path, parts: Sequence[str], found: Found) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders with the names of their files; real folders before links to them, each folder once."""
    seen: set[str] = set()
    waiting, links = [base], list[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(_visible(folder), key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(f"cannot read the folder {folder}: {error.strerror or error}")
            continue
        folders = [entry for entry in entries if entry.is_dir()]
        outputs = {entry.name for entry in folders}.issuperset(OUTPUTS)
        for entry in folders:
            below = folder / entry.name
            if outputs and entry.name in OUTPUTS:
                found.left_out.append(below)
            elif not parts or _leads(below.parts[len(base.parts) :], parts):
                (links if entry.is_symlink() else waiting).append(below)
        yield folder, [entry.name for entry in entries if not entry.is_dir()]


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    return (entry for entry in os.scandir(folder) if not entry.name.startswith("."))


def _leads(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a folder can contain matches of a glob."""
    if not names or not pattern:
        return not names
    return pattern[0] == "**" or (fnmatchcase(names[0], pattern[0]) and _leads(names[1:], pattern[1:]))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob, both by their parts."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or _matches(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])
