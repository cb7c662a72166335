"""Albumentations' geometric transforms as evaluation transforms: undone exactly, or refused."""

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision

from transkd.data import ClassSet, Pair, PlacedBatch, SegmentationDataModule, SegmentationDataset
from transkd.data.datamodule import collate
from transkd.data.geometry import ImageTransform
from transkd.errors import UserError
from transkd.layers.placement import restored

H, W = 38, 54
POSITIONS = ("center", "top_left", "top_right", "bottom_left", "bottom_right")


def smooth(seed, height=H, width=W):
    """An image without detail, so that resizing it and back changes little."""
    noise = np.random.default_rng(seed).random((4, 5, 3)).astype(np.float32)
    return (255 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)).astype(np.uint8)


def stride_1(image):
    """The plainest network: what it gives at a pixel is that pixel."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float()[None]


def undone(transform, image):
    """The transformed image brought back to the image's own pixels, [1, 3, H, W]."""
    pixels, place = ImageTransform(transform)(image)
    if place is None:
        return F.interpolate(stride_1(pixels), image.shape[:2], mode="bilinear", align_corners=False)
    return restored(stride_1(pixels), place[None], image.shape[:2])


# Moves without resampling: each pixel comes back as it was

EXACT = {
    **{f"pad {position}": [A.PadIfNeeded(50, 81, position=position)] for position in POSITIONS},
    "pad by reflection": [A.PadIfNeeded(50, 81, border_mode=cv2.BORDER_REFLECT_101)],
    "pad by repetition": [A.PadIfNeeded(50, 81, border_mode=cv2.BORDER_REPLICATE)],
    "pad to a multiple": [A.PadIfNeeded(None, None, pad_height_divisor=32, pad_width_divisor=32)],
    "pad one side": [A.Pad(padding=(0, 0, 7, 3))],
    "pad to four times": [A.PadIfNeeded(4 * H, 4 * W)],
    "pad, label 255": [A.PadIfNeeded(50, 81, fill=128, fill_mask=255)],
    "crop and pad outwards": [A.CropAndPad(px=(3, 5, 2, 9), keep_size=False, sample_independently=False)],
    "flip": [A.HorizontalFlip(p=1)],
    "upside down": [A.VerticalFlip(p=1)],
    "transpose": [A.Transpose(p=1)],
    "flip and pad": [A.HorizontalFlip(p=1), A.PadIfNeeded(50, 81, position="top_left"), A.Transpose(p=1)],
    "nested": [A.Sequential([A.PadIfNeeded(50, 81)], p=1), A.OneOf([A.VerticalFlip(p=1)], p=1)],
    "not at all": [A.NoOp()],
    "colours alone": [A.PadIfNeeded(50, 81), A.InvertImg(p=1), A.InvertImg(p=1)],
}


@pytest.mark.parametrize("steps", EXACT.values(), ids=EXACT)
def test_moved_pixels_come_back(steps):
    image = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    torch.testing.assert_close(undone(A.Compose(steps), image), stride_1(image), rtol=0, atol=0.01)


@pytest.mark.parametrize("transform", [A.RandomRotate90(p=1), A.D4(p=1), A.HorizontalFlip(p=0.5)])
def test_what_is_drawn_anew_is_undone_for_each_image(transform):
    image = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    transform = ImageTransform(A.Compose([transform]))
    places = []
    for _ in range(12):
        pixels, place = transform(image)
        places.append(None if place is None else tuple(place.flatten().tolist()))
        back = stride_1(pixels) if place is None else restored(stride_1(pixels), place[None], (H, W))
        torch.testing.assert_close(back, stride_1(image), rtol=0, atol=0.01)
    assert len(set(places)) > 1


# Resized in one go, or with padding

