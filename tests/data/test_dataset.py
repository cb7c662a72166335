import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image

from transkd.data import CAMVID, Pair, SegmentationDataset, pair_by_name
from transkd.data.dataset import read_image
from transkd.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
IDS = RNG.integers(0, 11, (24, 32), dtype=np.uint8)


@pytest.fixture
def write(tmp_path):
    """Write an image and a label, give the data set of the two."""

    def write(image=PIXELS, label=IDS, suffix=".png", label_suffix=".png", **settings):
        pair = Pair(tmp_path / f"image{suffix}", tmp_path / f"label{label_suffix}")
        for path, content in zip(pair, (image, label), strict=True):
            (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)
        return SegmentationDataset([pair], CAMVID, **settings)

    return write


# Pairing


def test_pairs_by_name_and_never_by_order(tmp_path):
    images = {name: tmp_path / f"{name}.png" for name in "cab"}
    labels = {name: tmp_path / f"{10 - i}_{name}.png" for i, name in enumerate("abc")}
    assert sorted(labels.values()) != [labels[name] for name in "abc"]
    assert pair_by_name(images, labels) == [Pair(images[name], labels[name]) for name in "abc"]


def test_all_without_a_partner_are_counted(tmp_path):
    images = {str(i): tmp_path / f"{i}.png" for i in range(9)}
    with pytest.raises(UserError, match=r"0\.png; .*5\.png; and 3 more$"):
        pair_by_name(images, {})


# Reading


def test_a_sample(write):
    dataset = write()
    image, target, name = dataset[0]
    assert len(dataset) == 1
    assert (image.dtype, target.dtype) == (torch.uint8, torch.uint8)
    assert np.array_equal(image.numpy(), PIXELS.transpose(2, 0, 1))
    assert np.array_equal(target.numpy(), IDS)
    assert name == str(dataset.pairs[0].image)
    assert image.is_contiguous()


def test_jpeg_images(write):
    image = write(suffix=".jpg", image=np.full((24, 32, 3), 77, np.uint8))[0].image
    assert image.shape == (3, 24, 32)
    assert (image.int() - 77).abs().max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA"])
def test_images_of_other_modes_become_rgb(write, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    image = write(image=Image.new("RGB", (32, 24), (102, 102, 102)).convert(mode), suffix=suffix)[0].image
    assert image.shape == (3, 24, 32)
    assert (image.int() - 102).abs().max() <= 2


def test_a_palette_label_is_read_by_index(write):
    label = Image.fromarray(IDS, mode="P")
    label.putpalette([value for colour in CAMVID.palette for value in colour])
    assert np.array_equal(write(label=label)[0].target, IDS)


def test_void_and_255_are_ignored(write):
    label = IDS.copy()
    label[0, :3] = (11, 30, 255)
    target = write(label=label, void=[11, 30])[0].target.numpy()
    assert target[0, :3].tolist() == [255, 255, 255]
    assert np.array_equal(target[1:], IDS[1:])


def test_void_wins_over_a_class(write):
    target = write(void=[4])[0].target.numpy()
    assert np.array_equal(target, np.where(IDS == 4, 255, IDS))


# What is wrong with a file is said with its name


def refused(dataset, message):
    with pytest.raises(UserError, match=message) as caught:
        dataset[0]
    return str(caught.value)


def test_values_outside_the_classes_are_listed(write):
    label = IDS.copy()
    label[0, :3] = (11, 254, 60)
    dataset = write(label=label)
    message = refused(dataset, r"label values \[11, 60, 254\] are outside the 11 classes 0…10 \(255 = ignore\)")
    assert str(dataset.pairs[0].label) in message


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (PIXELS, "a label must be a single-channel image of class ids, got RGB with the colours"),
        (np.dstack([PIXELS, PIXELS[..., :1]]), "is partly transparent"),
        (IDS.astype(np.uint16) + 300, "label values .* are outside the 11 classes"),
        (Image.fromarray(PIXELS).convert("CMYK"), "is a CMYK image; a label must be of class ids"),
        (IDS.astype(np.float32), "is a F image; a label must be of class ids"),
    ],
    ids=["RGB", "RGBA", "16 bits", "CMYK", "float"],
)
def test_a_label_must_have_class_ids(write, label, message):
    dataset = write(label=label, label_suffix=".tif")
    message = refused(dataset, message)
    assert str(dataset.pairs[0].label) in message


