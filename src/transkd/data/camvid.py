"""CamVid (Brostow et al., 2009) in the usual layout of the SegNet tutorial: 11 classes, 11 = void."""

from pathlib import Path

from transkd.data.dataset import IMAGE_SUFFIXES, Pair, pair_by_name
from transkd.errors import UserError

__all__ = ["VOID", "find_camvid"]

VOID = 11


def find_camvid(root: str | Path, split: str) -> list[Pair]:
    """Images ``<split>/<name>.png|.jpg`` with labels ``<split>annot/<name>.png``.

    Args:
        root: folder that holds ``train/``, ``trainannot/``, ``val/``, ``valannot/``.
        split: "train", "val" or "test".

    Raises:
        UserError: a folder without that layout, or files without a partner.
    """
    root = Path(root)
    images: dict[str, Path] = {}
    for path in (root / split).glob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and images.setdefault(path.stem, path) != path:
            raise UserError(f"two images of the same name, {images[path.stem]} and {path}; remove one")
    labels = {path.stem: path for path in (root / f"{split}annot").glob("*.png")}
    if not images and not labels:
        raise UserError(
            f"no CamVid images under data.root={root}: expected {split}/<name>.png (or .jpg) beside "
            f"{split}annot/<name>.png. Without the set, try +experiment=demo, which draws its own data"
        )
    return pair_by_name(images, labels)
