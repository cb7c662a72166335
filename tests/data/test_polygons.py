"""COCO and YOLO polygons; expected pixels are those whose centres lie inside."""

import importlib
import json

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_reading import save, stored_as

from transkd.arguments import check_arguments
from transkd.cli import CONF
from transkd.data import SegmentationDataset, find_coco, find_yolo, own_classes
from transkd.data.polygons import read_yolo
from transkd.errors import UserError

HEIGHT, WIDTH = 6, 8
CLASSES = own_classes(["car", "bus"])


def box(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def composed(option, root, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"data={option}", f"data.root={root}", "data.classes.names=[car,bus]", "data.num_classes=2"]
        cfg = compose("train", [*given, "run_dir=run", *overrides])
    check_arguments(cfg)
    return instantiate(cfg.data)


# YOLO


@pytest.fixture
def yolo(tmp_path):
    """A bus over the left half of an image, a car on it, and an image without objects."""
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for name in ("a", "b"):
            save(tmp_path / "images" / split / f"{name}.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    car, bus = box(0.125, 1 / 6, 0.375, 0.5), box(0, 0, 0.5, 1)
    lines = [" ".join(map(str, [i, *corners])) for i, corners in ((0, car), (1, bus))]
    (tmp_path / "labels" / "train" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "labels" / "train" / "b.txt").touch()
    return tmp_path


EXPECTED = np.full((HEIGHT, WIDTH), 255, np.uint8)
EXPECTED[:, :4] = 1
EXPECTED[1:3, 1:3] = 0  # the smaller one lies on top though it comes first


def test_yolo(yolo):
    data = composed("yolo", yolo)
    assert np.array_equal(data.dataset("train").read(0)[1], EXPECTED)
    assert (data.dataset("train").read(1)[1] == 255).all()
    data.dataset("train").check()
    as_class = composed("yolo", yolo, "data.label.ids={0:car,1:null,255:bus}")
    assert np.array_equal(
        as_class.dataset("train").read(0)[1], np.select([EXPECTED == 1, EXPECTED == 255], [255, 1], 0)
    )


def test_yolo_ids_beyond_the_classes_have_a_map(yolo):
    text = (yolo / "labels" / "train" / "a.txt").read_text()
    (yolo / "labels" / "train" / "a.txt").write_text(text.replace("1 0", "7 0", 1))
    with pytest.raises(UserError, match=r"a\.txt, line 2: the class id 7 is outside the 2 classes 0…1"):
        composed("yolo", yolo).dataset("train").read(0)
    mapped = composed("yolo", yolo, "data.label.ids={0:car,7:bus}")
    assert np.array_equal(mapped.dataset("train").read(0)[1], EXPECTED)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("data.void=[7]", {0: 0, 7: 255}), ("data.label.reduce_zero_label=true", {0: 255, 1: 0, 2: 1})],
)
def test_yolo_ids_are_void_or_reduced_as_those_of_masks(yolo, setting, expected):
    for value, class_id in expected.items():
        (yolo / "labels" / "train" / "a.txt").write_text(" ".join(map(str, [value, *box(0, 0, 1, 1)])))
        assert (composed("yolo", yolo, setting).dataset("train").read(0)[1] == class_id).all()


def test_a_yolo_label_lies_on_the_upright_image(yolo):
    shown = np.repeat(EXPECTED[..., None], 3, axis=2)
    save(yolo / "images" / "train" / "a.jpg", stored_as(shown, 6), 6, quality=100)
    image, label = SegmentationDataset(find_yolo(yolo, "train"), CLASSES).read(0)
    assert np.array_equal(label, EXPECTED)
    assert np.abs(image[..., 0].astype(int) - EXPECTED).mean() < 12


def test_a_triangle(tmp_path):
    (tmp_path / "a.txt").write_text("1 0 0 1 0 0 1\n")
    assert read_yolo(tmp_path / "a.txt", (4, 4), 2).tolist() == [
        [1, 1, 1, 255],  # the last centre lies on the edge, which belongs to what follows
        [1, 1, 255, 255],
        [1, 255, 255, 255],
        [255, 255, 255, 255],
    ]


