"""Terms are weighed on one batch before step 1."""

import logging
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from small_data import Samples
from torch import nn

from transkd.data import Batch, SegmentationDataModule, find_camvid
from transkd.data.dataset import UNLABELLED_BYTE
from transkd.errors import UserError
from transkd.losses import Criterion, TaskCrossEntropy
from transkd.models import create_segmenter
from transkd.training.rehearsal import rehearse, warn_of_padding, weigh


class Constant(nn.Module):
    """A term of one value."""

    needs = frozenset()

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, student, teacher, target=None):
        return student.logits.sum() * 0 + self.value


class Data:
    """Two samples."""

    batch_size = 2

    def dataset(self, split):
        image = torch.zeros(3, 32, 64, dtype=torch.uint8)
        return Samples(Batch(image, torch.zeros(32, 64, dtype=torch.uint8), str(i)) for i in range(2))


@pytest.fixture
def student():
    torch.manual_seed(0)
    encoder = {"channels": [8, 16, 40, 64], "depths": [1, 1, 1, 1]}
    return create_segmenter("segformer_b0", 4, width=16, encoder=encoder)


def criterion(value, weight=1.0):
    return Criterion(
        {"task": {"term": TaskCrossEntropy(), "weight": 1.0}, "big": {"term": Constant(value), "weight": weight}}
    )


def test_a_term_that_drowns_the_others_is_warned_of(student, caplog):
    caplog.set_level(logging.INFO)
    monitored = criterion(1600.0, weight=0.1)
    weigh(student, None, monitored, Data())
    assert "big 160" in caplog.text
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "the term big is" in warning
    assert "criterion.terms.big.weight" in warning
    assert "teacher.standardise=true" in warning


def test_a_single_image_with_a_label_beside_others_without(student, caplog):
    class Mixed(list):
        labelled = 1

    class One(Data):
        def dataset(self, split):
            first, second = super().dataset(split)
            unknown = torch.full_like(second.target, UNLABELLED_BYTE)
            return Mixed([first, second._replace(target=unknown)])

    caplog.set_level(logging.INFO)
    weigh(student, None, criterion(2.0), One())
    assert "terms before step 1: task" in caplog.text


def test_terms_of_a_like_size_are_logged_alone(student, caplog):
    caplog.set_level(logging.INFO)
    state = torch.get_rng_state()
    student.train()
    weigh(student, None, criterion(2.0), Data())
    assert "terms before step 1: task" in caplog.text
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("fill", "said"), [({}, True), ({"fill_mask": 255}, False), ({"fill_mask": 1}, True)])
def test_padding_that_is_labelled_as_a_class_is_warned_of(fill, said, caplog):
    class Padded(Data):
        classes = SimpleNamespace(names=("road", "car"))

        def dataset(self, split):
            image = np.zeros((32, 64, 3), np.uint8)
            crop = A.RandomCrop(48, 48, pad_if_needed=True, **fill)
            return SimpleNamespace(transform=A.Compose([crop]), read=lambda index: (image, None))

    warn_of_padding(Padded())
    assert ("fill_mask: 255" in caplog.text) == said
    assert f"as {'car' if fill else 'road'}, class" in caplog.text or not said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, r"data\.batch_size=5 on 1 device\(s\) is more than the 4 training images; lower it"),
        (
            {"eval_transform": A.Compose([A.Normalize()])},
            r"gives the image values of type float32.*leave out Normalize",
        ),
        ({"train_transform": A.Compose([ToTensorV2()])}, r"gives the image a torch Tensor"),
        ({"void": []}, r"label values \[11\] are outside the 11 classes"),
    ],
)
def test_wrong_data_is_refused_before_anything_long(camvid_root, changes, message):
    encoder = {"channels": [8, 16, 40, 64], "depths": [1, 1, 1, 1]}
    network = create_segmenter("segformer_b0", 11, width=16, encoder=encoder)
    settings = {"find": find_camvid, "root": str(camvid_root), "classes": "camvid", "num_classes": 11, "void": [11]}
    data = SegmentationDataModule(**{**settings, "batch_size": 2, **changes})
    task = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 1.0}})
    with pytest.raises(UserError, match=message):
        rehearse(network, None, task, data)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, r"images and labels of a batch must have the same size, .*data\.eval_batch_size=1"),
        (
            A.Compose([A.Resize(32, 64)]),
            r"labels of a batch must .* \[24, 32\]; .*: \[30, 32\].*data\.eval_batch_size=1",
        ),
    ],
)
def test_validation_images_that_make_no_batch(camvid_root, student, transform, message):
    for path in (camvid_root / "val" / "val_01.png", camvid_root / "valannot" / "val_01.png"):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(np.concatenate([pixels, pixels[:6]])).save(path)
    data = SegmentationDataModule(
        find_camvid, str(camvid_root), "camvid", 11, 2, 2, void=[11], eval_transform=transform
    )
    student.num_classes = 11
    with pytest.raises(UserError, match=message):
        rehearse(student, None, Criterion({"task": {"term": TaskCrossEntropy(), "weight": 1.0}}), data)
