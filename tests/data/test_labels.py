"""Stored values and colours to class ids, and what is said of labels that are read wrong."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from test_reading import save, stored_as

from transkd.arguments import check_arguments
from transkd.cli import CONF
from transkd.data import ClassSet, LabelFormat, Pair, SegmentationDataset
from transkd.data.labels import LabelReader
from transkd.data.reading import Stored
from transkd.errors import UserError

THREE = ClassSet(("road", "building", "car"), ((128, 64, 128), (70, 70, 70), (0, 0, 142)))
TWO = ClassSet(("ground", "crack"), ((0, 0, 0), (255, 255, 255)))
NAME = Path("label.png")


def ids(values, classes=THREE, void=(), **settings):
    return LabelReader(classes, void, LabelFormat(**settings)).to_ids(Stored(np.array(values)), NAME).tolist()


def refused(message, *args, **settings):
    with pytest.raises(UserError, match=message) as caught:
        ids(*args, **settings)
    assert "\n" not in str(caught.value)


# Values


def test_without_a_map_values_are_ids():
    assert ids([[0, 1, 2, 255]]) == [[0, 1, 2, 255]]
    assert ids([[0, 1, 2, 9]], void=[9, 0]) == [[255, 1, 2, 255]]


def test_a_map_merges_drops_and_reorders():
    mapped = {7: "road", 8: 0, 11: "building", 26: 2, 0: None, 3: 255}
    assert ids([[7, 8, 11, 26, 0, 3, 255]], ids=mapped) == [[0, 0, 1, 2, 255, 255, 255]]
    refused(r"label values \[4, 5\] are not in data\.label\.ids; add them, or other:null", [[7, 4, 5]], ids=mapped)
    assert ids([[7, 4, 5]], ids={**mapped, "other": None}) == [[0, 255, 255]]
    assert ids([[7, 4, 5, 255]], ids={"other": "car", 7: 0}) == [[0, 2, 2, 255]]
    assert ids([[0, 255]], classes=TWO, ids={0: 0, 255: 1}) == [[0, 1]]
    assert ids([[7, 8]], void=[8], ids=mapped) == [[0, 255]]


def test_the_zero_label_is_reduced():
    assert ids([[0, 1, 2, 3, 255]], reduce_zero_label=True) == [[255, 0, 1, 2, 255]]
    refused(r"label values \[4\] are outside the 3 classes", [[1, 4]], reduce_zero_label=True)


def test_values_of_sixteen_bits():
    wide = np.array([[300, 1000]], dtype=np.uint16)
    assert ids(wide, ids={300: 0, 1000: 1}) == [[0, 1]]
    assert ids(np.array([[0, 2, 255]], dtype=np.uint16)) == [[0, 2, 255]]
    refused(r"\[515\] are outside .*values above 255 often number objects \(class·256 \+ object", [[0, 515]])
    refused(r"class ids from 0 to 65535, got values 0…70000", np.array([[0, 70000]], dtype=np.int32))


def test_a_few_unknown_values_come_with_the_setting_that_ignores_them():
    refused(r", or ignore \[7\] with data\.void=\[7\]$", [[0, 2, 7]])
    assert ids([[0, 2, 7]], void=[7]) == [[0, 2, 255]]
    refused(r", or ignore \[7\] with data\.void=\[7,9\]$", [[0, 7, 9]], void=[9])
    refused(r"null = ignored\)$", [[0, 50, 100, 150, 200]])  # so many are classes


def test_values_that_need_a_map_are_named_with_the_setting():
    refused(r"\[7, 26\] are outside the 3 classes 0…2 .*data\.label\.ids=\{0:…,7:…,26:…\}", [[0, 7, 26]])
    refused(r"if 0 is to be ignored and k is class k-1, set data\.label\.reduce_zero_label=true", [[0, 1, 2, 3]])
    refused(r"\[10, .*17\] and 2 more are outside", [[*range(10, 20)]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": {1: "bus"}}, r"data\.label\.ids maps 1 to 'bus': expected null, a class id 0 … 2 or one of road, bui"),
        ({"ids": {1: 3}}, r"data\.label\.ids maps 1 to 3"),
        ({"ids": {"road": 1}}, r"data\.label\.ids has the key 'road': expected 0 … 65535 or other"),
        ({"ids": {1: 1}, "colors": True}, r"data\.label\.ids and data\.label\.colors exclude each other"),
        ({"ids": {1: 1}, "reduce_zero_label": True}, r"ids and data\.label\.reduce_zero_label exclude each other"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    refused(message, [[1]], **settings)


def test_too_many_classes():
    with pytest.raises(UserError, match="has 255 classes; class ids are bytes, so at most 254 fit"):
        LabelReader(ClassSet(tuple(map(str, range(255))), ((0, 0, 0),) * 255))


# Colours


def coloured(*colours):
    return np.array([colours], dtype=np.uint8)


def test_colours_are_the_classes():
    label = coloured((0, 0, 142), (128, 64, 128), (0, 0, 0), (70, 70, 70))
    assert ids(label, colors=True) == [[2, 0, 255, 1]]
    refused(
        r"colours that are no class's, \[\[1, 2, 3\]\]: set data\.classes\.palette", coloured((1, 2, 3)), colors=True
    )
    assert ids(coloured((1, 2, 3), (70, 70, 70)), colors=True, ignored_colors=[[1, 2, 3]]) == [[255, 1]]
    assert ids(coloured((0, 0, 0), (255, 255, 255)), classes=TWO, colors=True) == [[0, 1]]  # black is a class here
    assert ids(np.array([[70, 0]], dtype=np.uint8), colors=True) == [[1, 255]]  # a grey image
    refused(r"grey values of 16 bits, up to 256, but data\.label\.colors=true", np.uint16([[70, 256]]), colors=True)


def test_labels_in_colours_are_recognised():
    label = coloured((0, 0, 142), (128, 64, 128), (9, 9, 9))
    refused(
        r"is an RGB image, 2 of its 3 colours are colours of the classes: read it with data\.label\.colors=t", label
    )
    refused(
        r"got RGB with the colours \[\[9, 8, 7\]\]; if they stand for classes, set data\.classes\.pal",
        coloured((9, 8, 7)),
    )


def paletted(values, colours):
    image = Image.fromarray(np.array(values, dtype=np.uint8), mode="P")
    padded = [*colours, *[(1, 1, 1)] * (256 - len(colours))]  # Pillow stores no value beyond the palette
    image.putpalette([part for colour in padded for part in colour])
    return image


@pytest.fixture
def read(tmp_path):
    """Read an image and a label of three classes through the data set."""

    def read(image, label, orientation=None, classes=THREE, form=None, **settings):
        pair = Pair(tmp_path / "image.png", tmp_path / "label.png")
        save(pair.image, image, orientation)
        save(pair.label, label)
        return SegmentationDataset([pair], classes, label=LabelFormat(**(form or settings))).read(0)

    return read


def test_a_palette_in_another_order_is_recognised(read):
    swapped = paletted([[0, 1, 2, 2]], [THREE.palette[0], THREE.palette[2], THREE.palette[1]])
    image = np.zeros((1, 4, 3), np.uint8)
    with pytest.raises(
        UserError, match=r"the value 1 is the class building, but has the colour of car in the file's pal"
    ):
        read(image, swapped)
    late = paletted([[0, 5, 5, 5]], [THREE.palette[0], *[(9, 9, 9)] * 4, THREE.palette[2]])
    with pytest.raises(UserError, match="the value 5 is no class, but has the colour of car in the file's palette"):
        read(image, late)
    assert read(image, late, colors=True)[1].tolist() == [[0, 2, 2, 2]]
    assert read(image, swapped, colors=True)[1].tolist() == [[0, 2, 1, 1]]
    assert read(image, swapped, colors=False)[1].tolist() == [[0, 1, 2, 2]]
    only_road = paletted([[0, 0, 0, 255]], [THREE.palette[0], THREE.palette[2], THREE.palette[1]])
    assert read(image, only_road)[1].tolist() == [[0, 0, 0, 255]]  # the swapped colours do not occur


@pytest.mark.parametrize("colours", [THREE.palette, [(1, 2, 3), (4, 5, 6), (7, 8, 9)], [(i, i, i) for i in range(256)]])
def test_other_palettes_are_read_by_value(read, colours):
    assert read(np.zeros((1, 4, 3), np.uint8), paletted([[0, 1, 2, 255]], colours))[1].tolist() == [[0, 1, 2, 255]]


# Masks of 0 and 255


def checked(tmp_path, *labels, classes=TWO, **settings):
    pairs = []
    for i, label in enumerate(labels):
        label = np.array(label, dtype=np.uint8)
        pair = Pair(tmp_path / f"image{i}.png", tmp_path / f"label{i}.png")
        save(pair.image, np.zeros((*label.shape, 3), np.uint8))
        save(pair.label, label)
        pairs.append(pair)
    dataset = SegmentationDataset(pairs, classes, label=LabelFormat(**settings))
    dataset.check()
    return dataset


def test_masks_of_black_and_white_are_recognised(tmp_path):
    with pytest.raises(
        UserError, match=r"only the values 0 and 255.*data\.label\.ids=\{0:0,255:1\}; if 255 is to be ign"
    ):
        checked(tmp_path, [[0, 0]], [[0, 255]])
    assert checked(tmp_path, [[0, 255]], ids={0: 0, 255: 1})[0].target.tolist() == [[0, 1]]
    assert checked(tmp_path, [[0, 255]], ids={0: 0, 1: 1, 255: None})[0].target.tolist() == [[0, 255]]
    with pytest.raises(UserError, match="only the values 0 and 255, and 255 is ignored"):
        checked(tmp_path, [[0, 255]], ids={0: 0, "other": 1})
    checked(tmp_path, [[0, 255]], [[0, 1]])
    checked(tmp_path, [[0, 255]], classes=THREE)


def test_a_label_of_one_bit(read):
    image = np.zeros((1, 2, 3), np.uint8)
    assert read(image, Image.fromarray(np.array([[False, True]])), classes=TWO)[1].tolist() == [[0, 1]]
    one_bit = Image.fromarray(np.array([[False, True]]))
    assert read(image, one_bit, classes=TWO, colors=True)[1].tolist() == [[0, 1]]  # black and white are the colours


# Orientation: the class map lies on the image

CLASSES = np.array([[0, 0, 1, 2], [1, 2, 2, 2], [0, 1, 0, 255]], dtype=np.uint8)
PICTURE = np.repeat(CLASSES[..., None] * 40, 3, axis=2)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_label_is_turned_with_its_image(read, orientation):
    """Height and width say whether the label is stored as the image is, or as it is shown."""
    stored = stored_as(PICTURE, orientation)
    for label in (CLASSES, stored_as(CLASSES, orientation)):
        image, target = read(stored, label, orientation)
        assert np.array_equal(image, PICTURE)
        assert np.array_equal(target, CLASSES)
    with pytest.raises(UserError, match=r"differ in size: .*image\.png is 3×4, .*label\.png is "):
        read(stored, CLASSES[:2], orientation)


@pytest.mark.parametrize(("orientation", "size"), [(2, 4), (3, 4), (4, 4), (6, 3), (8, 3)])
def test_a_label_whose_size_does_not_tell_asks(read, orientation, size):
    shown, classes = PICTURE[:, :size], CLASSES[:, :size]
    stored, turned = stored_as(shown, orientation), stored_as(classes, orientation)
    with pytest.raises(
        UserError, match=rf"EXIF orientation {orientation}.*data\.label\.orientation=shown .* or stored"
    ):
        read(stored, classes, orientation)
    for label, where in ((classes, "shown"), (turned, "stored")):
        image, target = read(stored, label, orientation, form={"orientation": where})
        assert np.array_equal(image, shown)
        assert np.array_equal(target, classes)


def test_the_command_line_says_how_labels_are_read():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["data=camvid", "data.root=x", "data.label.ids={0:road,7:null,other:1}"]
        cfg = compose("train", ["+experiment=demo", "run_dir=run", *given])
        cfg.data.label.ids[0] = 3
        form = instantiate(cfg.data).label
        assert form.ids == {0: 3, 7: None, "other": 1}
        assert form.ignored_colors == [[0, 0, 0]]
        wrong = compose("train", ["+experiment=demo", "run_dir=run", "data.label.orientation=sideways"])
    with pytest.raises(UserError, match=r"data\.label\.orientation=sideways: expected auto or shown or stored"):
        check_arguments(wrong)