def test_yolo_images_without_a_text_file(yolo):
    (yolo / "labels" / "train" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"image without a label: .*b\.jpg"):
        find_yolo(yolo, "train")
    assert len(find_yolo(yolo, "train", without_label="skip")) == 1
    with pytest.raises(UserError, match=r"data\.find\.without_label=x: expected refuse or skip"):
        find_yolo(yolo, "train", without_label="x")
    with pytest.raises(UserError, match=r"no text files of polygons under data\.root=.*<name>\.txt in labels/val"):
        find_yolo(yolo, "val")
    with pytest.raises(UserError, match=r"no images under data\.root=.*images/train.*above it, has that layout"):
        find_yolo(yolo / "images", "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", r"a\.txt, line 1 has 4 numbers, a box; segmentation needs polygons"),
        ("0 0 0 1 0 1", r"line 1: expected at least 3 corners x y, each from 0 to 1, got 5 numbers"),
        ("0 0 0 7 0 7 7", r"line 1: expected at least 3 corners x y, each from 0 to 1"),
        ("0 0 0 nan 0 1 1", r"line 1: expected at least 3 corners"),
        ("2 0 0 1 0 1 1", r"line 1: the class id 2 is outside the 2 classes 0…1"),
        ("car 0 0 1 0 1 1", r"line 1: expected a class id and the corners x y x y … of a polygon, got 'car 0 0"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "a.txt").write_text(line)
    with pytest.raises(UserError, match=message):
        read_yolo(tmp_path / "a.txt", (4, 4), 2)


# COCO


