import numpy as np
import pytest
from PIL import Image

from transkd.data import CAMVID, SegmentationDataset, find_camvid
from transkd.data.camvid import VOID
from transkd.errors import UserError


@pytest.mark.parametrize(("split", "count"), [("train", 4), ("val", 3)])
def test_a_split(camvid_root, split, count):
    pairs = find_camvid(camvid_root, split)
    assert [pair.image for pair in pairs] == sorted((camvid_root / split).iterdir())
    assert [pair.label for pair in pairs] == sorted((camvid_root / f"{split}annot").iterdir())
    assert len(pairs) == count


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG", ".PNG"])
def test_images_of_other_formats(camvid_root, suffix):
    for path in sorted((camvid_root / "train").iterdir()):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    dataset = SegmentationDataset(find_camvid(str(camvid_root), "train"), CAMVID, void=[VOID])
    assert len(dataset) == 4
    assert all(pair.image.suffix == suffix for pair in dataset.pairs)
    assert dataset[0].image.shape == (3, 24, 32)


def test_void_is_ignored(camvid_root):
    pairs = find_camvid(camvid_root, "val")
    stored = np.asarray(Image.open(pairs[0].label))
    assert (stored == 11).any()
    target = SegmentationDataset(pairs, CAMVID, void=[VOID])[0].target.numpy()
    assert np.array_equal(target, np.where(stored == 11, 255, stored))


def test_other_files_are_left(camvid_root):
    (camvid_root / "train" / "Thumbs.db").touch()
    (camvid_root / "trainannot" / "list.txt").touch()
    assert len(find_camvid(camvid_root, "train")) == 4


def test_two_images_of_one_name_are_named(camvid_root):
    twin = camvid_root / "train" / "train_01.jpg"
    twin.touch()
    with pytest.raises(UserError, match="the same name") as caught:
        find_camvid(camvid_root, "train")
    assert str(twin) in str(caught.value)
    assert str(twin.with_suffix(".png")) in str(caught.value)


def test_every_one_without_a_partner_is_named(camvid_root):
    (camvid_root / "train" / "train_00.png").unlink()
    (camvid_root / "trainannot" / "train_02.png").unlink()
    with pytest.raises(UserError) as caught:
        find_camvid(camvid_root, "train")
    assert f"image without a label: {camvid_root / 'train' / 'train_02.png'}" in str(caught.value)
    assert f"label without an image: {camvid_root / 'trainannot' / 'train_00.png'}" in str(caught.value)


@pytest.mark.parametrize("root", ["nowhere", "."])
def test_a_folder_of_something_else_says_the_layout_and_the_way_out(tmp_path, root):
    with pytest.raises(UserError, match=r"data\.root=.*train/<name>\.png.*trainannot/.*\+experiment=demo") as caught:
        find_camvid(tmp_path / root, "train")
    assert str(tmp_path / root) in str(caught.value)
