"""CamVid (Brostow et al., 2009) in the layout of the SegNet tutorial: 11 classes, label 11 = void."""

from pathlib import Path

from transkd.data.listing import Pair, by_stem, elsewhere, pair_by_name
from transkd.errors import UserError

__all__ = ["VOID", "find_camvid"]

VOID = 11


def find_camvid(root: str | Path, split: str) -> list[Pair]:
    """Find images ``<split>/<name>.png`` (or another format) and labels ``<split>annot/<name>.png`` likewise.

    Args:
        root: folder that holds ``train/``, ``trainannot/``, ``val/``, ``valannot/``.
        split: "train", "val" or "test".

    Raises:
        UserError: the folder does not have that layout, or an image or label has no counterpart.
    """
    root = Path(root)
    images, labels = (by_stem((root / folder).glob("*")) for folder in (split, f"{split}annot"))
    if not images and not labels:
        raise UserError(
            f"no CamVid images under data.root={root}: expected {split}/<name>.png (or .jpg) beside "
            f"{split}annot/<name>.png. Without the data set, try +experiment=demo, which generates its data"
            + elsewhere(root, split, f"{split}annot")
        )
    return pair_by_name(images, labels)
