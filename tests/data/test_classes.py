import pytest

from transkd.data.classes import CAMVID, CITYSCAPES, VOC, ClassSet, class_set
from transkd.errors import UserError


@pytest.mark.parametrize(
    ("classes", "train_id", "name", "colour"),  # as the sets' own tools have them
    [
        (CITYSCAPES, 0, "road", (128, 64, 128)),
        (CITYSCAPES, 1, "sidewalk", (244, 35, 232)),
        (CITYSCAPES, 5, "pole", (153, 153, 153)),
        (CITYSCAPES, 10, "sky", (70, 130, 180)),
        (CITYSCAPES, 13, "car", (0, 0, 142)),
        (CITYSCAPES, 18, "bicycle", (119, 11, 32)),
        (CAMVID, 0, "sky", (128, 128, 128)),
        (CAMVID, 3, "road", (128, 64, 128)),
        (CAMVID, 8, "car", (64, 0, 128)),
        (CAMVID, 10, "bicyclist", (0, 128, 192)),
        (VOC, 1, "aeroplane", (128, 0, 0)),
        (VOC, 15, "person", (192, 128, 128)),
        (VOC, 20, "tvmonitor", (0, 64, 128)),
    ],
)
def test_ids(classes, train_id, name, colour):
    assert (classes.names[train_id], classes.palette[train_id]) == (name, colour)


@pytest.mark.parametrize("classes", [CITYSCAPES, CAMVID, VOC])
def test_no_class_looks_like_ignored_pixels(classes):
    assert (0, 0, 0) not in classes.palette
    assert all(0 <= value <= 255 for colour in classes.palette for value in colour)


@pytest.mark.parametrize(
    ("names", "palette", "message"),
    [
        (["a", 2], [[0, 0, 0], [1, 1, 1]], r"data\.classes\.names=.*one text per class"),
        ("ab", [[0, 0, 0], [1, 1, 1]], r"data\.classes\.names=ab"),
        (["a", "b"], [[0, 0], [1, 1, 1]], r"palette has \[0, 0\]: expected \[r,g,b\], whole numbers from 0 to 255"),
        (["a", "b"], [[0, 0, 256], [1, 1, 1]], r"palette has \[0, 0, 256\]: expected"),
        (["a", "b"], 7, r"palette has 7: expected"),
        (["a", "b"], [[0, 0, 0]], r"data\.classes\.palette has 1 colours for 2 names; give one each"),
        (["b", "a", "a"], [[0, 0, 0]] * 3, r"data\.classes\.names has a more than once; expected different names"),
        (["crack"], [[0, 0, 0]], r"names=\[crack\]: expected at least two classes; the rest of the image is one too"),
        ([], [], r"names=\[\]: expected at least two classes"),
    ],
)
def test_classes_of_ones_own_are_checked(names, palette, message):
    with pytest.raises(UserError, match=message):
        class_set(ClassSet(names, palette))
    with pytest.raises(UserError, match="unknown classes 'cityscape'; available: cityscapes"):
        class_set("cityscape")
