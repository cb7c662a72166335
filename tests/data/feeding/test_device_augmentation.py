"""Augmentation on the device beside Albumentations: the same random numbers, pixels to rounding, labels exactly."""

import logging
from pathlib import Path
from types import SimpleNamespace

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision

from transkd.cli import CONF
from transkd.data import Batch, SegmentationDataModule, find_camvid
from transkd.data.dataset import seed_transform
from transkd.data.feeding.colour import jitter
from transkd.data.feeding.device import DeviceAugmentation, on_device, untranslatable
from transkd.data.feeding.planning import OUTSIDE, Axis, PlannedBatch, PlannedDataset, collate_planned
from transkd.errors import UserError

RNG = np.random.default_rng(0)
FILLED_CROP = {"pad_if_needed": True, "pad_position": "random", "fill": 0, "fill_mask": 255}


def frame(height, width):
    """An image that is smooth but for noise, and labels in blocks."""
    small = RNG.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = RNG.integers(0, 9, image.shape, dtype=np.uint8)
    return cv2.add(image, noise), RNG.integers(0, 19, (height, width), dtype=np.uint8)


class Frames:
    """What a planned data set reads."""

    def __init__(self, *frames):
        self.frames = frames
        self.pairs = [type("Pair", (), {"image": Path(f"{index}.png")}) for index in range(len(frames))]

    def frame(self, index):
        return self.frames[index]


def both(transform, frames, seeds):
    """Images and labels of Albumentations and of the device, one sample per frame and seed."""
    expected = []
    for (image, label), seed in zip(frames, seeds, strict=True):
        seed_transform(transform, seed)
        made = transform(image=image, mask=label)
        expected.append((made["image"], made["mask"]))
    augmentation = DeviceAugmentation(transform)
    planned = PlannedDataset(Frames(*frames), augmentation.plan)
    batch = augmentation.apply(collate_planned([planned[key] for key in enumerate(seeds)]))
    return batch, [np.stack(parts) for parts in zip(*expected, strict=True)]


def recipe(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"data={name}", "data.root=nowhere", "run_dir=run"])
    return instantiate(cfg.data.train_transform)


