"""Protocols that run a network in windows or at several sizes, Boundary IoU, conditions, protocols with settings."""

import math

import albumentations as A
import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy import ndimage

from transkd.cli import CONF
from transkd.data import ClassSet, Pair, SegmentationDataModule
from transkd.errors import UserError
from transkd.inference import at_scales, in_windows
from transkd.metrics import PROTOCOLS, Protocol, SegmentationScore, at_labels, boundary, ms_flip, slide
from transkd.models import Network
from transkd.outputs import SegmentationOutput
from transkd.report import describe_scores, print_scores
from transkd.settings import TrainSettings
from transkd.training.build import enter_protocol
from transkd.training.scoring import score

CLASSES = 4


class Convolution(Network):
    """One strided convolution; padding and stride make its logits depend on where a window lies."""

    def __init__(self):
        super().__init__((8,), CLASSES, None, None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(3, CLASSES, 7, stride=4, padding=3)

    def forward(self, image, needs=frozenset({"logits"})):
        image = self.normalise(image)
        return SegmentationOutput(self.convolution(image), (), (), image)


@pytest.fixture
def network():
    convolution = Convolution().eval()
    return lambda image: convolution(image).logits


@pytest.fixture
def image():
    return torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# Windows


def by_hand(network, image, window, stride):
    """Window by window, averaged pixel by pixel; windows beyond the edge move back inside."""
    height, width = image.shape[-2:]
    tops = sorted({min(y, height - window) for y in range(0, height - window + stride, stride)})
    lefts = sorted({min(x, width - window) for x in range(0, width - window + stride, stride)})
    layers = []
    for y in tops:
        for x in lefts:
            logits = network(image[:, :, y : y + window, x : x + window])
            upsampled = F.interpolate(logits, (window, window), mode="bilinear", align_corners=False)
            layers.append(F.pad(upsampled, (x, width - x - window, y, height - y - window), value=math.nan))
    return torch.stack(layers).nanmean(0), len(layers)


@torch.no_grad()
@pytest.mark.parametrize(("window", "stride", "count"), [(16, 16, 12), (16, 10, 20), (32, 24, 4), (40, 16, 2)])
def test_windows(network, image, window, stride, count):
    expected, windows = by_hand(network, image, window, stride)
    assert windows == count
    torch.testing.assert_close(in_windows(network, image, window, stride), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [56, 57, 1000])
def test_one_window_is_the_whole_image(network, image, window):
    assert torch.equal(in_windows(network, image, window, window), network(image))


@torch.no_grad()
def test_a_short_side_is_taken_whole(network, image):
    seen = []
    in_windows(lambda part: seen.append(part.shape[-2:]) or network(part), image, 48, 48)
    assert seen == [(40, 48), (40, 48)]


# Sizes and mirror images


@torch.no_grad()
def test_scales_and_flips(network, image):
    views = []
    for size in ((20, 28), (40, 56), (60, 84)):
        pixels = image.float() / 255
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=True) if size != (40, 56) else image
        for mirrored in (False, True):
            logits = network(resized.flip(3) if mirrored else resized)
            p = F.interpolate(logits, (40, 56), mode="bilinear").softmax(1)
            views.append(p.flip(3) if mirrored else p)
    expected = torch.stack(views).mean(0)
    torch.testing.assert_close(at_scales(network, image, [0.5, 1, 1.5], flip=True), expected, rtol=0, atol=1e-6)
    one = torch.stack(views[2:3]).mean(0)
    torch.testing.assert_close(at_scales(network, image, [1, 1], flip=False), one, rtol=0, atol=1e-6)


@torch.no_grad()
def test_scale_1_is_the_image(network, image):
    assert torch.equal(at_scales(network, image, [1.0], flip=False), network(image))


# Boundary IoU


def eroded_away(mask, distance):
    """The pixels that an erosion takes off a mask; outside of the image is not of the mask."""
    square = np.ones((2 * distance + 1, 2 * distance + 1), bool)
    return mask & ~ndimage.binary_erosion(mask, square, border_value=0)


