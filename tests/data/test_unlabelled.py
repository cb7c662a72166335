"""Training images without labels, and a share of the labels."""

from collections import Counter
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_identical, composed, results, student

from transkd.data import Batch, Pair, SegmentationDataModule, find_camvid
from transkd.data.unlabelled import take_labelled
from transkd.errors import UserError
from transkd.outputs import UNLABELLED
from transkd.run import run
from transkd.training.distiller import Distiller


@pytest.fixture
def build(camvid_root, tmp_path):
    """Build a data module with 4 labelled and 5 unlabelled training images."""
    rng = np.random.default_rng(0)
    for i in range(5):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(tmp_path / "frames" / f"{i}.png")

    def build(**changes):
        settings = {
            "find": find_camvid,
            "root": str(camvid_root),
            "classes": "camvid",
            "num_classes": 11,
            "void": [11],
            "batch_size": 3,
            "train_transform": A.Compose([A.RandomCrop(16, 16)]),
            "unlabelled": str(tmp_path / "frames" / "*.png"),
            "unlabelled_share": 0.67,
        }
        return SegmentationDataModule(**{**settings, **changes})

    return build


def epoch_of(data, epoch):
    data._next_epoch = epoch
    return list(data.train_dataloader())


def names(batches):
    return [name.rsplit("/", 1)[1].removesuffix(".png") for batch in batches for name in batch.name]


def test_each_batch_has_its_labelled_and_unlabelled_images(build):
    batches = epoch_of(build(), 0)
    assert len(batches) == 4 == build().batches()
    for batch in batches:
        assert (batch.target[0] != 254).all()
        assert (batch.target[1:] == 254).all()
    labelled = [names([batch])[0] for batch in batches]
    assert sorted(labelled) == [f"train_{i:02}" for i in range(4)]


def test_unlabelled_images_are_gone_through_across_epochs(build):
    data = build()
    seen = [name for epoch in range(5) for name in names(epoch_of(data, epoch)) if not name.startswith("train")]
    assert len(seen) == 40
    for turn in range(8):  # each of the five once before any a second time
        assert sorted(seen[5 * turn : 5 * turn + 5]) == ["0", "1", "2", "3", "4"]
    assert len({tuple(seen[5 * turn : 5 * turn + 5]) for turn in range(8)}) > 1


def test_an_epoch_can_be_repeated_whatever_ran_before(build):
    data = build()
    expected = [epoch_of(data, epoch) for epoch in range(3)][2]
    torch.manual_seed(9)
    (again, other) = (epoch_of(build(seed=seed), 2) for seed in (0, 1))
    assert names(again) == names(expected)
    assert all(torch.equal(a.image, b.image) for a, b in zip(again, expected, strict=True))
    assert names(other) != names(expected)


def test_ranks_share_the_images(build):
    seen = []
    for rank in range(2):
        data = build()
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        seen.append(names(epoch_of(data, 1)))
        assert len(seen[-1]) == 6 == 3 * data.batches(2)
    labelled, unlabelled = (
        [name for part in seen for name in part if name.startswith("train") == own] for own in (True, False)
    )
    assert sorted(labelled) == [f"train_{i:02}" for i in range(4)]
    counts = Counter(unlabelled)  # 8 of a sequence that goes through five
    assert sum(counts.values()) == 8
    assert max(counts.values()) <= 3


def test_on_the_device_they_are_marked(build):
    data = build()
    (batch, *_) = data.train_dataloader()
    target = data.on_after_batch_transfer(batch, 0).target
    assert target.dtype == torch.int64
    assert (target[1:] == UNLABELLED).all()
    assert torch.equal(target[0], batch.target[0].long())


def test_padding_stays_ignored(build):
    pad = A.Compose([A.PadIfNeeded(40, 48, position="top_left", fill=0, fill_mask=255)])
    (batch, *_) = build(train_transform=pad).train_dataloader()
    assert isinstance(batch, Batch)
    assert (batch.target[1, :24, :32] == 254).all()
    assert (batch.target[1, 24:] == 255).all()


def test_validation_has_labels_alone(build):
    assert len(build().dataset("val")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlabelled": "nowhere/*.png"}, r"no images for data\.unlabelled=nowhere"),
        ({"unlabelled_share": 0.1}, r"data.unlabelled_share=0.1 of data.batch_size=3 is 0 images"),
        ({"batch_size": 1}, r"data.unlabelled_share=0.67 of data.batch_size=1 is 1 images"),
        (
            {"batch_size": 16, "unlabelled_share": 0.5},
            r"batch_size=16, 8 of them labelled, .* the 4 training images with",
        ),
        ({"labelled": 0.0}, r"data.labelled=0.0: expected a share"),
    ],
)
def test_what_is_wrong_is_said(build, changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes).train_dataloader()


def test_a_share_of_the_labels():
    pairs = [Pair(f"{i:02}.png", f"{i:02}_label.png") for i in range(40)]
    quarter = take_labelled(pairs, 0.25, seed=0)
    assert len(quarter) == 10
    assert quarter == sorted(quarter) == take_labelled(pairs, 0.25, seed=0)
    assert set(quarter) < set(pairs)
    assert quarter != take_labelled(pairs, 0.25, seed=1)
    assert take_labelled(pairs, 1.0, seed=5) == pairs
    assert len(take_labelled(pairs, 0.001, seed=0)) == 1


def test_the_share_leaves_validation_alone(build):
    data = build(labelled=0.5, unlabelled=None)
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (2, 3)


@pytest.mark.slow
def test_a_resumed_run_sees_the_same_images(tmp_path, monkeypatch):
    """With terms that see images without labels; the data are those of the undisturbed run bit for bit."""
    monkeypatch.chdir(tmp_path)
    settings = ["distill=none", "term=[kd,teacher_labels]", "trainer.max_epochs=3", "name=mixed", "data.labelled=0.5"]
    settings += [
        "criterion.terms.teacher_labels.term.threshold=0",
        f"data.unlabelled={tmp_path}/data/rgb_anon/*/train/*/*.png",
    ]
    run(composed(tmp_path, "undisturbed", *settings))
    assert results(tmp_path, "undisturbed")["steps"] == 3 * 4  # a labelled and an unlabelled image in each batch
    step = Distiller.training_step

    def dies(self, batch, batch_idx):
        assert batch.target.amin((1, 2)).eq(UNLABELLED).tolist() == [False, True]
        if self.teacher is not None and (self.current_epoch, batch_idx) == (2, 1):
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Distiller, "training_step", dies)
    with pytest.raises(KeyError, match="killed"):
        run(composed(tmp_path, "outputs/mixed/killed", *settings))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run(composed(tmp_path, "outputs/mixed/second", *settings, "ckpt_path=last"))
    assert_identical(student(tmp_path, "undisturbed"), student(tmp_path, "outputs/mixed/second"))
    with pytest.raises(UserError, match="no term reads the teacher, so nothing is learnt from them"):
        run(composed(tmp_path, "alone", "distill=none", settings[-1]))
