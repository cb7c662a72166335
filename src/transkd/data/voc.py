"""Pascal VOC 2012 (Everingham et al., 2010): 20 object classes and background."""

from pathlib import Path

from transkd.data.listing import Pair, elsewhere, pair_by_name, read_names
from transkd.errors import UserError

__all__ = ["find_voc"]


def find_voc(root: str | Path, split: str, augmented: bool = True) -> list[Pair]:
    """Find the images and labels listed in ``ImageSets/Segmentation/<split>.txt``, in VOC's layout.

    Args:
        root: the folder ``VOC2012`` (in ``VOCdevkit``).
        split: "train" or "val" (1,449 images).
        augmented: for training use ``trainaug.txt`` (10,582 images) and ``SegmentationClassAug/``, the labels of
            Hariharan et al. (SBD, 2011) in VOC's format, as the papers do.

    Raises:
        UserError: the folder does not have that layout, or a listed file does not exist.
    """
    root = Path(root)
    listed = "trainaug" if augmented and split == "train" else split
    folder = "SegmentationClassAug" if listed == "trainaug" else "SegmentationClass"
    index = root / "ImageSets" / "Segmentation" / f"{listed}.txt"
    if not index.is_file():
        raise UserError(
            f"no Pascal VOC under data.root={root}: expected ImageSets/Segmentation/{listed}.txt beside JPEGImages/ "
            f"and {folder}/. Get the data set from host.robots.ox.ac.uk/pascal/VOC/voc2012"
            + elsewhere(root, "ImageSets/Segmentation", "JPEGImages")
            + ("; without the augmented labels of SBD set data.find.augmented=false" if listed == "trainaug" else "")
        )
    names = read_names(index, "Pascal VOC")
    images = {name: path for name in names if (path := root / "JPEGImages" / f"{name}.jpg").is_file()}
    labels = {name: path for name in names if (path := root / folder / f"{name}.png").is_file()}
    missing = [name for name in names if name not in images and name not in labels]
    if missing:
        raise UserError(
            f"{index} lists {len(names)} names; neither image nor label exists for {len(missing)} of "
            f"them, {', '.join(missing[:3])}: expected JPEGImages/<name>.jpg and {folder}/<name>.png"
        )
    return pair_by_name(images, labels)
