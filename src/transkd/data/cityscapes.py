"""Cityscapes (Cordts et al., arXiv 1604.01685): 19 classes of driving scenes."""

from pathlib import Path

from transkd.data.dataset import Pair, pair_by_name
from transkd.errors import UserError

__all__ = ["find_cityscapes"]

LAYOUT = (
    "leftImg8bit/<train|val>/<city>/<name>_leftImg8bit.png beside gtFine/<split>/<city>/<name>_gtFine_labelTrainIds.png"
)


def find_cityscapes(root: str | Path, split: str) -> list[Pair]:
    """Images and fine labels of one split, as ``leftImg8bit_trainvaltest.zip`` and ``gtFine_trainvaltest.zip`` unpack.

    The train ids (``*_labelTrainIds.png``) are made by ``csCreateTrainIdLabelImgs`` of the package cityscapesScripts.

    Args:
        root: folder that holds ``leftImg8bit/`` and ``gtFine/``.
        split: "train" (2975 images) or "val" (500).

    Raises:
        UserError: a folder without that layout, labels that were not made yet, or files without a partner.
    """
    root = Path(root)
    found: dict[str, dict[str, Path]] = {}
    for folder, suffix in (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelTrainIds.png")):
        base = root / folder / split
        paths = base.glob(f"*/*{suffix}")
        found[folder] = {path.relative_to(base).as_posix().removesuffix(suffix): path for path in paths}
    images, labels = found["leftImg8bit"], found["gtFine"]
    if images and not labels and any((root / "gtFine" / split).glob("*/*_gtFine_labelIds.png")):
        raise UserError(
            f"{root / 'gtFine'} has labelIds, but no labelTrainIds: make them with cityscapesScripts "
            f"(pip install cityscapesscripts, then CITYSCAPES_DATASET={root} csCreateTrainIdLabelImgs)"
        )
    if not images and not labels:
        raise UserError(
            f"no Cityscapes images under data.root={root}: expected {LAYOUT}. "
            "Get the set from cityscapes-dataset.com, or try +experiment=demo, which draws its own data"
        )
    return pair_by_name(images, labels)