RESIZED = {
    "twice": ([A.Resize(2 * H, 2 * W)], (2 * H, 2 * W), (0, 0)),
    "half": ([A.Resize(19, 27)], (19, 27), (0, 0)),
    "one pixel less": ([A.Resize(H - 1, W + 1)], (H - 1, W + 1), (0, 0)),
    "shorter side": ([A.SmallestMaxSize(76)], (76, 108), (0, 0)),
    "longer side": ([A.LongestMaxSize(27)], (19, 27), (0, 0)),
    "letterbox": ([A.LongestMaxSize(81), A.PadIfNeeded(81, 81)], (57, 81), (12, 0)),
    "letterbox below": ([A.LongestMaxSize(81), A.PadIfNeeded(81, 81, position="top_left")], (57, 81), (0, 0)),
}


@pytest.mark.parametrize(("steps", "size", "at"), RESIZED.values(), ids=RESIZED)
def test_a_resized_image_is_found_in_the_result(steps, size, at):
    """Against the plain way: cut out the padding by hand, then resize."""
    image = smooth(0)
    pixels = A.Compose(steps)(image=image)["image"]
    (top, left), (height, width) = at, size
    cut = stride_1(pixels)[..., top : top + height, left : left + width]
    inner = F.interpolate(cut, (H, W), mode="bilinear", align_corners=False)[..., 2:-2, 2:-2]
    got = undone(A.Compose(steps), image)[..., 2:-2, 2:-2]  # at the edge, padding mixes in
    torch.testing.assert_close(got, inner, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "steps",
    [
        [A.Resize(30, 80), A.Resize(75, 60)],
        [A.PadIfNeeded(50, 81), A.Resize(100, 90)],
        [A.CropAndPad(px=(4, 4, 4, 4), keep_size=True, sample_independently=False)],
        [A.Affine(scale=0.5, p=1)],
        [A.Affine(rotate=90, fit_output=True, p=1)],
        [A.Affine(scale=(0.9, 0.9), translate_px=1, p=1)],
        [A.Resize(99, 160), A.Transpose(p=1), A.PadIfNeeded(200, 150, position="bottom_right")],
    ],
)
def test_a_resampled_image_lies_where_it_was(steps):
    """A smooth image comes back to within its change from pixel to pixel."""
    image = smooth(1)
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    back = undone(A.Compose(steps), image)[inner]
    near = (back - stride_1(image)[inner]).abs().mean()
    shifted = (back - stride_1(np.roll(image, 1, axis=1))[inner]).abs().mean()
    assert near < 2
    assert near < shifted / 2


REFUSED = {
    "centre crop": A.CenterCrop(30, 50),
    "crop of a pixel": A.CenterCrop(H - 1, W),
    "crop of a pixel on both sides": A.CenterCrop(H - 2, W - 2),
    "crop inwards": A.CropAndPad(px=-2, keep_size=False),
    "crop of any size": A.RandomResizedCrop((20, 20)),
    "crop of one place": A.RandomCrop(20, 20),
    "turn": A.Rotate((30, 30), p=1),
    "turn by 90° in the same frame": A.Rotate((90, 90), p=1),
    "turn and scale": A.ShiftScaleRotate(p=1, rotate_limit=(10, 10)),
    "shift": A.Affine(translate_px=3, p=1),
    "shear": A.Affine(shear=20, p=1),
    "perspective": A.Perspective(scale=(0.1, 0.1), p=1),
    "elastic": A.ElasticTransform(alpha=300, sigma=6, p=1),
    "grid": A.GridDistortion(distort_limit=(0.3, 0.3), p=1),
    "optical": A.OpticalDistortion(distort_limit=(0.5, 0.5), p=1),
    "holes": A.GridDropout(p=1, fill_mask=0),
    "shuffled": A.RandomGridShuffle((2, 2), p=1),
}


