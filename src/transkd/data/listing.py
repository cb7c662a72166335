"""Files of a data set: which ones count, how they are found and paired, what is said when they are not there."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transkd.errors import UserError

__all__ = [
    "IMAGE_SUFFIXES",
    "Pair",
    "UnpairedError",
    "by_stem",
    "elsewhere",
    "find_files",
    "is_image",
    "matching",
    "named",
    "pair_by_name",
    "read_names",
]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files, in lower case."""

WILDCARD = re.compile(r"\*\*/|\*|\?")


class Pair(NamedTuple):
    """Paths of an image and its label; None for an image without labels."""

    image: Path
    label: Path | None


class UnpairedError(UserError):
    """Images without a label, or labels without an image.

    Attributes:
        unpaired: one line for each of them.
        pairs: the images and labels that do have a counterpart.
    """

    def __init__(self, unpaired: Sequence[str], pairs: Sequence[Pair]) -> None:
        more = f"; and {len(unpaired) - 6} more" if len(unpaired) > 6 else ""
        super().__init__(f"images and labels must come in pairs of the same name; {'; '.join(unpaired[:6])}{more}")
        self.unpaired, self.pairs = list(unpaired), list(pairs)


def is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image file, in upper or lower case, and is not hidden.

    Example:
        >>> is_image(Path("street.JPG")), is_image(Path("train.txt")), is_image(Path("._street.JPG"))
        (True, False, False)
    """
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def named(name: str) -> str:
    r"""Unicode normal form C of a name: macOS and Linux may store the same name as different characters.

    Example:
        >>> named("cafe\u0301") == "caf\u00e9"
        True
    """
    return unicodedata.normalize("NFC", name)


def find_files(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files with one of the suffixes in a folder and its subfolders, sorted.

    Hidden files and folders are passed over. Links are followed, except to a folder that the link lies in.
    """
    return sorted(path for path in _walk(folder, (os.path.realpath(folder),)) if path.suffix.lower() in suffixes)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not there, not a folder, not readable: the caller says what it expected
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        # DirEntry.is_dir raises for a link to itself
        if not (path.is_dir() if entry.is_symlink() else entry.is_dir()):
            yield path
        elif (real := os.path.realpath(path)) not in above:
            yield from _walk(path, (*above, real))


def matching(root: Path, pattern: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Files that match a pattern, by what its wildcards stand for, without the suffix.

    Args:
        root: folder that the pattern begins in.
        pattern: a folder, which means every file in it and below, or a glob with ``*``, ``?`` and ``**/``. The suffix
            of a file may be in upper or lower case.
        suffixes: those of a folder and of a pattern without one.

    Raises:
        UserError: two files have the same key.

    Example:
        With ``train/a_image.png``, ``matching(root, "train/*_image.png")`` is ``{"a": root / "train/a_image.png"}``.
    """
    pattern = pattern.removesuffix(".*").rstrip("/")
    wild = WILDCARD.search(pattern)
    if wild is None:
        pattern, start = f"{pattern}/**/*", len(pattern) + 1
    else:
        start = pattern.rfind("/", 0, wild.start()) + 1
    folder, (stem, suffix) = root / pattern[:start], os.path.splitext(pattern[start:])
    expression = re.compile(_expression(stem) + (f"(?i:{re.escape(suffix)})" if suffix else r"\.[^./]+"))
    found: dict[str, Path] = {}
    for path in find_files(folder, [suffix.lower()] if suffix else suffixes):
        match = expression.fullmatch(path.relative_to(folder).as_posix())
        if match:
            key = named("/".join(part.strip("/") for part in match.groups() if part))
            if found.setdefault(key, path) != path:
                raise UserError(f"two files have the same name, {found[key]} and {path}; remove one")
    return found


def _expression(pattern: str) -> str:
    """Regular expression of a glob, with a group for each wildcard."""
    groups = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}
    parts, start = [], 0
    for wild in WILDCARD.finditer(pattern):
        parts += [re.escape(pattern[start : wild.start()]), groups[wild.group()]]
        start = wild.end()
    return "".join([*parts, re.escape(pattern[start:])])


def by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Image files by their name without the suffix.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        if is_image(path) and found.setdefault(named(path.stem), path) != path:
            raise UserError(f"two images have the same name, {found[named(path.stem)]} and {path}; remove one")
    return found


def pair_by_name(images: Mapping[str, Path], labels: Mapping[str, Path]) -> list[Pair]:
    """Pair images and labels by their common key and sort the pairs by key; hidden files are left out.

    Raises:
        UnpairedError: an image has no label or a label no image; the message lists them.
    """
    images, labels = _visible(images), _visible(labels)
    unpaired = [f"image without a label: {images[key]}" for key in sorted(images.keys() - labels.keys())]
    unpaired += [f"label without an image: {labels[key]}" for key in sorted(labels.keys() - images.keys())]
    pairs = [Pair(images[key], labels[key]) for key in sorted(images.keys() & labels.keys())]
    if unpaired:
        raise UnpairedError(unpaired, pairs)
    return pairs


def _visible(files: Mapping[str, Path]) -> dict[str, Path]:
    """Files that are not hidden, by their keys in normal form C."""
    return {named(key): path for key, path in files.items() if not path.name.startswith(".")}


def read_names(index: Path, of: str) -> list[str]:
    """Lines of a split file without empty ones and comments (#).

    Args:
        index: the text file.
        of: what it belongs to, for the message.

    Raises:
        UserError: the file does not exist, is not text or lists nothing.
    """
    try:
        lines = index.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {index}, the split file of {of}: {error}") from error
    names = [named(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise UserError(f"{index} lists no names: expected one a line")
    return names


def elsewhere(root: Path, *expected: str) -> str:
    """Say which folder above or below a root has the expected layout, or that the root does not exist.

    Args:
        root: folder that does not have it.
        expected: paths relative to the right folder that must all exist.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        what = "a link to itself or to nothing" if root.is_symlink() else "a file" if root.is_file() else "not there"
        return f"; {root} is {what}"
    below = [path for path in sorted(root.glob("*")) if path.is_dir() and not path.name.startswith(".")][:100]
    deeper = [path for folder in below for path in sorted(folder.glob("*"))[:100] if path.is_dir()]
    for folder in (root.parent, root.parent.parent, *below, *deeper):
        if folder != root and all((folder / path).exists() for path in expected):
            where = "above it" if folder in root.parents else "below it"
            return f"; {folder}, {where}, has that layout: data.root={folder}"
    return ""
