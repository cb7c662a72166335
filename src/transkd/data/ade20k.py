"""ADE20K, the SceneParsing benchmark (Zhou et al., CVPR 2017): 150 classes, label 0 = none of them."""

from pathlib import Path

from transkd.data.folder import find_by_pattern
from transkd.data.listing import Pair

__all__ = ["find_ade20k"]

FOLDERS = {"train": "training", "val": "validation"}


def find_ade20k(root: str | Path, split: str) -> list[Pair]:
    """Find images and labels of a split, in the layout of ``ADEChallengeData2016.zip``.

    The labels 1 … 150 are the classes 0 … 149 with ``data.label.reduce_zero_label=true``.

    Args:
        root: the folder ``ADEChallengeData2016``.
        split: "train" (20,210 images) or "val" (2,000).

    Raises:
        UserError: the folder does not have that layout, or an image or label has no counterpart.
    """
    folder = FOLDERS.get(split, split)
    return find_by_pattern(
        Path(root),
        split,
        f"images/{folder}/*.jpg",
        f"annotations/{folder}/*.png",
        about="ADE20K images",
        note="get ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark",
    )
