import json
import logging
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from transkd.data import ClassSet, Pair, SegmentationDataModule
from transkd.data.class_weights import ClassCounts, class_weights, count_classes
from transkd.errors import UserError
from transkd.training.class_weights import fill_class_weights

# two images of 2×4: class 0 in both, class 1 in one, class 2 in none; one pixel of each is ignored
LABELS = ([[0, 0, 0, 0], [1, 1, 255, 0]], [[0, 0, 0, 0], [0, 0, 7, 0]])


@pytest.fixture
def data(tmp_path):
    pairs = []
    for i, label in enumerate(LABELS):
        pixels = np.array(label, np.uint8)
        for kind, array in (("image", np.zeros((2, 4, 3), np.uint8)), ("label", pixels)):
            Image.fromarray(array).save(tmp_path / f"{i}_{kind}.png")
        pairs.append(Pair(tmp_path / f"{i}_image.png", tmp_path / f"{i}_label.png"))
    classes = ClassSet(("road", "car", "train"), ((0, 0, 0),) * 3)
    return SegmentationDataModule(lambda root, split: pairs, str(tmp_path), classes, 3, 1, void=[7])


@pytest.fixture
def configuration():
    """Three terms: numbers, a rule, and no weights."""
    task = {"term": {"class_weights": "median", "resolution": "labels"}, "weight": 1.0}
    terms = {"task": task, "dice": {"term": {"class_weights": [1, 2, 3]}}, "csf": {"term": {"stages": [1]}}}
    return OmegaConf.create({"data": {"root": "here", "batch_size": 2}, "criterion": {"terms": terms}})


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_counts(data, workers):
    assert count_classes(data.dataset("train"), workers) == ClassCounts([12, 2, 0], [14, 7, 0])


def test_counting_leaves_random_numbers_and_pixels_of_images_alone(data):
    """Whether counts were kept must not change a network's random weights; decoding images takes most of the time."""
    image = data.dataset("train").pairs[0].image
    image.write_bytes(image.read_bytes()[:-20])  # its header is whole
    torch.manual_seed(0)
    count_classes(data.dataset("train"))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)


def test_rules_by_hand():
    counts = ClassCounts([12, 2, 0], [14, 7, 0])
    expected = {
        "auto": [1 / math.log(1.02 + 12 / 14), 1 / math.log(1.02 + 2 / 14), 1 / math.log(1.02)],
        # frequencies 12/14 and 2/7, their median 4/7
        "median": [4 / 7 / (12 / 14), 4 / 7 / (2 / 7), 0],
        "sqrt": [math.sqrt(14 / 12), math.sqrt(14 / 2), 0],
    }
    for rule, weights in expected.items():
        assert class_weights(rule, counts) == pytest.approx(weights, rel=1e-5)


def test_what_gives_no_weights():
    with pytest.raises(UserError, match="class_weights=mean: expected auto, median, sqrt"):
        class_weights("mean", ClassCounts([1], [1]))
    with pytest.raises(UserError, match="no pixel of the training labels has a class"):
        class_weights("auto", ClassCounts([0, 0], [0, 0]))


def test_a_rule_becomes_numbers_in_the_configuration(data, configuration, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fill_class_weights(configuration, data, tmp_path / "kept")
    terms = configuration.criterion.terms
    assert list(terms.task.term.class_weights) == class_weights("median", ClassCounts([12, 2, 0], [14, 7, 0]))
    assert list(terms.dice.term.class_weights) == [1, 2, 3]
    assert "no training label has a pixel of train" in caplog.text


def test_a_rule_that_refers_to_that_of_another_term(data, configuration, tmp_path):
    terms = configuration.criterion.terms
    terms.dice.term.class_weights = "${criterion.terms.task.term.class_weights}"
    fill_class_weights(configuration, data, tmp_path / "kept")
    assert terms.dice.term.class_weights == terms.task.term.class_weights
    assert len(terms.dice.term.class_weights) == 3


def test_counts_are_kept_until_a_label_changes(data, configuration, tmp_path):
    fill_class_weights(configuration.copy(), data, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(kept.read_text()) == {"pixels": [12, 2, 0], "around": [14, 7, 0]}
    kept.write_text(json.dumps({"pixels": [1, 1, 1], "around": [3, 3, 3]}))  # so that reading it shows
    changed = configuration.copy()
    changed.data.batch_size = 7
    fill_class_weights(changed, data, tmp_path / "kept")
    assert list(changed.criterion.terms.task.term.class_weights) == [1, 1, 1]
    Image.fromarray(np.ones((2, 4), np.uint8)).save(tmp_path / "1_label.png", compress_level=0)
    fill_class_weights(again := configuration.copy(), data, tmp_path / "kept")
    assert list(again.criterion.terms.task.term.class_weights) != [1, 1, 1]
    assert len(list((tmp_path / "kept").glob("*.json"))) == 2


def test_nothing_is_counted_without_a_rule(data, configuration, tmp_path):
    configuration.criterion.terms.task.term.class_weights = None
    fill_class_weights(configuration, data, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
