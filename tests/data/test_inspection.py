"""What an inspection of a data set's files finds."""

import shutil

import numpy as np
import pytest
from damage import damage, write_many
from PIL import Image

from transkd.data import CAMVID, Pair, SegmentationDataModule, SegmentationDataset, find_camvid
from transkd.data.inspection import absent_classes, check_intact, duplicates, examine, inspect_split, open_split
from transkd.errors import UserError


@pytest.fixture
def data(camvid_root):
    return SegmentationDataModule(find_camvid, str(camvid_root), "camvid", 11, 2, void=[11])


def test_every_one_of_200_damaged_files_is_found_and_no_other(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "labels").mkdir()
    pairs = write_many(tmp_path, tmp_path / "labels", 150, rng)
    files = [file for pair in pairs for file in pair]
    broken = {files[i] for i in rng.permutation(len(files))[:200]}
    for turn, path in enumerate(sorted(broken)):
        damage(path, turn, rng)
    found = inspect_split(SegmentationDataset(pairs, CAMVID), "train", workers=2)
    assert len(found.problems) == 200
    named = {path for path in files if any(f" {path}:" in line for line in found.problems)}
    assert named == broken
    assert found.broken == {i for i, pair in enumerate(pairs) if broken & set(pair)}
    assert all("\n" not in line for line in found.problems)


def test_a_jpeg_that_decodes_in_spite_of_damage_is_found(tmp_path):
    """libjpeg goes on over a missing end of a scan; Pillow says nothing."""
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    check_intact(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + content[middle + 300 :])
    Image.open(path).convert("RGB")
    with pytest.raises(UserError, match=r"a\.jpg: damaged \(Corrupt JPEG data"):
        check_intact(path)


def test_both_files_of_a_pair_are_looked_at(data):
    pair = data.dataset("train").pairs[0]
    pair.image.write_bytes(b"")
    Image.fromarray(np.full((24, 32), 77, np.uint8)).save(pair.label)
    first, second = examine(data.dataset("train"), 0).problems
    assert str(pair.image) in first
    assert f"{pair.label}: label values [77] are outside the 11 classes" in second


def test_sizes_classes_and_duplicates(data):
    train, val = (data.dataset(split) for split in ("train", "val"))
    shutil.copy(train.pairs[0].image, val.pairs[1].image)
    Image.fromarray(np.full((10, 20, 3), 9, np.uint8)).save(train.pairs[1].image)
    Image.fromarray(np.full((10, 20), 5, np.uint8)).save(train.pairs[1].label)
    for pair in val.pairs:
        label = np.asarray(Image.open(pair.label)).copy()
        label[label == 3] = 4
        Image.fromarray(label).save(pair.label)
    found = [inspect_split(dataset, split) for dataset, split in ((train, "train"), (val, "val"))]
    assert [inspection.problems for inspection in found] == [[], []]
    assert found[0].sizes == {(24, 32): 3, (10, 20): 1}
    counts = sum(np.bincount(train.read(i)[1].ravel(), minlength=256) for i in range(4))
    assert found[0].pixels.tolist() == counts[:11].tolist()
    assert absent_classes(found[0], CAMVID.names) == []
    assert absent_classes(found[1], CAMVID.names) == ["the class road never occurs in the labels of val"]
    assert duplicates(found) == [f"the same image 2 times: {train.pairs[0].image} (train), {val.pairs[1].image} (val)"]


def test_a_sample_is_spread_over_the_split(data):
    train = data.dataset("train")
    train.pairs[3].image.unlink()
    assert inspect_split(train, "train", sample=2).broken == {3}  # the first and the last of four
    sample = inspect_split(train, "train", sample=1)
    assert (sample.total, sample.checked, sample.broken) == (4, 1, set())
    assert absent_classes(sample, ["nowhere"] * 11) == []


def test_unpaired_files_do_not_hide_the_others(data, camvid_root):
    (camvid_root / "trainannot" / "train_02.png").unlink()
    (camvid_root / "train" / "train_00.png").unlink()
    dataset, unpaired = open_split(data, "train")
    assert [path.image.name for path in dataset.pairs] == ["train_01.png", "train_03.png"]
    assert unpaired == [
        f"image without a label: {camvid_root / 'train' / 'train_02.png'}",
        f"label without an image: {camvid_root / 'trainannot' / 'train_00.png'}",
    ]
    assert open_split(data, "val")[1] == []


def test_an_image_without_labels_is_looked_at_too(data, camvid_root):
    image = camvid_root / "val" / "val_00.png"
    dataset = SegmentationDataset([Pair(image, None)], CAMVID)
    assert examine(dataset, 0)[1:3] == ([], (24, 32))
    image.write_bytes(b"")
    assert len(examine(dataset, 0).problems) == 1


def test_a_frame_with_and_without_its_label_is_no_duplicate(data, camvid_root):
    pairs = data.dataset("train").pairs
    again = Pair(camvid_root / "train" / ".." / "train" / pairs[0].image.name, None)
    found = inspect_split(SegmentationDataset([*pairs, again], CAMVID), "train")
    assert duplicates([found]) == []


def test_images_without_labels_take_no_place_in_the_sample_of_labels(data):
    pairs = data.dataset("train").pairs[:2]
    unlabelled = [Pair(pair.image, None) for pair in data.dataset("val").pairs * 4]
    found = inspect_split(SegmentationDataset([*pairs, *unlabelled], CAMVID, void=[11]), "train", sample=2)
    assert (found.total, found.checked, found.labels) == (14, 4, (2, 2))
    read = SegmentationDataset(pairs, CAMVID, void=[11]).read
    assert found.pixels.tolist() == sum(np.bincount(read(i)[1].ravel(), minlength=256)[:11] for i in range(2)).tolist()
    assert all("in the labels of train" in line for line in absent_classes(found, ["nowhere"] * 11))
