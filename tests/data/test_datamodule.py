from types import SimpleNamespace

import albumentations as A
import pytest
import torch

from transkd.data import CAMVID, Batch, ClassSet, SegmentationDataModule, find_camvid
from transkd.data.datamodule import SeededSampler
from transkd.errors import UserError


@pytest.fixture
def build(camvid_root):
    """Build a data module of the tiny CamVid (4 training, 3 validation images)."""

    def build(**changes):
        settings = {
            "find": find_camvid,
            "root": str(camvid_root),
            "classes": "camvid",
            "num_classes": 11,
            "void": [11],
            "batch_size": 2,
            "train_transform": A.Compose([A.RandomCrop(16, 16), A.RandomBrightnessContrast(p=1.0)]),
            "protocol": "input-res",
        }
        return SegmentationDataModule(**{**settings, **changes})

    return build


def epoch_of(loader, epoch):
    """All batches of an epoch, begun as Lightning does it."""
    loader.sampler.set_epoch(epoch)
    return list(loader)


def names(batches):
    return [name for batch in batches for name in batch.name]


def same(one, other):
    return names(one) == names(other) and all(
        torch.equal(a.image, b.image) and torch.equal(a.target, b.target) for a, b in zip(one, other, strict=True)
    )


def samples(batches):
    """Pixels by file."""
    return {name: image for batch in batches for name, image in zip(batch.name, batch.image, strict=True)}


# Training


def test_batches(build):
    batches = epoch_of(build(batch_size=3).train_dataloader(), 0)
    assert len(batches) == 1  # 4 images: the smaller batch is dropped
    assert isinstance(batches[0], Batch)
    assert (batches[0].image.shape, batches[0].target.shape) == ((3, 3, 16, 16), (3, 16, 16))
    assert (batches[0].image.dtype, batches[0].target.dtype) == (torch.uint8, torch.uint8)


def test_labels_become_integers_on_the_device(build):
    data = build()
    (batch, *_) = data.train_dataloader()
    moved = data.on_after_batch_transfer(batch, 0)
    assert moved.target.dtype == torch.int64
    assert torch.equal(moved.target, batch.target.long())
    assert moved.image is batch.image
    other = (torch.zeros(1), torch.zeros(1))
    assert data.on_after_batch_transfer(other, 0) is other


def test_the_number_of_workers_changes_nothing(build):
    alone, together = build(num_workers=0).train_dataloader(), build(num_workers=2).train_dataloader()
    for epoch in (0, 1):
        assert same(epoch_of(alone, epoch), epoch_of(together, epoch))


def test_an_epoch_has_its_own_order_and_augmentation(build):
    loader = build(batch_size=4).train_dataloader()
    epochs = [epoch_of(loader, epoch) for epoch in range(4)]
    assert len({tuple(names(epoch)) for epoch in epochs}) > 1
    assert all(sorted(names(epoch)) == sorted(names(epochs[0])) for epoch in epochs)
    first, second = samples(epochs[0]), samples(epochs[1])
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_an_epoch_can_be_repeated_whatever_ran_before(build):
    undisturbed = build().train_dataloader()
    expected = [epoch_of(undisturbed, epoch) for epoch in range(3)][2]
    torch.manual_seed(99)
    assert same(epoch_of(build().train_dataloader(), 2), expected)
    assert not same(epoch_of(build(seed=1).train_dataloader(), 2), expected)


def test_another_seed_augments_otherwise(build):
    first, second = (samples(epoch_of(build(seed=seed, batch_size=4).train_dataloader(), 0)) for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_ranks_share_the_training_images(build):
    seen = []
    for rank in range(2):
        data = build(batch_size=1)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        seen.append(names(epoch_of(data.train_dataloader(), 3)))
    assert len(seen[0]) == len(seen[1]) == 2
    assert len(set(seen[0]) | set(seen[1])) == 4


def test_each_sample_has_its_own_seed():
    keys = list(SeededSampler(range(50), num_replicas=1, rank=0, seed=0))
    assert sorted(index for index, _ in keys) == list(range(50))
    assert len({seed for _, seed in keys}) == 50


def test_a_batch_too_large_is_named(build):
    with pytest.raises(UserError, match=r"data.batch_size=5 on 1 device\(s\) is more than the 4 training images"):
        build(batch_size=5).train_dataloader()
    data = build(batch_size=3)
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(UserError, match=r"batch_size=3 on 2 device\(s\)"):
        data.train_dataloader()


# Validation


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_validation_image_is_scored_exactly_once(build, camvid_root, ranks, batch_size):
    seen = []
    for rank in range(ranks):
        data = build(eval_batch_size=batch_size)
        data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
        seen += names(data.val_dataloader())
    assert sorted(seen) == sorted(map(str, (camvid_root / "val").iterdir()))


@pytest.mark.parametrize(
    ("protocol", "label"), [("full-res", (24, 32)), ("input-res", (12, 16)), ("transkd-paper", (12, 16))]
)
def test_the_protocol_says_whether_labels_are_resized(build, protocol, label):
    data = build(eval_transform=A.Compose([A.Resize(12, 16)]), protocol=protocol)
    (image, target, _), *_ = data.val_dataloader()
    assert image.shape[-2:] == (12, 16)
    assert target.shape[-2:] == label
    assert data.dataset("train")[0].target.shape == (16, 16)  # training labels always follow


def test_void_reaches_both_splits(build):
    for split in ("train", "val"):
        assert 11 not in build(train_transform=None).dataset(split)[0].target


def test_files_are_paired_once(build):
    calls = []

    def find(root, split):
        calls.append(split)
        return find_camvid(root, split)

    data = build(find=find)
    data.val_dataloader(), data.val_dataloader(), data.train_dataloader()
    assert calls == ["val", "train"]


def test_what_is_to_be_drawn_is_drawn_into_the_root(build):
    roots = []
    build(prepare=lambda root: roots.append(root), root="somewhere").prepare_data()
    build().prepare_data()
    assert roots == ["somewhere"]


# What is wrong with the settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "kitti"}, r"unknown classes 'kitti'; available: cityscapes, camvid"),
        ({"num_classes": 19}, "num_classes=19, but the class set has 11 classes"),
        ({"protocol": "half-res"}, r"unknown protocol 'half-res'; available: full-res, input-res, transkd-paper"),
    ],
)
def test_wrong_settings_are_named(build, changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_classes_of_ones_own(build):
    classes = ClassSet(tuple("abcdefghijkl"), ((1, 2, 3),) * 12)
    assert build(classes=classes, num_classes=12).classes == classes
    assert build().classes is CAMVID
