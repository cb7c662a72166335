import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from memory import peak_memory
from torchmetrics.classification import MulticlassConfusionMatrix

from transkd.metrics import PROTOCOLS, Protocol, SegmentationScore, at_labels, scores_from_confusion

CLASSES = 5
ABSENT = 3  # in no label and no prediction


@pytest.fixture(scope="module")
def batches():
    """Three batches of unlike sizes, stride 4, with ignored pixels and one class that occurs nowhere."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for batch, height, width in ((2, 16, 24), (1, 20, 12), (3, 22, 18)):  # the last is no multiple of 4
        logits = torch.randn(batch, CLASSES, -(-height // 4), -(-width // 4), generator=generator)
        logits[:, ABSENT] = -1e4
        target = torch.randint(0, CLASSES, (batch, height, width), generator=generator)
        target[target == ABSENT] = 255
        made.append((logits, target))
    return made


def by_pixel(batches, protocol):
    """mIoU, IoU and accuracy from sets of pixels, counted one by one."""
    intersection, union, valid, right = [0] * CLASSES, [0] * CLASSES, 0, 0
    for logits, target in batches:
        if protocol == "transkd-paper":
            height, width = logits.shape[-2:]
            rows = [i * target.shape[1] // height for i in range(height)]
            columns = [j * target.shape[2] // width for j in range(width)]
            target = target.numpy()[:, rows][:, :, columns]
        else:
            logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
        for expected, got in zip(np.ravel(target), np.ravel(logits.numpy().argmax(1)), strict=True):
            if expected == 255:
                continue
            valid += 1
            right += expected == got
            for c in range(CLASSES):
                intersection[c] += expected == c and got == c
                union[c] += expected == c or got == c
    iou = [i / u if u else math.nan for i, u in zip(intersection, union, strict=True)]
    present = [value for value in iou if not math.isnan(value)]
    return sum(present) / len(present), iou, right / valid


def scored(batches, protocol):
    score = SegmentationScore(CLASSES, protocol)
    for logits, target in batches:
        score.update(logits, target)
    return score


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "boundary"])
def test_against_counting_pixels(batches, protocol):
    miou, iou, accuracy = by_pixel(batches, protocol)
    scores = scored(batches, protocol).compute()
    assert scores.miou.item() == pytest.approx(miou)
    assert scores.iou.tolist() == pytest.approx(iou, nan_ok=True)
    assert scores.pixel_accuracy.item() == pytest.approx(accuracy)
    assert math.isnan(iou[ABSENT])
    assert 0.05 < miou < 0.5


def test_a_protocol_of_ones_own(batches, monkeypatch):
    """What `compare` hides is not counted: here everything but the first class."""

    def first_class(logits, target):
        predicted, target = at_labels(logits, target)
        return predicted, target.where(target == 0, 255)

    monkeypatch.setitem(PROTOCOLS, "first", Protocol(True, first_class, "the first class alone"))
    scores = scored(batches, "first").compute()
    recall = sum((F.interpolate(x, y.shape[1:], mode="bilinear").argmax(1)[y == 0] == 0).sum() for x, y in batches)
    assert scores.iou[0].item() == pytest.approx(recall / sum((y == 0).sum() for _, y in batches))


def test_the_protocols_differ(batches):
    values = {name: by_pixel(batches, name)[0] for name in ("full-res", "transkd-paper")}
    assert values["full-res"] != pytest.approx(values["transkd-paper"], abs=1e-3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_confusion_matrix_over_all_images(batches, protocol):
    """Streaming gives what one shot gives; the mean over images would be another number."""
    expected = scored(batches, protocol).compute()
    singles = [(logits[i : i + 1], target[i : i + 1]) for logits, target in batches for i in range(len(logits))]
    streamed = scored(singles[::-1], protocol)
    torch.testing.assert_close(streamed.compute(), expected, rtol=0, atol=0, equal_nan=True)
    per_image = [scored([single], protocol).compute().miou for single in singles]
    assert abs(sum(per_image) / len(per_image) - expected.miou) > 1e-3


def test_ranks_add_up(batches):
    ranks = [scored(part, "full-res") for part in (batches[:1], batches[1:])]
    reduce = ranks[0]._reductions["confmat"]  # what torchmetrics does with the ranks' states
    together = scores_from_confusion(reduce(torch.stack([rank.confmat for rank in ranks])))
    torch.testing.assert_close(together, scored(batches, "full-res").compute(), rtol=0, atol=0, equal_nan=True)


def test_reset_forgets(batches):
    score = scored(batches[:1], "full-res")
    score.reset()
    score.update(*batches[1])
    torch.testing.assert_close(score.compute(), scored(batches[1:2], "full-res").compute(), equal_nan=True)


def test_by_hand():
    # class 0: 3 right, 1 taken for 1, 2 of class 1 taken for 0; class 2 occurs nowhere
    scores = scores_from_confusion(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert scores.iou[:2].tolist() == pytest.approx([3 / 6, 4 / 7])
    assert scores.iou[2].isnan()
    assert scores.miou.item() == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert scores.pixel_accuracy.item() == pytest.approx(7 / 10)


def test_a_class_predicted_and_never_labelled_counts_as_0():
    scores = scores_from_confusion(torch.tensor([[3, 1], [0, 0]]))
    assert scores.iou.tolist() == pytest.approx([3 / 4, 0])
    assert scores.miou.item() == pytest.approx(3 / 8)


def test_pixels_without_a_label_count_nowhere():
    score = SegmentationScore(2, "full-res")
    logits = torch.tensor([[5.0, 5.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # class 0 everywhere
    score.update(logits, torch.tensor([[[0, 255]]]))
    assert score.compute().iou[0] == 1
    assert score.compute().pixel_accuracy == 1


def test_nothing_to_score_is_no_score():
    score = SegmentationScore(2, "full-res")
    score.update(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 255))
    assert score.compute().miou.isnan()
    assert score.compute().pixel_accuracy.isnan()


def test_half_precision_logits(batches):
    logits, target = batches[0]
    halves = (logits.clamp(-100, 100).bfloat16(), target)
    expected = by_pixel([(halves[0].float(), target)], "full-res")
    assert scored([halves], "full-res").compute().miou.item() == pytest.approx(expected[0])


def test_counts_do_not_saturate():
    """2048×1024 over 500 images are more pixels than float32 or int32 can count one by one."""
    many = torch.tensor([[2**31, 1], [1, 2**24 + 1]])
    assert scores_from_confusion(many).pixel_accuracy.item() == 1 - 2 / (2**31 + 2**24 + 3)


def test_full_resolution_is_the_plain_way_in_a_quarter_of_its_memory():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 19, 67, 129, generator=generator)
    target = torch.randint(0, 19, (2, 266, 515), generator=generator)
    target[:, :20] = 255
    plain = MulticlassConfusionMatrix(19, ignore_index=255, validate_args=False)
    score = SegmentationScore(19, "full-res")

    def the_plain_way():
        upsampled = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
        plain.update(upsampled.argmax(1), target)

    the_plain_way()
    score.update(logits, target)
    assert torch.equal(score.confmat, plain.confmat)
    assert 4 * peak_memory(lambda: score.update(logits, target)) <= peak_memory(the_plain_way)