def test_sizes_must_agree(write):
    dataset = write(label=IDS[:20])
    message = refused(dataset, "image and label differ in size")
    assert f"{dataset.pairs[0].image} is 24×32" in message
    assert f"{dataset.pairs[0].label} is 20×32" in message


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_image_is_named(write, suffix, share):
    dataset = write(suffix=suffix)
    path = dataset.pairs[0].image
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert str(path) in refused(dataset, "damaged, truncated or not an image")


def test_a_truncated_label_is_named(write):
    dataset = write()
    path = dataset.pairs[0].label
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refused(dataset, "damaged, truncated or not an image")


@pytest.mark.parametrize("content", [b"no image\n", b"<html></html>", bytes(100)])
def test_a_foreign_file_is_named(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the image .*image\.png"):
        read_image(path)


def test_an_image_of_absurd_size_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # an error from twice as many pixels on
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(UserError, match=r"image\.png has more than 178 megapixels"):
        read_image(path)


def test_a_missing_file_is_named(write):
    dataset = write()
    dataset.pairs[0].image.unlink()
    assert str(dataset.pairs[0].image) in refused(dataset, "image not found")


# Transforms


def test_padding_is_black_and_ignored(write):
    pad = A.PadIfNeeded(40, 48, position="top_left", fill=0, fill_mask=255)
    image, target, _ = write(transform=A.Compose([pad]))[0]
    assert (image.shape, target.shape) == ((3, 40, 48), (40, 48))
    assert np.array_equal(image[:, :24, :32], PIXELS.transpose(2, 0, 1))
    assert np.array_equal(target[:24, :32], IDS)
    for part in (np.s_[..., 24:, :], np.s_[..., 32:]):
        assert (image[part] == 0).all()
        assert (target[part] == 255).all()


def test_scaling_makes_no_new_ids(write):
    label = np.where(IDS < 5, 0, 10).astype(np.uint8)
    transform = A.Compose([A.RandomScale((-0.4, 0.9), p=1.0), A.Affine(rotate=(-20, 20), fill_mask=255, p=1.0)])
    dataset = write(label=label, transform=transform)
    seen = {value for seed in range(8) for value in dataset[0, seed].target.unique().tolist()}
    assert seen == {0, 10, 255}


def test_image_and_label_move_together(write):
    image = np.repeat(IDS[..., None] * 20, 3, axis=2)
    crop = A.Compose([A.RandomCrop(12, 16), A.HorizontalFlip(p=0.5)])
    dataset = write(image=image, transform=crop)
    crops = set()
    for seed in range(6):
        pixels, target, _ = dataset[0, seed]
        assert target.shape == (12, 16)
        assert torch.equal(pixels[0], target * 20)
        crops.add(target.numpy().tobytes())
    assert len(crops) > 1


def test_a_label_can_stay_at_its_own_size(write):
    dataset = write(transform=A.Compose([A.Resize(12, 16)]), transform_labels=False)
    image, target, _ = dataset[0]
    assert image.shape == (3, 12, 16)
    assert np.array_equal(target, IDS)


def test_the_seed_in_the_key_repeats_an_augmentation(write):
    dataset = write(transform=A.Compose([A.RandomCrop(8, 8), A.RandomBrightnessContrast(p=1.0)]))
    first, other = dataset[0, 5], dataset[0, 6]
    again = dataset[0, 5]
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.image, other.image)


def test_the_transforms_of_a_sample_are_independent(write):
    """Over 400 seeds: as many images are flipped among those scaled up as among those scaled down."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, :16] = 255
    dataset = write(image=image, transform=A.Compose([A.RandomScale((-0.5, 0.5), p=1.0), A.HorizontalFlip(p=0.5)]))
    samples = [dataset[0, seed].image for seed in range(400)]
    for larger in (True, False):
        flipped = [sample[0, 0, 0].item() == 0 for sample in samples if (sample.shape[-1] > 32) == larger]
        assert 0.35 < np.mean(flipped) < 0.65  # four standard deviations


# Transforms that do what the networks do


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            A.Normalize(),
            "gives the image values of type float32: expected a uint8 array of shape \\[H, W, 3\\]; leave out",
        ),
        (A.ToFloat(), "gives the image values of type float32"),
        (ToTensorV2(), "gives the image a torch Tensor"),
        (A.Lambda(mask=lambda mask, **_: mask.astype(np.int64)), r"gives the label values of type int64: .*\[H, W\]"),
        (A.Lambda(image=lambda image, **_: image[..., :1]), r"gives the image the shape \[24, 32, 1\]"),
    ],
)
def test_a_transform_must_leave_bytes(write, transform, message):
    dataset = write(transform=A.Compose([transform]))
    assert "\n" not in refused(dataset, message)
    with pytest.raises(UserError, match=message):
        dataset.check()
