"""mIoU against an evaluation in numpy and against cityscapesScripts, in one process and in two."""

import importlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image

from transkd.data import SegmentationDataModule, find_cityscapes
from transkd.metrics import SegmentationScore

K, SIZE, IMAGES = 19, (64, 96), 5


def write_cityscapes(root):
    """Five drawn frames in the official layout: coarse regions of 17 of the 19 classes, and ignored pixels."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        names = "leftImg8bit/val/town", "gtFine/val/town"
        for folder in names:
            (root / folder).mkdir(parents=True, exist_ok=True)
        label = np.kron(rng.integers(0, 17, (8, 12), dtype=np.uint8), np.ones((8, 8), np.uint8))
        label[:7, : 10 * i] = 255
        image = (label[..., None] * np.array([13, 7, 5]) % 256).astype(np.uint8) + rng.integers(0, 40, (*SIZE, 3))
        stem = f"town_{i:06}_000019"
        Image.fromarray(image.astype(np.uint8)).save(root / names[0] / f"{stem}_leftImg8bit.png")
        Image.fromarray(label).save(root / names[1] / f"{stem}_gtFine_labelTrainIds.png")


def module(root):
    return SegmentationDataModule(find_cityscapes, str(root), "cityscapes", K, 1, eval_batch_size=2)


def logits_of(image):
    """A fixed linear network at stride 4."""
    weights = torch.randn(K, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    return F.conv2d(image.double() / 255 - 0.3, weights, stride=4)


def scored(root, rank=0, world_size=1):
    data = module(root)
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    measured = SegmentationScore(K, "full-res")
    for image, target, _ in data.val_dataloader():
        measured.update(logits_of(image), target.long())
    return measured.compute()


def in_numpy(root):
    """Class ids of each frame, and mIoU and accuracy pixel by pixel, after the definition."""
    intersection, union, right, valid, found = np.zeros(K), np.zeros(K), 0, 0, {}
    dataset = module(root).dataset("val")
    for i in range(len(dataset)):
        image, label = dataset.read(i)
        logits = logits_of(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]).float()
        ids = F.interpolate(logits, SIZE, mode="bilinear").argmax(1)[0].numpy()
        known = label != 255
        for k in range(K):
            intersection[k] += ((ids == k) & (label == k)).sum()
            union[k] += (((ids == k) & known) | (label == k)).sum()
        right, valid = right + (ids == label).sum(), valid + known.sum()
        found[dataset.pairs[i].label] = ids
    with np.errstate(invalid="ignore"):
        return found, np.nanmean(intersection / union), right / valid


def test_an_evaluation_in_numpy(tmp_path):
    write_cityscapes(tmp_path)
    _, miou, accuracy = in_numpy(tmp_path)
    scores = scored(tmp_path)
    assert 0.01 < miou < 0.5
    assert scores.miou.item() == pytest.approx(miou, abs=1e-6)
    assert scores.pixel_accuracy.item() == pytest.approx(accuracy, abs=1e-6)


def _one_of_two_processes(rank, root):
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    scores = scored(root, rank, 2)
    torch.save(scores[:3], root / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_score_of_one(tmp_path):
    write_cityscapes(tmp_path)
    mp.spawn(_one_of_two_processes, args=(tmp_path,), nprocs=2)
    expected = in_numpy(tmp_path)[1]
    for rank in range(2):
        miou, *rest = torch.load(tmp_path / f"{rank}.pt")
        assert miou.item() == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(tuple(rest), scored(tmp_path)[1:3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(
    importlib.util.find_spec("cityscapesscripts") is None, reason="no cityscapesScripts: see CONTRIBUTING.md"
)
def test_cityscapes_own_evaluation(tmp_path, monkeypatch):
    """The official program reads files with label ids of its own; its names differ from ours."""
    monkeypatch.setenv("CITYSCAPES_DATASET", str(tmp_path))
    official = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    known = importlib.import_module("cityscapesscripts.helpers.labels").trainId2label

    write_cityscapes(tmp_path)
    own = np.zeros(256, np.uint8)  # 0 is "unlabeled", which it ignores
    own[:K] = [known[k].id for k in range(K)]
    pairs = []
    for label, ids in in_numpy(tmp_path)[0].items():
        truth, guess = (label.with_name(f"{label.stem}_{kind}.png") for kind in ("truth", "guess"))
        Image.fromarray(own[np.asarray(Image.open(label))]).save(truth)
        Image.fromarray(own[ids]).save(guess)
        pairs.append((str(guess), str(truth)))
    settings = official.args
    settings.evalInstLevelScore, settings.JSONOutput, settings.quiet = False, False, True
    results = official.evaluateImgLists([pair[0] for pair in pairs], [pair[1] for pair in pairs], settings)
    scores = scored(tmp_path)
    assert scores.miou.item() == pytest.approx(results["averageScoreClasses"], abs=1e-6)
    by_class = [results["classScores"][known[k].name] for k in range(K)]
    assert scores.iou.tolist() == pytest.approx(by_class, abs=1e-6, nan_ok=True)
