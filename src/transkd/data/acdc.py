"""ACDC: adverse conditions with correspondences (Sakaridis et al., arXiv 2104.13395), the 19 Cityscapes classes."""

from collections.abc import Sequence
from pathlib import Path

from transkd.data.listing import Pair, elsewhere, pair_by_name
from transkd.errors import UserError

__all__ = ["CONDITIONS", "find_acdc"]

CONDITIONS = ("fog", "night", "rain", "snow")
LAYOUT = (
    "rgb_anon/<fog|night|rain|snow>/<train|val>/<sequence>/<name>_rgb_anon.png beside "
    "gt/<condition>/<split>/<sequence>/<name>_gt_labelTrainIds.png"
)


def find_acdc(root: str | Path, split: str, conditions: Sequence[str] = CONDITIONS) -> list[Pair]:
    """Find images and labels of a split, in the layout of ``rgb_anon_trainvaltest.zip`` and ``gt_trainval.zip``.

    Args:
        root: folder that holds ``rgb_anon/`` and ``gt/``.
        split: "train" (1600 images) or "val" (406).
        conditions: any of fog, night, rain and snow.

    Raises:
        UserError: the folder does not have that layout, or an image or label has no counterpart.
    """
    root = Path(root)
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for condition in conditions:
        for found, folder, suffix in (
            (images, "rgb_anon", "_rgb_anon.png"),
            (labels, "gt", "_gt_labelTrainIds.png"),
        ):
            base = root / folder / condition / split
            for path in base.glob(f"*/*{suffix}"):
                found[f"{condition}/{path.relative_to(base).as_posix().removesuffix(suffix)}"] = path
    if not images and not labels:
        raise UserError(
            f"no ACDC images under data.root={root}: expected {LAYOUT}. "
            "Get the data set from acdc.vision.ee.ethz.ch, or try +experiment=demo, which generates its data"
            + elsewhere(root, "rgb_anon", "gt")
        )
    return pair_by_name(images, labels)
