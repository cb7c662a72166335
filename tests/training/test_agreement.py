"""Weights of other classes or another validation than the data's are told, where nothing else would show it."""

import albumentations as A
import pytest

from transkd.models import create_segmenter, save_segmenter
from transkd.training.agreement import moved_classes, other_validation, warn_of_moved_classes
from transkd.training.teaching import load_teacher

NAMES = ("road", "car", "sky")


def test_classes_in_another_order_are_told(caplog):
    assert moved_classes(["sky", "car", "road"], NAMES) == ["sky (its 0, our 2)", "road (its 2, our 0)"]
    warn_of_moved_classes({"class_names": ["sky", "car", "road"]}, NAMES, "a.pth", "Choose others")
    expected = "a.pth has classes at other ids than the data: sky (its 0, our 2), road (its 2, our 0). Choose others"
    assert caplog.messages == [expected]


@pytest.mark.parametrize("names", [list(NAMES), ["street", "car", "sky"], ["a", "b", "c"], None])
def test_classes_that_may_be_the_same_are_not(caplog, names):
    warn_of_moved_classes({"class_names": names}, NAMES, "a.pth", "")
    warn_of_moved_classes({}, NAMES, "a.pth", "")
    assert caplog.messages == []


def test_a_teacher_of_another_order_is_told(tmp_path, caplog):
    file = tmp_path / "teacher.safetensors"
    sizes = {"num_classes": 3, "encoder": {"channels": [8, 16, 40, 64], "depths": [1, 1, 1, 1]}}
    classes = (NAMES, [(1, 1, 1), (2, 2, 2), (3, 3, 3)])
    save_segmenter(create_segmenter("segformer_b0", **sizes), file, classes)
    network = create_segmenter("segformer_b0", **sizes)
    load_teacher(network, file, None, "any", NAMES)
    load_teacher(network, file, None, "any")
    assert "other ids" not in caplog.text
    load_teacher(network, file, None, "any", NAMES[::-1])
    assert f"the teacher {file} has classes at other ids than the data: road (its 0, our 2)" in caplog.text


SHORT = A.Compose([A.SmallestMaxSize(96)])


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (SHORT, A.Compose([A.SmallestMaxSize(96)]), None),
        (None, None, None),
        (SHORT, A.Compose([A.SmallestMaxSize(512)]), "SmallestMaxSize(max_size=96), data.eval_transform is Small"),
        (SHORT, None, "SmallestMaxSize(max_size=96), data.eval_transform is none"),
        (None, SHORT, "none, data.eval_transform is SmallestMaxSize(max_size=96)"),
        (SHORT, A.Compose([A.Blur()]), None),  # more than resizing: not compared
    ],
)
def test_another_size_of_validation_is_told(theirs, ours, said):
    found = other_validation({"eval_transform": None if theirs is None else theirs.to_dict()}, ours)
    assert (found is None) if said is None else (found or "").startswith(said)


def test_weights_that_do_not_say_how_they_were_validated():
    assert other_validation({}, SHORT) is None
