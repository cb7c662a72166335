"""BDD100K (Yu et al., CVPR 2020), the 10K images with semantic segmentation in the 19 classes of Cityscapes."""

from pathlib import Path

from transkd.data.folder import find_by_pattern
from transkd.data.listing import Pair

__all__ = ["find_bdd100k"]


def find_bdd100k(root: str | Path, split: str) -> list[Pair]:
    """Find images and labels of a split, in the layout of the archives *10K Images* and *Segmentation*.

    Args:
        root: the folder ``bdd100k`` with ``images/10k/`` and ``labels/sem_seg/masks/``.
        split: "train" (7,000 images) or "val" (1,000).

    Raises:
        UserError: the folder does not have that layout, or an image or label has no counterpart.
    """
    return find_by_pattern(
        Path(root),
        split,
        f"images/10k/{split}/*.jpg",
        f"labels/sem_seg/masks/{split}/*.png",
        about="BDD100K images",
        note="get the 10K images and the segmentation labels of BDD100K",
    )