@pytest.fixture
def coco(tmp_path):
    """Polygons of a small car before a large bus, an uncompressed and a compressed RLE, an image with nothing."""
    mask_tools = pytest.importorskip("pycocotools.mask", reason="needs pycocotools (transkd[coco])")
    tmp_path = tmp_path / "sets" / "mine"
    (tmp_path / "train2017" / "sub").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    rle = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    rle[4:6, 5:8] = 1
    compressed = mask_tools.encode(rle)
    content = {
        "categories": [{"id": 3, "name": "truck"}, {"id": 1, "name": "car"}, {"id": 9, "name": "bus"}],
        "images": [
            {"id": 10 + i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(["a.png", "sub/b.png", "c.png"])
        ],
        "annotations": [
            {"image_id": 10, "category_id": 1, "segmentation": [box(1, 1, 3, 3)], "iscrowd": 0},
            {"image_id": 10, "category_id": 9, "segmentation": [box(0, 0, 4, 6), [1, 1]], "iscrowd": 0},
            # column by column: 6 rows of the first column, then 42 without
            {"image_id": 11, "category_id": 3, "segmentation": {"counts": [0, 6, 42], "size": [HEIGHT, WIDTH]}},
            {
                "image_id": 11,
                "category_id": 1,
                "segmentation": {"counts": compressed["counts"].decode(), "size": [HEIGHT, WIDTH]},
            },
        ],
    }
    for image in content["images"]:
        save(tmp_path / "train2017" / image["file_name"], np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return tmp_path, content


def write(root, content):
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


SETTINGS = ["data.find.categories={truck: bus}"]


def test_coco(coco):
    data = composed("coco", write(*coco), *SETTINGS)
    dataset = data.dataset("train")
    assert [pair.image.name for pair in dataset.pairs] == ["a.png", "c.png", "b.png"]
    assert np.array_equal(dataset.read(0)[1], EXPECTED)
    assert (dataset.read(1)[1] == 255).all()
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[:, 0], expected[4:6, 5:8] = 1, 0
    assert np.array_equal(dataset.read(2)[1], expected)


def test_coco_background_and_ignored_categories(coco):
    root = write(*coco)
    pairs = find_coco(root, "train", ["car", "rest"], categories={"bus": "rest", "truck": None}, background="rest")
    labels = [SegmentationDataset(pairs, CLASSES).read(i)[1] for i in range(3)]
    assert np.array_equal(labels[0], np.where(EXPECTED == 0, 0, 1))
    assert (labels[1] == 1).all()
    assert labels[2][:, 0].tolist() == [255] * 6
    assert labels[2][:, 1].tolist() == [1] * 6


def test_coco_sizes_with_a_point_and_names_that_are_numbers(coco):
    root, content = coco
    for image in content["images"]:
        image |= {"height": float(HEIGHT), "width": float(WIDTH)}
    for category in content["categories"]:
        category["name"] = {"car": 1, "bus": 2, "truck": 3}[category["name"]]
    overrides = ["data.classes.names=['1','2']", "data.find.categories={3: '2'}"]
    assert np.array_equal(composed("coco", write(root, content), *overrides).dataset("train").read(0)[1], EXPECTED)
    with pytest.raises(UserError, match="has categories that are no class: 3; add"):
        composed("coco", root, "data.classes.names=['1','2']").dataset("train")


def test_coco_is_drawn_once(coco, monkeypatch):
    root, content = coco
    settings = {"names": ["car", "bus"], "categories": {"truck": None}}
    first = find_coco(write(root, content), "train", **settings)
    before = {pair.label: pair.label.stat().st_mtime_ns for pair in first}
    assert find_coco(root, "train", **settings) == first
    assert before == {pair.label: pair.label.stat().st_mtime_ns for pair in first}
    content["annotations"].pop()
    changed = find_coco(write(root, content), "train", **settings)
    assert {pair.label for pair in changed}.isdisjoint(before)  # another file, other labels
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert find_coco(root, "train", **settings) == changed  # nothing to draw, nothing needed
    content["annotations"].pop()
    with pytest.raises(UserError, match=r"needs pycocotools: pip install 'transkd\[coco\]'"):
        find_coco(write(root, content), "train", **settings)


def test_coco_labels_of_stored_orientation(coco):
    """The file may have the size of the stored pixels or of the upright ones."""
    root, content = coco
    shown = np.repeat(EXPECTED[..., None], 3, axis=2)
    save(root / "train2017" / "a.png", stored_as(shown, 8), 8)
    image, label = composed("coco", write(root, content), *SETTINGS).dataset("train").read(0)
    assert np.array_equal(image[..., 0], EXPECTED)
    assert np.array_equal(label, EXPECTED)
    content["images"][0] |= {"height": WIDTH, "width": HEIGHT}
    content["annotations"] = [  # EXPECTED after a quarter turn to the right
        {"image_id": 10, "category_id": 9, "segmentation": [box(0, 0, 6, 4)]},
        {"image_id": 10, "category_id": 1, "segmentation": [box(3, 1, 5, 3)]},
    ]
    image, label = composed("coco", write(root, content), *SETTINGS).dataset("train").read(0)
    assert np.array_equal(image[..., 0], EXPECTED)
    assert np.array_equal(label, EXPECTED)


def test_what_is_wrong_with_a_coco_file(coco):
    root, content = coco
    settings = {"names": ["car", "bus", "truck"]}

    def refused(message, root=root, **changes):
        with pytest.raises(UserError, match=message) as caught:
            find_coco(root, "train", **{**settings, **changes})
        assert "\n" not in str(caught.value)

    refused(
        r"no COCO data under data\.root=.*images in train2017 and annotations in annotations/instances_train2017\.js"
    )
    write(root, content)
    refused(r"below it, has that layout: data\.root=", root=root.parent)
    refused(
        r"categories that are no class: truck; add them .*'data\.find\.categories=\{truck: CLASS\}'",
        names=["car", "bus"],
    )
    refused(r"data\.find\.background names sky, no class; there are car, bus", background="sky")
    content["images"][1]["width"] = 99
    write(root, content)
    refused(
        r"says that sub/b\.png is 6×99, but .*sub/b\.png is 6×8: the annotations belong to other images or to resized"
    )
    content["images"][1]["width"] = WIDTH
    for name in ("a.png", "c.png"):
        (root / "train2017" / name).unlink()
    write(root, content)
    refused(
        r"lists 3 images, of which 2 are not in .*train2017: a\.png, c\.png; data\.find\.images says where they are"
    )
    for image in content["images"]:
        image["file_name"] = "../a.png"  # nothing is written outside the folder
    write(root, content)
    refused(r"of which 3 are not in .*train2017: \.\./a\.png")
    for image in content["images"]:
        image["file_name"] = "sub/b.png"
    write(root, content)
    refused(r"lists the image sub/b\.png twice; merge the two entries")
    write(root, {**content, "images": []})
    refused(r"lists 0 images, of which 0 are not in .*: none")
    for broken in ("{}", "[]", "no json", json.dumps({**content, "annotations": [{"image_id": 1}]})):
        (root / "annotations" / "instances_train2017.json").write_text(broken)
        refused(r"is not a COCO file with images, categories and annotations that have a segmentation")


def test_a_wrong_segmentation_is_named(coco):
    root, content = coco
    content["annotations"] = [{"image_id": 10, "category_id": 1, "segmentation": {"counts": [0, 6], "size": [2, 3]}}]
    with pytest.raises(UserError, match=r"an RLE of a\.png is 2×3, the image 6×8"):
        composed("coco", write(root, content), *SETTINGS).dataset("train")
    for wrong in ({"nothing": 1}, [[[1, 1], [3, 1], [3, 3]]]):  # corners as pairs were taken for a line of no area
        content["annotations"][0]["segmentation"] = wrong
        with pytest.raises(UserError, match=r"of an annotation of a\.png is neither polygons nor RLE"):
            composed("coco", write(root, content), *SETTINGS).dataset("train")