def test_boundary_iou_of_each_class():
    """By the definition: the masks' boundaries, intersected and united over all images."""
    rng = np.random.default_rng(0)
    intersection, union = np.zeros(CLASSES), np.zeros(CLASSES)
    measured = SegmentationScore(CLASSES, "boundary")
    for size in ((40, 60), (64, 48)):
        coarse = rng.integers(0, CLASSES - 1, (2, 5, 6))  # the last class is nowhere
        target = np.stack([ndimage.zoom(one, (size[0] / 5, size[1] / 6), order=0) for one in coarse])
        wrong = np.roll(target, 2, axis=2)
        target[0, :6], target[1, 20:25, 10:20] = 255, 255
        distance = round(0.02 * math.hypot(*size))
        assert distance in (1, 2)
        for truth, guess in zip(target, np.where(target == 255, 255, wrong), strict=True):
            for k in range(CLASSES):
                ours, theirs = eroded_away(truth == k, distance), eroded_away(guess == k, distance)
                intersection[k] += (ours & theirs).sum()
                union[k] += (ours | theirs).sum()
        logits = F.one_hot(torch.from_numpy(wrong), CLASSES).permute(0, 3, 1, 2).float()
        measured.update(logits, torch.from_numpy(target).long())
    scores = measured.compute()
    expected = intersection[:-1] / union[:-1]
    assert 0.05 < expected.min() < expected.max() < 0.95
    assert scores.iou.tolist() == pytest.approx([*expected, math.nan], nan_ok=True)
    assert scores.miou.item() == pytest.approx(expected.mean())


def test_boundary_iou_by_hand():
    """One column of error between two halves: 10×10, distance 1."""
    target = torch.zeros(1, 10, 10, dtype=torch.int64)
    target[:, :, 5:] = 1
    logits = torch.zeros(1, 2, 10, 10)
    logits[:, 1, :, 6:] = 1  # the boundary lies a column further
    measured = SegmentationScore(2, "boundary")
    measured.update(logits, target)
    scores = measured.compute()
    # class 0: the frames of 10×5 and 10×6 are 26 and 28 pixels. They share the left column, 10, the ends of columns 1
    # to 3, 6, and the ends of column 4, 2. Class 1: those of 10×5 and 10×4 are 26 and 24, and share a column and the
    # ends of three.
    assert scores.iou.tolist() == pytest.approx([18 / (26 + 28 - 18), 16 / (26 + 24 - 16)])


# Settings


def test_protocols_by_their_settings(monkeypatch):
    monkeypatch.setattr("transkd.metrics.PROTOCOLS", dict(PROTOCOLS))
    monkeypatch.setattr("transkd.training.build.PROTOCOLS", entered := dict(PROTOCOLS))
    described = {
        "slide": {"_target_": "transkd.metrics.slide", "window": 256, "stride": 128},
        "mine": {"_target_": "test_protocols.margin", "width": 3},
        "wrong": {"_target_": "builtins.dict"},
    }
    enter_protocol("full-res", described)
    assert entered == PROTOCOLS
    enter_protocol("slide", described)
    assert "256×256 every 128" in entered["slide"].description
    enter_protocol("mine", described)
    assert entered["mine"].description == "full-res without 3 pixels at the edge"
    with pytest.raises(UserError, match=r"protocols\.wrong: expected .* transkd\.metrics\.Protocol, got dict"):
        enter_protocol("wrong", described)