CASES = {
    "scale": (A.Compose([A.RandomScale((-0.5, 1.0), p=1.0), A.RandomCrop(40, 56, **FILLED_CROP)]), (48, 64)),
    "scale, sometimes": (A.Compose([A.RandomScale((-0.5, 1.0), p=0.5), A.RandomCrop(40, 56, **FILLED_CROP)]), (48, 64)),
    "flip": (A.Compose([A.HorizontalFlip(p=0.5)]), (21, 34)),
    "shift": (A.Compose([A.HorizontalFlip(), A.Affine(translate_px=(-3, 3), fill=7, fill_mask=255, p=1.0)]), (21, 34)),
    "crop, shift": (A.Compose([A.RandomCrop(16, 16), A.Affine(translate_px=(-3, 3), fill_mask=255)]), (21, 34)),
    "centre": (A.Compose([A.Resize(20, 30), A.CenterCrop(12, 16), A.HorizontalFlip()]), (40, 64)),
    "brightness": (A.Compose([A.RandomCrop(16, 16), A.RandomBrightnessContrast(0.3, 0.3, p=0.7)]), (24, 32)),
    "camvid": ("camvid", (360, 480)),
    "acdc": ("acdc", (540, 960)),
    "synthetic": ("synthetic", (128, 256)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_device_makes_what_albumentations_makes(case):
    transform, size = CASES[case]
    transform = recipe(transform) if isinstance(transform, str) else transform
    count = 3 if isinstance(CASES[case][0], str) else 8
    batch, (image, label) = both(transform, [frame(*size) for _ in range(count)], range(count))
    assert (batch.image.dtype, batch.target.dtype) == (torch.uint8, torch.uint8)
    assert np.array_equal(batch.target.numpy(), label)
    difference = np.abs(batch.image.permute(0, 2, 3, 1).numpy().astype(int) - image)
    scaled = "scale" in case or case == "camvid"
    assert difference.max() <= (2 if scaled else 0)  # a rounding, stretched by a brightness
    assert (difference > 0).mean() < 0.2


def test_frames_of_different_sizes_make_one_batch():
    transform = A.Compose([A.RandomScale((-0.5, 1.0), p=1.0), A.RandomCrop(40, 40, **FILLED_CROP)])
    frames = [frame(*size) for size in ((48, 64), (64, 36), (20, 100))]
    batch, (image, label) = both(transform, frames, [5, 6, 7])
    assert np.array_equal(batch.target.numpy(), label)
    assert np.abs(batch.image.permute(0, 2, 3, 1).numpy().astype(int) - image).max() <= 1
    assert batch.name == ["0.png", "1.png", "2.png"]
    with pytest.raises(UserError, match=r"same size, got 0.png: 48×64; 1.png: 64×36"):
        both(A.Compose([A.HorizontalFlip()]), frames[:2], [0, 1])


def test_an_image_that_is_smaller_than_the_crop_is_named():
    planned = PlannedDataset(
        Frames(frame(40, 40), frame(20, 40)), DeviceAugmentation(A.Compose([A.RandomCrop(32, 32)])).plan
    )
    assert planned[0, 0].rows.shape == (32,)
    with pytest.raises(UserError, match=r"data\.train_transform .* fails on 1\.png, 20×40 pixels: Crop size"):
        planned[1, 0]


@pytest.mark.parametrize("plugin", [HalfPrecision("bf16-true"), DoublePrecision()])
def test_no_precision_of_the_trainer_moves_a_sample(plugin):
    augmentation = DeviceAugmentation(A.Compose([A.RandomScale((0.3, 0.3), p=1), A.RandomCrop(32, 300)]))
    batch = collate_planned([PlannedDataset(Frames(frame(40, 400)), augmentation.plan)[0, 5]])
    made, expected = augmentation.apply(plugin.convert_input(batch)), augmentation.apply(batch)
    assert torch.equal(made.image, expected.image)


def test_only_what_a_sample_shows_is_sent():
    augmentation = DeviceAugmentation(A.Compose([A.RandomScale((1.0, 1.0), p=1.0), A.RandomCrop(20, 20)]))
    sample = PlannedDataset(Frames(frame(48, 64)), augmentation.plan)[0, 3]
    assert max(sample.target.shape) <= 12  # 20 positions at twice the size, and the neighbours of the outermost


def test_colour_jitter_is_that_of_opencv():
    """A rounding before the step to 8-bit HSV may change the hue there by 2°, a few values of a few pixels."""
    image, label = frame(64, 64)
    transform = A.Compose([A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05, p=0.8)])
    batch, (expected, _) = both(transform, [(image, label)] * 24, range(24))
    difference = np.abs(batch.image.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert difference.max() <= 8
    assert difference.mean() < 0.05
    assert (difference > 1).mean() < 0.005


@pytest.mark.parametrize("step", range(4))
def test_each_colour_step_by_itself(step):
    names = ("brightness", "contrast", "saturation", "hue")
    neutral = dict.fromkeys(names[:3], (1.0, 1.0)) | {"hue": (0.0, 0.0)}
    image, _ = frame(32, 32)
    for factor in (0.04, -0.03) if step == 3 else (0.6, 1.35, 0.0):
        transform = A.ColorJitter(**{**neutral, names[step]: (factor, factor)}, p=1.0)
        expected = transform(image=image)["image"].astype(int)
        values = [1.0, 1.0, 1.0, 0.0]
        values[step] = factor
        found = jitter(torch.from_numpy(image).permute(2, 0, 1)[None].float(), [([step], values)])
        difference = np.abs(found[0].permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.05


def test_parameters_have_albumentations_distribution():
    """Over 400 seeds: scales uniform in their range, half of the images flipped."""
    augmentation = DeviceAugmentation(
        A.Compose([A.RandomScale((-0.25, 0.75), p=1.0), A.RandomCrop(40, 40, **FILLED_CROP), A.HorizontalFlip(p=0.5)])
    )
    image, label = frame(48, 64)
    plans = [
        augmentation.plan(image, label, seed)[2] for seed in np.random.default_rng(1).integers(0, 2**32, 400).tolist()
    ]
    scales = np.sort([plan.columns.scaled / 64 for plan in plans])
    assert np.abs(scales - np.linspace(0.75, 1.75, 400)).max() < 0.1  # Kolmogorov-Smirnov at a level of 0.1 %: 0.097
    flipped = np.mean([np.diff(plan.columns.positions[plan.columns.positions >= 0])[0] < 0 for plan in plans])
    assert 0.4 < flipped < 0.6


def test_axis_by_hand():
    axis = Axis(4)
    axis.scale(1.5)
    assert axis.scaled == 6
    assert axis.linear() == pytest.approx([0, 0.5, 7 / 6, 11 / 6, 2.5, 3])  # (p + 0.5) · 4/6 − 0.5, within 0 … 3
    assert axis.nearest().tolist() == [0, 0, 1, 2, 2, 3]  # ⌊p · 4/6⌋
    axis.pad(1, 0)
    axis.crop(0, 4)
    axis.flip()
    assert axis.positions.tolist() == [2, 1, 0, OUTSIDE]
    axis.shift(-1)
    assert axis.positions.tolist() == [1, 0, OUTSIDE, OUTSIDE]
    assert axis.nearest().tolist() == [0, 0, OUTSIDE, OUTSIDE]


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (A.HorizontalFlip(), r"only an albumentations.Compose with p=1"),
        (A.Compose([A.HorizontalFlip()], p=0.5), r"only an albumentations.Compose with p=1"),
        (A.Compose([A.GaussNoise()]), "GaussNoise has no equivalent"),
        (A.Compose([A.HorizontalFlip(), A.RandomScale()]), "RandomScale is not the first"),
        (A.Compose([A.ColorJitter(), A.HorizontalFlip()]), "HorizontalFlip comes after a colour transform"),
        (A.Compose([A.RandomScale(interpolation=cv2.INTER_CUBIC)]), "RandomScale has arguments"),
        (A.Compose([A.Affine(rotate=(-5, 5))]), "Affine has arguments"),
        (A.Compose([A.Affine(scale=(0.5, 2))]), "Affine has arguments"),
        (A.Compose([A.Affine(translate_px=1, fill=(1, 2, 3))]), "Affine has arguments"),
        (A.Compose([A.RandomBrightnessContrast(brightness_by_max=False)]), "RandomBrightnessContrast has arguments"),
        (A.Compose([A.RandomCrop(8, 8, **FILLED_CROP), A.Affine(translate_px=1)]), "its transforms fill with"),
    ],
)
def test_what_has_no_equivalent_stays_on_the_cpu_and_says_so(transform, reason, caplog):
    assert reason in untranslatable(transform)
    with caplog.at_level(logging.INFO):
        assert on_device(transform, "device") is None
    assert f"data.augment=device: augmentation stays on the CPU: {reason}" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
    assert on_device(None, "device") is None


@pytest.mark.parametrize("name", ["acdc", "acdc_modern", "camvid", "nyuv2", "voc2012", "synthetic"])
def test_our_recipes_have_equivalents(name):
    assert untranslatable(recipe(name)) is None


# In the data module


@pytest.fixture
def build(camvid_root, tmp_path):
    """Build a data module of the tiny CamVid."""

    def build(transform=None, **changes):
        settings = {"find": find_camvid, "root": str(camvid_root), "classes": "camvid", "num_classes": 11}
        transform = transform or A.Compose(
            [A.Resize(20, 28), A.RandomScale((-0.2, 0.5), p=1.0), A.RandomCrop(16, 16), A.HorizontalFlip()]
        )
        return SegmentationDataModule(**settings, void=[11], batch_size=2, train_transform=transform, **changes)

    return build


def two_epochs(data):
    """Batches as the network gets them."""
    data.prepare_data()
    loader, found = data.train_dataloader(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found += [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return found


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_epochs_are_those_of_the_cpu(build, tmp_path, workers, cached):
    expected = two_epochs(build(augment="cpu"))
    cache = str(tmp_path / "cache") if cached else None
    found = two_epochs(build(augment="device", num_workers=workers, cache=cache))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Batch)
        assert one.target.dtype == torch.int64
        assert list(one.name) == list(other.name)
        assert torch.equal(one.target, other.target)
        assert (one.image.int() - other.image.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("augment", "device", "planned"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("auto", None, False),
        ("cpu", "cuda", False),
        ("device", "cpu", True),
    ],
)
def test_auto_is_the_device_on_an_nvidia_gpu(build, augment, device, planned):
    data = build(augment=augment)
    if device is not None:
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=strategy)
    assert isinstance(next(iter(data.train_dataloader())), PlannedBatch) == planned


def test_an_unknown_transform_runs_on_the_cpu(build):
    transform = A.Compose([A.RandomCrop(16, 16), A.VerticalFlip()])
    expected, found = (two_epochs(build(transform, augment=augment)) for augment in ("cpu", "device"))
    assert all(torch.equal(one.image, other.image) for one, other in zip(found, expected, strict=True))


def test_lightning_moves_a_planned_batch(build):
    """Tensors to the device; names and the factors of colours stay as they are."""
    transform = A.Compose([A.RandomCrop(16, 16), A.ColorJitter(p=0.5), A.RandomBrightnessContrast(p=1.0)])
    data = build(transform, augment="device")
    batch = next(iter(data.train_dataloader()))
    moved = move_data_to_device(batch, torch.device("meta"))
    tensors = [*moved[:2], *moved[3:7], moved.colours[1]]
    assert all(tensor.is_meta for tensor in tensors)
    assert (moved.name, moved.colours[0]) == (batch.name, batch.colours[0])
