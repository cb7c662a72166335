"""ADE20K, BDD100K and Mapillary Vistas, each on a small tree laid out as its archives unpack."""

import json

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from test_reading import save

from transkd.arguments import check_arguments
from transkd.cli import CONF
from transkd.data import (
    ADE20K,
    CITYSCAPES,
    SegmentationDataset,
    find_acdc,
    find_ade20k,
    find_bdd100k,
    find_camvid,
    find_cityscapes,
    find_mapillary,
    find_nyuv2,
    find_voc,
    mapillary_classes,
    mapillary_label,
)
from transkd.errors import UserError

IMAGE = np.full((4, 6, 3), 90, np.uint8)


def composed(option, root, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"data={option}", f"data.root={root}", "run_dir=run", *overrides])
    check_arguments(cfg)
    return instantiate(cfg.data)


def write(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image = Image.fromarray(pixels, mode="P")
        image.putpalette([part for colour in palette for part in colour])
    save(path, image)


def label(*values):
    return np.resize(np.array(values, dtype=np.uint8), (4, 6))


# ADE20K


@pytest.fixture
def ade(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for folder, split, count in (("training", "train", 2), ("validation", "val", 1)):
        for i in range(1, count + 1):
            write(root / "images" / folder / f"ADE_{split}_{i:08d}.jpg", IMAGE)
            write(root / "annotations" / folder / f"ADE_{split}_{i:08d}.png", label(0, 1, 150))
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    (root / "objectInfo150.txt").touch()
    return root


def test_ade20k(ade):
    data = composed("ade20k", ade)
    assert [pair.image.name for pair in data.dataset("train").pairs] == [f"ADE_train_0000000{i}.jpg" for i in (1, 2)]
    assert data.dataset("val").read(0)[1][0, :3].tolist() == [255, 0, 149]
    assert len(data.classes.names) == data.num_classes == 150


def test_ade20k_names_and_colours():
    assert [ADE20K.names[i] for i in (0, 1, 12, 20, 44, 149)] == [
        "wall",
        "building",
        "person",
        "car",
        "chest of drawers",
        "flag",
    ]
    assert [ADE20K.palette[i] for i in (0, 12, 149)] == [(120, 120, 120), (150, 5, 61), (92, 0, 255)]


# BDD100K


@pytest.fixture
def bdd(tmp_path):
    root = tmp_path / "bdd100k"
    for split, names in {"train": ["0004a4c0-d4dff0ad", "00054602-3bf57337"], "val": ["7d06fefd-f7be05a6"]}.items():
        for name in names:
            write(root / "images" / "10k" / split / f"{name}.jpg", IMAGE)
            write(root / "labels" / "sem_seg" / "masks" / split / f"{name}.png", label(0, 18, 255))
            write(root / "labels" / "sem_seg" / "colormaps" / split / f"{name}.png", np.zeros((4, 6, 3), np.uint8))
    write(root / "images" / "10k" / "test" / "ac6d4f42-00000000.jpg", IMAGE)
    (root / "labels" / "sem_seg" / "polygons").mkdir()
    return root


def test_bdd100k(bdd):
    data = composed("bdd100k", bdd)
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (2, 1)
    assert data.classes == CITYSCAPES
    assert data.dataset("val").read(0)[1][0, :3].tolist() == [0, 18, 255]


# Mapillary Vistas

LABELS = [
    {"name": "animal--bird", "readable": "Bird", "color": [165, 42, 42], "instances": True, "evaluate": True},
    {"name": "void--ground", "readable": "Ground", "color": [1, 2, 3], "instances": False, "evaluate": False},
    {
        "name": "construction--flat--road",
        "readable": "Road",
        "color": [128, 64, 128],
        "instances": False,
        "evaluate": True,
    },
    {"name": "void--unlabeled", "readable": "Unlabeled", "color": [0, 0, 0], "instances": False, "evaluate": False},
]


@pytest.fixture
def mapillary(tmp_path):
    """Version 2.0: both sets of labels below each split; a value of v1.2 is one less."""
    content = {"labels": LABELS, "version": 1.1, "mapping": "public", "folder_structure": "{split}/{content}/{key}"}
    (tmp_path / "config_v2.0.json").write_text(json.dumps(content))
    (tmp_path / "config_v1.2.json").write_text(json.dumps({**content, "labels": LABELS[1:]}))
    palette = [entry["color"] for entry in LABELS]
    for folder, names in {"training": ["_1Gn_xkw7sa_i9GU4mkxxQ", "b"], "validation": ["c"], "testing": ["d"]}.items():
        for name in names:
            write(tmp_path / folder / "images" / f"{name}.jpg", IMAGE)
            if folder != "testing":
                write(tmp_path / folder / "v2.0" / "labels" / f"{name}.png", label(0, 1, 2, 3), palette)
                write(tmp_path / folder / "v2.0" / "panoptic" / f"{name}.png", IMAGE)
                write(tmp_path / folder / "v1.2" / "labels" / f"{name}.png", label(0, 1, 2), palette[1:])
    return tmp_path


def test_mapillary(mapillary):
    data = composed("mapillary", mapillary, "data.find.version=v2.0", "data.num_classes=2")
    assert data.classes.names == ("Bird", "Road")
    assert data.classes.palette == ((165, 42, 42), (128, 64, 128))
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (2, 1)
    assert data.dataset("val").read(0)[1][0, :4].tolist() == [0, 255, 1, 255]
    assert mapillary_classes(mapillary, "v1.2").names == ("Road",)
    older = SegmentationDataset(
        find_mapillary(mapillary, "val", "v1.2"),
        mapillary_classes(mapillary, "v1.2"),
        label=mapillary_label(mapillary, "v1.2"),
    )
    assert older.read(0)[1][0, :3].tolist() == [255, 0, 255]


def test_mapillary_of_the_first_archive(mapillary):
    (mapillary / "config_v1.2.json").rename(mapillary / "config.json")
    for folder in ("training", "validation"):
        (mapillary / folder / "v1.2" / "labels").rename(mapillary / folder / "labels")
        (mapillary / folder / "v1.2").rmdir()
    assert len(find_mapillary(mapillary, "train", "v1.2")) == 2
    assert mapillary_classes(mapillary, "v1.2").names == ("Road",)


def test_what_is_wrong_with_mapillary(mapillary):
    with pytest.raises(InstantiationException, match=r"data\.num_classes=65, but the class set has 2 classes"):
        composed("mapillary", mapillary, "data.find.version=v2.0")
    with pytest.raises(UserError, match=r"has no version v3; there are v1\.2 and v2\.0"):
        find_mapillary(mapillary, "train", "v3")
    (mapillary / "config_v2.0.json").write_text("{}")
    with pytest.raises(UserError, match=r"config_v2\.0\.json is not the configuration file of Mapillary Vistas"):
        mapillary_classes(mapillary, "v2.0")
    (mapillary / "config_v2.0.json").unlink()
    with pytest.raises(
        UserError, match=r"no config_v2\.0\.json under data\.root=.*data\.find\.version=v1\.2 or v2\.0 cho"
    ):
        mapillary_classes(mapillary, "v2.0")


# Roots above and below the right one

LAYOUTS = {
    find_acdc: ["rgb_anon/fog/train/s", "gt/fog/train/s"],
    find_ade20k: ["images/training", "annotations/training"],
    find_bdd100k: ["images/10k/train", "labels/sem_seg/masks/train"],
    find_camvid: ["train", "trainannot"],
    find_cityscapes: ["leftImg8bit/train/ulm", "gtFine/train/ulm"],
    find_mapillary: ["training/images", "training/v2.0/labels"],
    find_nyuv2: ["train.txt", "images", "labels"],
    find_voc: ["ImageSets/Segmentation/trainaug.txt", "JPEGImages"],
}


@pytest.mark.parametrize("find", LAYOUTS, ids=lambda find: find.__name__)
def test_the_right_root_is_named(tmp_path, find):
    right = tmp_path / "sets" / "here"
    for folder in LAYOUTS[find]:
        (right / folder).mkdir(parents=True)
    inside = right / LAYOUTS[find][-1].split("/")[0]
    for wrong, where in ((right.parent, "below it"), (inside, "above it")):
        with pytest.raises(
            UserError, match=rf"data\.root={wrong}.*; {right}, {where}, has that layout: data\.root={right}"
        ) as caught:
            find(wrong, "train")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("find", [find_ade20k, find_bdd100k, find_mapillary])
def test_an_image_without_a_label_is_named(find, request):
    root = request.getfixturevalue({find_ade20k: "ade", find_bdd100k: "bdd", find_mapillary: "mapillary"}[find])
    gone = find(root, "train")[0]
    gone.label.unlink()
    with pytest.raises(UserError, match=f"image without a label: {gone.image}"):
        find(root, "train")
    hidden = gone.image.with_name(f"._{gone.image.name}")
    gone.image.rename(hidden)  # as macOS leaves them in archives
    assert len(find(root, "train")) == 1