@pytest.mark.filterwarnings("ignore:ShiftScaleRotate")
@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
def test_what_loses_pixels_or_distorts_is_refused(transform):
    with pytest.raises(UserError, match=r"data\.eval_transform cannot be undone: .*protocol=input-res") as error:
        ImageTransform(A.Compose([transform], seed=0))(smooth(0))  # a shuffle may leave every part in its place
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(1024, 2048), (375, 1242), (512, 683)])
@pytest.mark.parametrize("side", [512, 1000])
def test_large_images_that_are_only_resized(size, side):
    """cv2 keeps places in float32: over thousands of pixels that must not look like a crop."""
    image = np.zeros((*size, 3), np.uint8)
    assert ImageTransform(A.Compose([A.SmallestMaxSize(side)]))(image)[1] is None
    resized, place = ImageTransform(A.Compose([A.SmallestMaxSize(side), A.PadIfNeeded(1024, 3500)]))(image)
    assert place[0, 0].item() == pytest.approx(round(side * size[1] / size[0]) / resized.shape[1], abs=2e-5)


# In the data set


@pytest.fixture
def dataset(tmp_path):
    """Build a data set of one image of 8×12 whose label is a class per quarter."""
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    label = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((4, 6), np.uint8))
    cv2.imwrite(str(tmp_path / "image.png"), image)
    cv2.imwrite(str(tmp_path / "label.png"), label)
    classes = ClassSet(tuple("abcd"), ((0, 0, 0),) * 4)

    def build(*steps, **settings):
        pair = Pair(tmp_path / "image.png", tmp_path / "label.png")
        return SegmentationDataset([pair], classes, transform=A.Compose(steps), **settings), label

    return build


def test_a_padded_image_keeps_its_label_and_says_where_it_lies(dataset):
    data, label = dataset(A.PadIfNeeded(16, 16, position="top_left"), transform_labels=False)
    sample = data[0]
    assert isinstance(sample, PlacedBatch)
    assert sample.image.shape == (3, 16, 16)
    assert torch.equal(sample.target, torch.from_numpy(label))
    torch.testing.assert_close(sample.place, torch.tensor([[0.75, 0, -0.25], [0, 0.5, -0.5]]))
    batch = collate([sample, sample])
    assert isinstance(batch, PlacedBatch)
    assert batch.place.shape == (2, 2, 3)


@pytest.mark.parametrize("plugin", [HalfPrecision("bf16-true"), DoublePrecision()])
def test_no_precision_of_the_trainer_moves_an_image(dataset, plugin):
    data, _ = dataset(A.Compose([A.Resize(33, 47), A.PadIfNeeded(101, 77)]), transform_labels=False)
    module = SegmentationDataModule(lambda root, split: [], "", "camvid", 11, 1)
    batch = module.on_after_batch_transfer(plugin.convert_input(collate([data[0]])), 0)
    assert torch.equal(batch.place[0], data[0].place)


def test_images_with_and_without_a_place_in_one_batch(dataset):
    data, _ = dataset(A.HorizontalFlip(p=1), transform_labels=False)
    plain, _ = dataset(A.NoOp(), transform_labels=False)
    batch = collate([data[0], plain[0]])
    assert batch.place.view(torch.float32)[:, 0, 0].tolist() == [-1, 1]


@pytest.mark.parametrize("fill", [{}, {"fill_mask": 255}, {"fill_mask": 0}, {"fill_mask": 3}])
def test_padding_has_no_label_where_the_label_is_padded_too(dataset, fill):
    data, label = dataset(A.PadIfNeeded(10, 12, position="top_left", **fill), ignore_padding=True)
    target = data[0].target.numpy()
    assert (target[8:] == 255).all()
    assert (target[:8] == label).all()


def test_labels_follow_as_before_otherwise(dataset):
    steps = (A.SmallestMaxSize(13), A.HorizontalFlip(p=1))
    data, label = dataset(*steps, ignore_padding=True)
    assert (data[0].target.numpy() == A.Compose(steps)(image=np.zeros((8, 12, 3), np.uint8), mask=label)["mask"]).all()