def margin(width):
    """A protocol of one's own, with a setting."""

    def compare(logits, target):
        predicted, target = at_labels(logits, target)
        inner = target[:, width:-width, width:-width]
        return predicted, F.pad(inner, (width,) * 4, value=255)

    return Protocol(False, compare, f"full-res without {width} pixels at the edge")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: slide(512, 513), r"protocols\.slide: expected a stride from 1 to the window, 512; got 513"),
        (lambda: slide(512, 0), "got 0"),
        (lambda: ms_flip([]), r"protocols\.ms-flip: expected scales greater than 0, at least one"),
        (lambda: ms_flip([1, -1]), r"got \[1.0, -1.0\]"),
        (lambda: boundary(0.0), r"protocols\.boundary: expected a dilation_ratio between 0 and 1; got 0"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_settings_of_earlier_runs_need_no_protocols():
    assert TrainSettings.model_fields["protocols"].get_default(call_default_factory=True) == {}


# Whole validations


@pytest.fixture
def data(tmp_path):
    """A data module of four drawn images in folders fog and rain, padded or not, under any protocol."""
    rng = np.random.default_rng(0)
    pairs = []
    for i, condition in enumerate(("fog", "rain", "fog", "other")):
        folder = tmp_path / condition
        folder.mkdir(exist_ok=True)
        label = rng.integers(0, CLASSES, (36, 52), dtype=np.uint8)
        label[:3] = 255
        image = rng.integers(0, 256, (36, 52, 3), dtype=np.uint8)
        for kind, pixels in (("image", image), ("label", label)):
            Image.fromarray(pixels).save(folder / f"{i}_{kind}.png")
        pairs.append(Pair(folder / f"{i}_image.png", folder / f"{i}_label.png"))
    classes = ClassSet(tuple("abcd"), ((0, 0, 0),) * CLASSES)

    def build(**settings):
        return SegmentationDataModule(
            lambda root, split: pairs, str(tmp_path), classes, CLASSES, 2, eval_batch_size=2, **settings
        )

    return build


@pytest.fixture
def validated(data):
    """Scores of the convolution under a protocol."""

    def validated(protocol, **settings):
        trainer = L.Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
        return score(Convolution(), data(protocol=protocol, **settings), protocol, trainer)

    return validated


def test_windows_and_scales_of_the_image_itself_are_full_res(validated, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "slide", slide(52, 52))
    monkeypatch.setitem(PROTOCOLS, "ms-flip", ms_flip([1.0], flip=False))
    expected = validated("full-res")
    for protocol in ("slide", "ms-flip"):
        torch.testing.assert_close(validated(protocol), expected, rtol=0, atol=0)
    monkeypatch.setitem(PROTOCOLS, "slide", slide(16, 8))
    assert validated("slide").miou != expected.miou


@pytest.mark.parametrize("position", ["center", "top_left", "bottom_right"])
def test_a_padded_validation_scores_what_the_network_says_of_the_image(data, validated, position):
    pad = A.Compose([A.PadIfNeeded(48, 64, position=position, fill=90)])
    scores = validated("full-res", eval_transform=pad)
    top, left = {"center": (6, 6), "top_left": (0, 0), "bottom_right": (12, 12)}[position]
    network, confusion = Convolution(), np.zeros((CLASSES, CLASSES))
    plain = data(protocol="full-res").dataset("val")
    for i in range(len(plain)):
        image, label = plain.read(i)
        padded = np.full((48, 64, 3), 90, np.uint8)
        padded[top : top + 36, left : left + 52] = image
        with torch.no_grad():
            logits = network(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None]).logits
        logits = F.interpolate(logits, (48, 64), mode="bilinear")[0, :, top : top + 36, left : left + 52]
        valid = label != 255
        np.add.at(confusion, (label[valid], logits.argmax(0).numpy()[valid]), 1)
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert scores.miou.item() == pytest.approx(iou.mean(), abs=1e-6)


def test_scores_by_condition(validated, capsys):
    everything = validated("full-res")
    scores = validated("full-res", conditions=["rain", "fog", "snow"])
    torch.testing.assert_close(scores[:3], everything[:3], rtol=0, atol=0)
    assert list(scores.conditions) == ["rain", "fog", "snow"]
    assert scores.conditions["snow"].miou.isnan()  # no such image
    assert scores.conditions["fog"].miou != scores.conditions["rain"].miou
    results = describe_scores(scores, "full-res", tuple("abcd"))
    assert results["conditions"]["fog"]["mIoU"] == round(scores.conditions["fog"].miou.item(), 6)
    assert results["conditions"]["snow"]["mIoU"] is None
    assert "conditions" not in describe_scores(everything, "full-res", tuple("abcd"))
    print_scores({"network": scores}, tuple("abcd"), "full-res")
    assert f"{100 * scores.conditions['fog'].miou:.2f}" in capsys.readouterr().out


def test_a_condition_is_scored_as_if_it_were_alone(validated, data):
    scores = validated("full-res", conditions=["fog"])
    alone = SegmentationScore(CLASSES, "full-res")
    dataset = data(protocol="full-res").dataset("val")
    for i in (0, 2):
        image, target, _ = dataset[i]
        with torch.no_grad():
            alone.update(Convolution()(image[None]).logits, target[None].long())
    torch.testing.assert_close(scores.conditions["fog"][:3], alone.compute()[:3], rtol=0, atol=0)


def test_the_configuration_names_every_protocol_with_settings():
    described = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml").protocols)
    for name, settings in described.items():
        assert PROTOCOLS[name].description == instantiate(settings).description
