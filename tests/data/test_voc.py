import numpy as np
import pytest
from PIL import Image

from transkd.data import VOC, SegmentationDataset, find_voc
from transkd.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Two validation images with palette labels, three augmented training images with plain ones."""
    lists = {
        "train": ["2007_000001"],
        "val": ["2007_000002", "2007_000003"],
        "trainaug": ["2007_000001", "2008_000004"],
    }
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (tmp_path / folder).mkdir(parents=True)
    for name in {name for names in lists.values() for name in names}:
        Image.fromarray(np.zeros((8, 12, 3), dtype=np.uint8)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        label = np.full((8, 12), 255, dtype=np.uint8)
        label[2:6] = 15
        coloured = Image.fromarray(label, mode="P")
        coloured.putpalette([value % 256 for value in range(768)])
        coloured.save(tmp_path / "SegmentationClass" / f"{name}.png")
        Image.fromarray(label).save(tmp_path / "SegmentationClassAug" / f"{name}.png")
    for split, names in lists.items():
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def names(pairs):
    return [(pair.image.stem, pair.label.parent.name) for pair in pairs]


def test_splits(root):
    assert names(find_voc(root, "val")) == [(n, "SegmentationClass") for n in ("2007_000002", "2007_000003")]
    assert names(find_voc(root, "train")) == [(n, "SegmentationClassAug") for n in ("2007_000001", "2008_000004")]
    assert names(find_voc(root, "train", augmented=False)) == [("2007_000001", "SegmentationClass")]


def test_palette_labels_are_class_ids(root):
    target = SegmentationDataset(find_voc(root, "val"), VOC)[0].target
    assert target.unique().tolist() == [15, 255]


def test_what_is_missing_is_named(root, tmp_path):
    (root / "SegmentationClassAug" / "2008_000004.png").unlink()
    with pytest.raises(UserError, match=r"image without a label: .*2008_000004.jpg"):
        find_voc(root, "train")
    (root / "JPEGImages" / "2008_000004.jpg").unlink()
    with pytest.raises(UserError, match=r"lists 2 names; neither image nor label exists for 1 of them, 2008_000004"):
        find_voc(root, "train")
    (root / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
    with pytest.raises(UserError, match=r"expected ImageSets/Segmentation/trainaug.txt.*data.find.augmented=false"):
        find_voc(root, "train")
    with pytest.raises(UserError, match=r"no Pascal VOC under data.root=.*val.txt"):
        find_voc(root / "nowhere", "val")
