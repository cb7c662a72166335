"""The cache gives exactly what the files give, whatever happened to either."""

import logging
import os
import shutil
from collections import namedtuple

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from transkd.data import SegmentationDataModule, find_camvid
from transkd.data.dataset import SegmentationDataset
from transkd.data.feeding import frame_cache
from transkd.data.feeding.frame_cache import FrameCache
from transkd.data.feeding.heads import split_transform
from transkd.errors import UserError

RECIPE = [
    A.Resize(18, 20),
    A.RandomScale((-0.25, 0.75), p=1.0),
    A.RandomCrop(16, 16, pad_if_needed=True, pad_position="random", fill_mask=255),
    A.HorizontalFlip(),
    A.ColorJitter(p=0.8),
]


@pytest.fixture
def build(camvid_root, tmp_path):
    """Build a data module of the tiny CamVid, with its cache in ``tmp_path/cache``."""

    def build(**changes):
        settings = {
            "find": find_camvid,
            "root": str(camvid_root),
            "classes": "camvid",
            "num_classes": 11,
            "void": [11],
            "batch_size": 2,
            "train_transform": A.Compose(RECIPE),
            "eval_transform": A.Compose([A.Resize(12, 16)]),
            "cache": str(tmp_path / "cache"),
        }
        return SegmentationDataModule(**{**settings, **changes})

    return build


