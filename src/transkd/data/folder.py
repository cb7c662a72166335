"""Images and label maps of one's own, found by patterns and split files."""

from collections.abc import Mapping
from pathlib import Path
from unicodedata import normalize

from transkd.data.listing import WILDCARD, Pair, elsewhere, matching, named, pair_by_name, read_names
from transkd.errors import UserError

__all__ = ["find_by_pattern", "find_folder"]

BySplit = str | Mapping[str, str]


def find_folder(
    root: str | Path,
    split: str,
    images: BySplit = "images/{split}",
    labels: BySplit = "labels/{split}",
    index: BySplit | None = None,
) -> list[Pair]:
    """Find images and labels by patterns, each a folder or a glob; pair them by what the wildcards stand for.

    Args:
        root: folder of the data set.
        split: "train" or "val"; replaces ``{split}`` in the patterns.
        images: pattern relative to ``root``, for example ``all/*.jpg``, or a pattern for each split.
        labels: likewise, for example ``all/*_mask.png``.
        index: split file, which chooses among the images: a name a line with or without its suffix, or image and label
            as two paths relative to ``root``, separated by space, tab or comma.

    Raises:
        UserError: nothing matches, an image or label has no counterpart, or the split file names absent files.

    Example:
        ``find_folder("Data", "val", images="all/*.jpg", labels="all/*_mask.png", index="{split}.txt")``
    """
    return find_by_pattern(Path(root), split, images, labels, index)


def find_by_pattern(
    root: Path,
    split: str,
    images: BySplit,
    labels: BySplit,
    index: BySplit | None = None,
    about: str = "images",
    note: str = "data.find.images and data.find.labels say where they are",
) -> list[Pair]:
    """Find pairs as `find_folder` does.

    Args:
        root: folder of the data set.
        split: "train" or "val".
        images: pattern of the images.
        labels: pattern of the labels.
        index: split file.
        about: what is not there, for the message.
        note: how to get it, for the message.

    Raises:
        UserError: nothing matches, an image or label has no counterpart, or the split file names absent files.
    """
    patterns = {
        name: of_split(value, split, f"data.find.{name}") for name, value in (("images", images), ("labels", labels))
    }
    found = {name: matching(root, pattern) for name, pattern in patterns.items()}
    if not any(found.values()):
        places = [place.rstrip("/") for place in map(_literal, patterns.values()) if place]
        other = elsewhere(root, *places) if places else ""
        raise UserError(
            f"no {about} under data.root={root}: expected images in {patterns['images']} and labels in "
            f"{patterns['labels']}; {note}{other}"
        )
    if index is None:
        return pair_by_name(found["images"], found["labels"])
    path = root / of_split(index, split, "data.find.index")
    return _listed(root, path, found["images"], found["labels"])


def of_split(value: BySplit, split: str, setting: str) -> str:
    """A pattern for one split.

    Raises:
        UserError: there are patterns by split, but none for this one.
    """
    if isinstance(value, Mapping):
        if split not in value:
            raise UserError(f"{setting} has no entry {split}; it has {', '.join(map(str, value)) or 'none'}")
        value = value[split]
    return value.replace("{split}", split)


def _literal(pattern: str) -> str:
    """The folders of a pattern before its first wildcard."""
    wild = WILDCARD.search(pattern)
    return pattern if wild is None else pattern[: pattern.rfind("/", 0, wild.start()) + 1]


def _columns(root: Path, line: str) -> Pair | None:
    """The two files that a line names, separated by a tab, a comma or space, which their names may have in them."""
    for separator in ("\t", ",", None):
        parts = [part.strip() for part in line.split(separator)]
        files = [path for part in parts for path in (root / part, root / normalize("NFD", part)) if path.is_file()]
        if len(parts) == 2 and len({*files}) == 2:
            return Pair(*dict.fromkeys(files))
    return None


def _listed(root: Path, index: Path, images: Mapping[str, Path], labels: Mapping[str, Path]) -> list[Pair]:
    """Pairs of the names of a split file, in its order."""
    pairs, missing = [], []
    by_name = {
        name: {**{named(path.name): path for path in files.values()}, **files}
        for name, files in (("images", images), ("labels", labels))
    }
    for line in read_names(index, "data.find.index"):
        columns = _columns(root, line)
        if columns is not None:
            pairs.append(columns)
            continue
        image = by_name["images"].get(line)
        key = next((key for key, path in images.items() if path == image), line)
        label = by_name["labels"].get(key)
        if image is None or label is None:
            missing.append(line if image is None else f"{line} (its label)")
        else:
            pairs.append(Pair(image, label))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{index} lists {len(pairs) + len(missing)} names, of which {len(missing)} are not there: "
            f"{', '.join(missing[:3])}{more}; expected names such as {', '.join(map(named, sorted(images)[:2]))}"
        )
    return pairs