def batches(data):
    """Two training epochs and the validation split."""
    data.prepare_data()
    loader, found = data.train_dataloader(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found += loader
    return found + list(data.val_dataloader())


def same(one, other):
    return all(
        a.name == b.name and torch.equal(a.image, b.image) and torch.equal(a.target, b.target)
        for a, b in zip(one, other, strict=True)
    )


def files(tmp_path, split="train"):
    return sorted((tmp_path / "cache").glob(f"{split}_*/*.npy"))


@pytest.fixture
def reads(monkeypatch):
    """Names of the images that are decoded."""
    names, read = [], SegmentationDataset.read

    def counted(self, index):
        names.append(self.pairs[index].image.name)
        return read(self, index)

    monkeypatch.setattr(SegmentationDataset, "read", counted)
    return names


@pytest.mark.parametrize(
    ("train", "protocol"),
    [(A.Compose(RECIPE), "full-res"), (A.Compose(RECIPE[2:]), "input-res"), (None, "transkd-paper")],
)
def test_samples_are_bit_identical(build, reads, train, protocol):
    settings = {"train_transform": train, "protocol": protocol}
    expected = batches(build(cache=None, **settings))
    reads.clear()
    assert same(batches(build(**settings)), expected)
    assert len(reads) == 4 + 3  # each frame once
    reads.clear()
    assert same(batches(build(**settings, num_workers=1)), expected)
    assert reads == []


def test_padding_of_validation_images_is_undone_alike(build):
    """What the rest does to the resized frame is what the whole does to the image on disk."""
    settings = {"eval_transform": A.Compose([A.LongestMaxSize(48), A.PadIfNeeded(64, 64)])}
    expected, found = (batches(build(cache=cache, **settings)) for cache in (None, build().cache))
    assert same(found, expected)
    assert all(torch.equal(one.place, other.place) for one, other in zip(found[4:], expected[4:], strict=True))
    assert len(found[4:]) == 3


def test_frames_of_different_sizes(build, camvid_root):
    for path in (camvid_root / "train" / "train_00.png", camvid_root / "trainannot" / "train_00.png"):
        Image.open(path).resize((40, 30), Image.Resampling.NEAREST).save(path)
    settings = {"train_transform": A.Compose(RECIPE[2:])}
    assert same(batches(build(**settings)), batches(build(cache=None, **settings)))


def test_a_killed_run_is_continued(build, reads, tmp_path):
    build().prepare_data()
    stamps = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert len(stamps) == 2 * 4
    lost, half = files(tmp_path)[:2], files(tmp_path)[4]
    for path in (*lost, half):
        path.unlink()
    reads.clear()
    build().prepare_data()
    assert len(reads) == 2
    kept = set(stamps) - {*lost, half, *half.parent.glob(half.name.split(".")[0] + "*")}
    assert all(path.stat().st_mtime_ns == stamps[path] for path in kept)
    assert len(files(tmp_path)) == 2 * 4


def test_a_changed_image_is_read_again(build, reads, camvid_root, tmp_path, caplog):
    before = batches(build())
    path = camvid_root / "train" / "train_02.png"
    Image.fromarray(np.full((24, 32, 3), 9, np.uint8)).save(path)
    os.utime(path, ns=(1, 1))
    reads.clear()
    with caplog.at_level(logging.INFO):
        after = batches(build())
    assert reads == ["train_02.png"]
    assert "1 frames of train have changed since they were cached" in caplog.text
    assert len(files(tmp_path)) == 2 * 4  # nothing outdated remains
    assert not same(after, before)
    assert same(after, batches(build(cache=None)))


def test_a_damaged_file_is_written_again(build, reads, tmp_path, caplog):
    expected = batches(build())
    short, wrong = files(tmp_path)[0], files(tmp_path)[2]
    short.write_bytes(short.read_bytes()[:-5])
    wrong.write_bytes(b"no array")
    reads.clear()
    with caplog.at_level(logging.WARNING):
        assert same(batches(build()), expected)
    assert len(reads) == 2
    assert "2 frames of train have changed since they were cached, are incomplete or damaged" in caplog.text


def test_what_vanishes_during_a_run_is_read_from_the_files(build, tmp_path):
    expected = batches(build(cache=None))
    data = build()
    data.prepare_data()
    shutil.rmtree(tmp_path / "cache")
    assert same(list(data.val_dataloader()), expected[4:])


def test_another_head_or_other_labels_have_a_cache_of_their_own(build, tmp_path):
    for changes in ({}, {"train_transform": A.Compose([A.Resize(17, 20)])}, {"void": [11, 3]}):
        build(**changes).prepare_data()
    assert len(list((tmp_path / "cache").glob("train_*"))) == 3
    build(train_transform=A.Compose(RECIPE[:1])).prepare_data()  # another rest, the same head
    assert len(list((tmp_path / "cache").glob("train_*"))) == 3


def test_evaluation_caches_what_it_reads(build, tmp_path):
    data = build()
    data.fill_cache(("val",))
    assert len(files(tmp_path, "val")) == 2 * 3
    assert files(tmp_path) == []


def test_what_it_takes_is_said(build, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_cache, "PROBES", 2)
    with caplog.at_level(logging.INFO):
        build().prepare_data()
    assert f"writing 2 frames of train to {tmp_path / 'cache'}" in caplog.text  # two were written to know it
    assert "data.cache: wrote 4 frames, 0.00 GB" in caplog.text
    shutil.rmtree(tmp_path / "cache")
    disk = namedtuple("Disk", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(100))
    with pytest.raises(UserError, match=r"data.cache=.*: 2 more frames of train take about .* are free; name a folder"):
        build().prepare_data()


def test_a_wrong_label_is_named_before_the_training(build, camvid_root):
    Image.fromarray(np.full((24, 32), 200, np.uint8)).save(camvid_root / "trainannot" / "train_01.png")
    with pytest.raises(UserError, match=r"train_01.png: label values \[200\]"):
        build().prepare_data()


def test_what_killed_processes_left_is_removed(build, tmp_path):
    build().prepare_data()
    folder = files(tmp_path)[0].parent
    old, new = folder / ".frame.old", folder / ".frame.new"
    old.touch(), new.touch()
    os.utime(old, (1, 1))
    build().prepare_data()
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    ("transforms", "head"),
    [
        ([A.Resize(8, 8), A.SmallestMaxSize(8), A.HorizontalFlip()], 2),
        ([A.Resize(8, 8, p=0.5)], 0),
        ([A.SmallestMaxSize([8, 9])], 0),
        ([A.LongestMaxSize(8)], 1),
        ([A.Resize(8, 8, mask_interpolation=cv2.INTER_LINEAR)], 0),
        ([A.HorizontalFlip(), A.Resize(8, 8)], 0),
    ],
)
def test_head_and_rest(transforms, head):
    first, rest = split_transform(A.Compose(transforms))
    assert [*(first or ()), *(rest or ())] == transforms
    assert len(first or ()) == head
    assert split_transform(A.Compose(transforms, p=0.5))[0] is None


def test_the_folder_says_what_it_holds(build):
    data = build()
    cache = FrameCache(SegmentationDataset([], data.classes, transform=A.Compose(RECIPE)), data.cache, "train")
    assert '"height": 18' in cache.recipe
    assert "RandomScale" not in cache.recipe
